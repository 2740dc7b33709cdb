"""The whole command line in one app, from which `make docs` writes its reference."""

import typer

from lte_cli import COMMANDS, FORMAT, function_of, root

app = typer.Typer(name="lte", no_args_is_help=True, **FORMAT)
app.callback()(root)
for _name in COMMANDS:
    app.command(_name)(function_of(_name))
