"""The `lte` command: its name, its version and its list of subcommands, each of which is imported when it is called.

This is a package beside `lte`, which loads torch and transformers for everybody but the command: that takes seconds.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

# Each command's function is in the module of its name in lte.cli. The texts are the first sentences of their help.
COMMANDS = {
    "train": "Trains a sparse model in two stages and writes a folder that from_pretrained and the other commands "
    "load.",
    "convert": "Converts a dense checkpoint of any size into an LTE folder with untrained routers, in the memory of a "
    "layer.",
    "densify": "Writes a sparse folder's stock dense model, without routers, for engines that know nothing of lte.",
    "configs": "Lists the configs of accelerate that come with lte, for FSDP2 and DeepSpeed, prints one, or copies it.",
    "data": "Shows what lte reads of files: the columns it uses and how, and a row as the model will see it.",
    "eval": "Measures a model on held-out text or a task: its metrics, sparsity in hard mode, GFLOPs and bytes per "
    "token.",
    "steadiness": "Says how steady the routing is: decisions and tokens that number formats, batches and kernels "
    "change.",
    "unions": "Says what several tokens leave off together: neighbours, random ones, and those of different texts.",
    "calibrate": "Measures the curve of quality, sparsity, bytes and time over a folder's one threshold, and sets the "
    "threshold.",
    "generate": "Continues a prompt and says how fast, and what share of its neurons the model used for this text.",
    "bench": "Times FFNs, decoding steps and prompts of a sparse model and of dense baselines, side by side in one "
    "run.",
    "compare": "Trains and measures methods side by side: one start per seed, one budget, a result record for each "
    "run.",
    "inspect": "Says what a model is: experts, routers, target and measured sparsity, FLOPs per token; and whether "
    "it loads.",
    "report": "Compares methods over result files: tables, trade-off curves, the paper's numbers beside ours. Loads "
    "no models.",
    "demo": "Makes a small language model sparse on this machine, and reports what it gained and lost.",
}
FORMAT: dict[str, Any] = {"add_completion": False, "rich_markup_mode": "markdown", "pretty_exceptions_enable": False}


def load_command(name: str) -> Any:
    """Imports a subcommand, with torch and transformers."""
    single = typer.Typer(**FORMAT)
    single.command(name)(function_of(name))
    return typer.main.get_command(single)


def function_of(name: str) -> Any:
    """The function of a subcommand."""
    module = import_module(f"lte.cli.{name}")
    # `eval` is a function of Python's own.
    return getattr(module, f"{name}_command", None) or getattr(module, name)


class LazyGroup(TyperGroup):
    """A group that knows its commands by name and help, which do for a list, and imports the one that is called."""

    def __init__(self, **settings: Any):
        super().__init__(**settings)
        for name, text in COMMANDS.items():
            self.commands[name] = TyperCommand(name, help=text, rich_markup_mode="markdown")

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """The command that is called, imported."""
        name, command, rest = super().resolve_command(ctx, args)
        return name, None if command is None else load_command(str(name)), rest

    def make_context(self, *args: Any, **settings: Any) -> Any:
        """As the stock method, with Ctrl-C as one line."""
        with _one_line():
            return super().make_context(*args, **settings)

    def invoke(self, ctx: Any) -> Any:
        """As the stock method, with Ctrl-C as one line while the command is imported."""
        with _one_line():
            return super().invoke(ctx)


@contextmanager
def _one_line() -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        typer.echo("Interrupted: stopped by Ctrl-C", err=True)
        raise typer.Exit(130) from None


app = typer.Typer(
    cls=LazyGroup,
    name="lte",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    **FORMAT,
)


def _print_version(wanted: bool) -> None:
    if not wanted:
        return
    from importlib import metadata  # takes as long as all else here

    # An installed package tells it without being imported.
    try:
        found = metadata.version("lte")
    except metadata.PackageNotFoundError:
        found = import_module("lte").__version__
    typer.echo(f"lte {found}")
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
