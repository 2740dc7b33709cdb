"""Exit codes and error messages: a user's mistake is one red sentence, a bug is a traceback.

0 success, 1 an error that the message explains, 2 wrong usage of the command line, 130 interrupted.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Annotated, Any

import torch
import typer
import yaml
from rich.console import Console

from lte.train.trainer import NonFiniteLossError

EXIT_ERROR, EXIT_INTERRUPTED = 1, 130
# What a user can cause and mend. A RuntimeError or a KeyError is a bug and keeps its traceback.
USER_ERRORS = (ValueError, OSError, NonFiniteLossError, yaml.YAMLError)

DebugOption = Annotated[bool, typer.Option("--debug", help="Show the full traceback of an error.")]


class Interrupted(Exception):
    """Ctrl-C, with a message that says how to go on."""


def print_error(message: str, title: str = "Error") -> None:
    """Prints one red sentence to stderr, whatever line breaks `message` has."""
    console = Console(stderr=True, highlight=False)
    console.print(f"{title}: {' '.join(message.split())}", style="bold red", markup=False, soft_wrap=True)


def reports_errors(command: Callable[..., Any]) -> Callable[..., Any]:
    """Gives a command `--debug` and turns user errors and interruptions into messages and exit codes."""

    @functools.wraps(command)
    def guarded(*args: Any, context: typer.Context, debug: bool = False, **kwargs: Any) -> Any:
        try:
            return command(*args, **kwargs)
        except (KeyboardInterrupt, Interrupted) as error:
            print_error(str(error) or "stopped by Ctrl-C", title="Interrupted")
            raise typer.Exit(EXIT_INTERRUPTED) from None
        except torch.OutOfMemoryError as error:
            if debug or context.obj:
                raise
            print_error(f"the GPU is out of memory; lower --batch-size or --sequence-length ({error})")
            raise typer.Exit(EXIT_ERROR) from None
        except USER_ERRORS as error:
            # With --debug at either place: lte --debug train, lte train --debug.
            if debug or context.obj or not str(error):
                raise
            print_error(str(error))
            raise typer.Exit(EXIT_ERROR) from None

    parameters = dict(inspect.signature(command, eval_str=True).parameters)
    parameters["debug"] = _keyword("debug", DebugOption, False)
    parameters["context"] = _keyword("context", typer.Context, inspect.Parameter.empty)
    guarded.__signature__ = inspect.Signature(list(parameters.values()))  # type: ignore[attr-defined]
    guarded.__annotations__ = {name: parameter.annotation for name, parameter in parameters.items()}
    return guarded


def _keyword(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
