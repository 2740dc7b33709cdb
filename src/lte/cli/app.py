"""The `lte` command: its subcommands and what they share."""

from __future__ import annotations

from typing import Annotated

import typer

from lte import __version__
from lte.cli.bench import bench
from lte.cli.compare import compare
from lte.cli.demo import demo
from lte.cli.eval import eval_command
from lte.cli.generate import generate
from lte.cli.inspect import inspect
from lte.cli.report import report
from lte.cli.train import train

app = typer.Typer(
    name="lte",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"lte {__version__}")
        raise typer.Exit


@app.callback()
def root(
    context: typer.Context,
    debug: Annotated[bool, typer.Option("--debug", help="Show the full traceback of an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Learn-To-be-Efficient: train a language model to use few of its FFN neurons, in blocks.

    To see it work, in some minutes on a CPU: `lte demo`
    """
    context.obj = debug


app.command("train")(train)
app.command("eval")(eval_command)
app.command("generate")(generate)
app.command("bench")(bench)
app.command("compare")(compare)
app.command("inspect")(inspect)
app.command("report")(report)
app.command("demo")(demo)
