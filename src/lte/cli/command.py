"""What makes a function a command: its settings as flags, its errors as messages and exit codes.

A user's mistake is one red sentence, a bug is a traceback. Exit codes: 0 success, 1 an error that the message explains,
2 wrong usage of the command line, 130 interrupted.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Collection, Mapping
from typing import Annotated, Any

import torch
import typer
import yaml
from rich.console import Console
from transformers.utils import logging

from lte.settings import Setting, settings_of
from lte.train.objective import NonFiniteLossError

EXIT_ERROR, EXIT_INTERRUPTED = 1, 130
# What a user can cause and mend. A RuntimeError or a KeyError is a bug and keeps its traceback.
USER_ERRORS = (ValueError, OSError, NonFiniteLossError, yaml.YAMLError)

DebugOption = Annotated[bool, typer.Option("--debug", help="Show the full traceback of an error.")]
KernelsOption = Annotated[
    str,
    typer.Option(
        help="What computes an LTE model's FFNs: auto is the kernels where they can, off is plain PyTorch, int8 is the "
        "kernels on weights rounded to 8 bits.",
        metavar="auto|off|int8",
    ),
]


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
    keyword = inspect.Parameter.KEYWORD_ONLY
    parameters["debug"] = inspect.Parameter("debug", keyword, default=False, annotation=DebugOption)
    parameters["context"] = inspect.Parameter("context", keyword, annotation=typer.Context)
    guarded.__signature__ = inspect.Signature(list(parameters.values()))  # type: ignore[attr-defined]
    guarded.__annotations__ = {name: parameter.annotation for name, parameter in parameters.items()}
    return guarded


def quiet_transformers() -> None:
    """Leaves the terminal to our own messages and progress bars."""
    # Not set_verbosity_error, which makes Trainer print dicts in place of its progress bar.
    logging.set_verbosity_warning()
    logging.get_logger("transformers.trainer_utils").setLevel(logging.ERROR)
    logging.disable_progress_bar()


def takes_settings(
    groups: Mapping[type, str], only: Collection[str] | None = None
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator: every setting of `groups`, or those in `only`, becomes a flag of a command that takes `**given`.

    `given` holds the flags that were given and no others, so that a file or a default can fill the rest.
    """

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        settings = {name: each for name, each in settings_of(groups).items() if only is None or name in only}

        def with_flags(*args: Any, **values: Any) -> Any:
            for name, setting in settings.items():
                if setting.several:
                    # One value alone is no list, as in a YAML file; none at all is a flag that was not given.
                    found = values.get(name) or [None]
                    values[name] = found if len(found) > 1 else found[0]
            return command(*args, **{k: v for k, v in values.items() if v is not None or k not in settings})

        parameters = inspect.signature(command, eval_str=True).parameters.values()
        own = [p for p in parameters if p.kind is not inspect.Parameter.VAR_KEYWORD]
        flags = [_flag_parameter(setting) for setting in settings.values()]
        with_flags.__signature__ = inspect.Signature([*own, *flags])  # type: ignore[attr-defined]
        with_flags.__annotations__ = {p.name: p.annotation for p in [*own, *flags]}
        with_flags.__doc__, with_flags.__name__ = command.__doc__, command.__name__
        return with_flags

    return decorate


def _flag_parameter(setting: Setting) -> inspect.Parameter:
    name = f"{setting.flag}/--no-{setting.flag[2:]}" if setting.type is bool else setting.flag
    option = typer.Option(
        name,
        help=setting.help,
        metavar="|".join(setting.choices) or ("<str>..." if setting.several else None),
        show_default=str(setting.default) if setting.default not in (None, "", False) else False,
        rich_help_panel=setting.panel,
    )
    value_type: Any = list[setting.type] if setting.several else setting.type  # type: ignore[name-defined]
    annotation: Any = Annotated[value_type | None, option]
    return inspect.Parameter(setting.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)
