"""What makes a function a command: its settings as flags, its errors as messages and exit codes.

A user's mistake is one red sentence, a bug is a traceback. Exit codes: 0 success, 1 an error that the message explains,
2 wrong usage of the command line, 130 interrupted.

Commands check what they are given before they load torch, which takes seconds: the modules of this package import what
loads it inside functions.
"""

from __future__ import annotations

import difflib
import functools
import importlib
import inspect
import json
import math
import os
import sys
import traceback
from collections.abc import Callable, Collection, Mapping
from contextvars import ContextVar
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from lte.config import check_fraction
from lte.files import is_gguf, stay_offline_without_hub
from lte.hf.sparsity_curve import curve_of, describe_choice
from lte.settings import Setting, settings_of

TextToRead = Annotated[
    Path | None, typer.Option(help="UTF-8 text that the model reads; by default Python's help topics.")
]
"""The flag `--text` of commands that measure a model on any text."""
EXIT_ERROR, EXIT_INTERRUPTED = 1, 130
# What a user can cause and mend. A RuntimeError or a KeyError is a bug and keeps its traceback.
USER_ERRORS = (ValueError, OSError)
# The largest that numpy takes.
MAX_SEED = 2**32 - 1
# With --debug at either place: lte --debug train, lte train --debug.
_DEBUG = ContextVar("debug", default=False)
_GIVEN: ContextVar[frozenset[str]] = ContextVar("given", default=frozenset())

DebugOption = Annotated[bool, typer.Option("--debug", help="Show the full traceback of an error.")]
KernelsOption = Annotated[
    str,
    typer.Option(
        help="What computes an LTE model's FFNs: auto is the kernels where they can, off is plain PyTorch, int8 is the "
        "kernels on weights rounded to 8 bits.",
        metavar="auto|off|int8",
    ),
]

TargetOption = Annotated[
    float | None,
    typer.Option(
        help="Run an LTE folder at this sparsity, by the curve over its threshold that `lte calibrate` has it remember."
    ),
]


class Interrupted(Exception):
    """Ctrl-C, with a message that says how to go on."""


def print_error(message: str, title: str = "Error", style: str = "bold red") -> None:
    """Prints one red sentence to stderr, whatever line breaks `message` has."""
    console = Console(stderr=True, highlight=False)
    console.print(f"{title}: {' '.join(message.split())}", style=style, markup=False, soft_wrap=True)


def reports_errors(command: Callable[..., Any]) -> Callable[..., Any]:
    """Gives a command `--debug` and turns user errors and interruptions into messages and exit codes."""

    @functools.wraps(command)
    def guarded(*args: Any, context: typer.Context, debug: bool = False, **kwargs: Any) -> Any:
        _DEBUG.set(debug or bool(context.obj))
        sources = {name: context.get_parameter_source(name) for name in context.params}
        _GIVEN.set(frozenset(name for name, source in sources.items() if source and source.name == "COMMANDLINE"))
        try:
            for name, value in kwargs.items():
                if isinstance(value, float) and not math.isfinite(value):
                    raise ValueError(f"{name} must be a finite number, got {name}={value}")
            return command(*args, **kwargs)
        except (KeyboardInterrupt, Interrupted) as error:
            print_error(str(error) or "stopped by Ctrl-C", title="Interrupted")
            raise typer.Exit(EXIT_INTERRUPTED) from None
        except Exception as error:
            message = explanation(error)
            _end_launch(error)
            if message is None or _DEBUG.get():
                raise
            print_error(message)
            raise typer.Exit(EXIT_ERROR) from None

    parameters = dict(inspect.signature(command, eval_str=True).parameters)
    keyword = inspect.Parameter.KEYWORD_ONLY
    parameters["debug"] = inspect.Parameter("debug", keyword, default=False, annotation=DebugOption)
    parameters["context"] = inspect.Parameter("context", keyword, annotation=typer.Context)
    guarded.__signature__ = inspect.Signature(list(parameters.values()))  # type: ignore[attr-defined]
    guarded.__annotations__ = {name: parameter.annotation for name, parameter in parameters.items()}
    return guarded


