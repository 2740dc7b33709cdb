"""Settings as flags: each field of some dataclasses is one, and a key of the YAML file (`lte.settings`)."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Annotated, Any

import typer

from lte.settings import Setting, settings_of


def takes_settings(groups: Mapping[type, str]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator: every setting of `groups` becomes a flag of a command that takes `**given`.

    `given` holds the flags that were given and no others, so that a file or a default can fill the rest.
    """

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        settings = settings_of(groups)

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
    kind = inspect.Parameter.KEYWORD_ONLY
    return inspect.Parameter(setting.name, kind, default=None, annotation=annotation)
