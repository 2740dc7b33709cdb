"""`python -m lte`: the same as the `lte` command."""

from lte_cli import main

main()
