"""`python -m lte`: the same as the `lte` command."""

from lte.cli import main

main()