def _end_launch(error: Exception) -> None:
    """Of several processes that a launcher started the others wait for one that fails."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        from lte.train.processes import end_for_all

        end_for_all(error)


def given_flags() -> frozenset[str]:
    """Names of what the command at hand was given on its line, also where it has the value that it has by default."""
    return _GIVEN.get()


def explanation(error: Exception) -> str | None:
    """What to tell the user of an error that a user can cause and mend, `None` of a bug."""
    # An error of a module can only come where that is loaded.
    torch, objective = sys.modules.get("torch"), sys.modules.get("lte.train.objective")
    memory = sys.modules.get("lte.train.memory")
    if memory is not None and isinstance(error, memory.TrainingMemoryError):
        return str(error)
    if torch is not None and isinstance(error, torch.OutOfMemoryError):
        return f"the GPU is out of memory; lower --batch-size or --sequence-length ({error})"
    known = USER_ERRORS if objective is None else (*USER_ERRORS, objective.NonFiniteLossError)
    return (str(error) or None) if isinstance(error, known) else None


def after_saving(kept: str, what: str, again: str | None, step: Callable[[], Any]) -> Any:
    """Does what follows once a model is saved; if it fails, a warning says that the model is there.

    Args:
        kept: what is saved and where, for the message.
        what: fails, for the message.
        again: the command that does it again, `None` where there is none.
        step: does it.

    Returns:
        What `step` returns, `None` if it failed.
    """
    try:
        return step()
    except Exception as error:
        if _DEBUG.get():
            traceback.print_exc()
        reason = explanation(error) or f"{type(error).__name__}: {error}"
        repeat = f"; to do that again: {again}" if again else ""
        print_error(f"{kept}, but {what} failed: {reason}{repeat}", "Warning", "yellow")
        return None


def check_model(name: str, value: str) -> dict[str, Any]:
    """Refuses a path of a model that is none, before anything is loaded.

    Args:
        name: what the message calls it.
        value: hub name, folder or GGUF file.

    Returns:
        What the folder's config.json holds, nothing where that is not here or cannot be read, which loading explains.

    Raises:
        ValueError: if a path does not exist, or is a folder without a config.
    """
    path = Path(value).expanduser()
    if not path.exists():
        if value.startswith((".", "/", "~")) or is_gguf(path) or value.count("/") > 1 or not value.strip():
            beside = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
            near = difflib.get_close_matches(path.name, beside, n=2)
            hint = f" (did you mean {' or '.join(str(path.with_name(one)) for one in near)}?)" if near else ""
            raise ValueError(f"{name} must be a hub name, folder or GGUF file, got {value}, which does not exist{hint}")
        stay_offline_without_hub()
        return {}
    if path.is_file():
        if not is_gguf(path):
            raise ValueError(
                f"{name} must be a hub name, folder or GGUF file, got {value}, a file of another kind; give the folder "
                "that it lies in"
            )
        return {}
    if not (path / "config.json").exists():
        if (path / "adapter_config.json").exists():
            raise ValueError(
                f"{name} must be a whole model, got {value}, an adapter of peft; merge it into its base "
                "(merge_and_unload) and save that, or give the folder that lte train wrote around it"
            )
        raise ValueError(f"{name} must be a folder with a config.json, got {value}, which has none")
    try:
        found = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def check_target(target_sparsity: float | None, settings: Mapping[str, Any]) -> None:
    """Refuses a target that a model cannot be moved to, before anything is loaded.

    Args:
        target_sparsity: `None` moves nothing.
        settings: what `check_model` returned; nothing of a model on the hub, which loading then looks at.

    Raises:
        ValueError: for a model of another kind, one without a curve, or a target that is not on it.
    """
    if target_sparsity is None:
        return
    check_fraction("target_sparsity", target_sparsity)
    if settings:
        curve_of(settings).at_target(target_sparsity)


def move_to_target_(model: Any, target_sparsity: float | None) -> None:
    """Runs a loaded model at a target, and says on stderr what results from it.

    Raises:
        ValueError: as `check_target`.
    """
    if target_sparsity is None:
        return
    from lte.hf.threshold import set_sparsity_

    set_sparsity_(model, target_sparsity)
    typer.echo(describe_choice(model.config), err=True)


def check_seed(name: str, value: int) -> None:
    """Raises a `ValueError` for a seed that a random generator does not take."""
    if not 0 <= value <= MAX_SEED:
        raise ValueError(f"{name} must lie in [0, {MAX_SEED}], got {name}={value}")


def check_folder(name: str, value: str | None) -> None:
    """Raises a `ValueError` unless a folder that was given exists."""
    if value is not None and not Path(value).expanduser().is_dir():
        raise ValueError(f"{name} must be an existing folder, got {name}={value}")


def utf8(name: str, value: str) -> str:
    """A text of the command line as it was typed, in whatever locale.

    Raises:
        ValueError: if it is not UTF-8.
    """
    try:
        value.encode()
        return value
    except UnicodeEncodeError:
        pass
    try:
        # Python keeps bytes that the locale does not know as surrogates.
        return os.fsencode(value).decode()
    except UnicodeError:
        raise ValueError(f"{name} must be UTF-8 text, got {name}={value!a}") from None


def read_text_file(name: str, path: str | Path) -> str:
    """The text of a UTF-8 file, without a byte order mark.

    Raises:
        ValueError: for a file that does not exist or is not UTF-8.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise ValueError(f"{name} must be an existing text file, got {path}")
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} must be UTF-8 text, got {path}: {error}") from error


def read_template(name: str) -> str:
    """A chat template that compiles.

    Raises:
        ValueError: for a missing file, one that is not UTF-8, and one that is no Jinja template.
    """
    from jinja2 import TemplateSyntaxError
    from transformers.utils.chat_template_utils import _compile_jinja_template

    template = read_text_file("chat_template", name)
    try:
        _compile_jinja_template(template)
    except TemplateSyntaxError as error:
        raise ValueError(
            f"chat_template must be a Jinja template, got chat_template={name} with an error in line {error.lineno}: "
            f"{error.message}"
        ) from error
    return template


def quiet_transformers() -> None:
    """Loads transformers with our model classes, and leaves the terminal to our own messages and progress bars."""
    from transformers.utils import logging

    # Registers them, which `import lte` does for everybody but the command.
    importlib.import_module("lte.methods")
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
