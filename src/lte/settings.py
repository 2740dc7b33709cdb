"""Settings from dataclasses: each field is a key of a YAML file, and a flag of a command (`lte.cli.command`).

A field's help is its `help` metadata, or its entry under `Attributes:` in the docstring of its class. A name that
several classes have (`seed`) is one setting that goes to all of them.
"""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import re
import types
from collections.abc import Mapping
from dataclasses import Field, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml


def option(default: Any, text: str, affects: str = "weights") -> Any:
    """A field of a settings dataclass with its default and its help text.

    Args:
        default: of the field.
        text: what `--help` says.
        affects: what depends on it: the `weights` of any model, its `routing` alone, or `nothing` that is saved.
            Models that were made with other settings of a kind that counts are made anew.
    """
    return dataclasses.field(default=default, metadata={"help": HelpText(text, affects)})


class HelpText(str):
    """The help of a setting, which also knows what depends on it; parsers of transformers take no other metadata."""

    affects: str

    def __new__(cls, text: str, affects: str) -> HelpText:
        found = super().__new__(cls, text)
        found.affects = affects
        return found


@dataclass(frozen=True)
class Setting:
    """One field of one or more dataclasses.

    Attributes:
        name: as in the dataclass.
        type: str, int, float or bool.
        optional: whether `None` is a value.
        several: whether a list of values is one, too: in YAML a list, on the command line the flag once for each.
        choices: what a `Literal` allows, else empty.
        default: the field's default.
        help: a sentence or two.
        panel: heading under which `--help` lists it.
    """

    name: str
    type: type
    optional: bool
    several: bool
    choices: tuple[str, ...]
    default: Any
    help: str
    panel: str

    @property
    def flag(self) -> str:
        """The flag, without the underscore that keeps `lambda_` off Python's keyword."""
        return "--" + self.name.strip("_").replace("_", "-")

    def parse(self, value: Any, source: str) -> Any:
        """A value from YAML as the field's type; YAML reads `3e-4` as text, for example.

        Raises:
            ValueError: if it does not fit.
        """
        if value is None and self.optional:
            return None
        if self.several and isinstance(value, list):
            found = [replace(self, several=False).parse(one, source) for one in value]
            return found[0] if len(found) == 1 else found
        wanted = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}[self.type]
        wanted += " or a list" * self.several
        if self.type is bool and isinstance(value, bool):
            return value
        if self.type is str and isinstance(value, str | int | float) and not isinstance(value, bool):
            return str(value)
        if self.type in (int, float) and not isinstance(value, bool):
            try:
                number = float(value)
                if self.type is float or number.is_integer():
                    return self.type(number)
            except (TypeError, ValueError):
                pass
        raise ValueError(f"{self.name} must be {wanted}, got {self.name}={value!r} in {source}")


def settings_of(groups: Mapping[type, str]) -> dict[str, Setting]:
    """The settings of dataclasses by name; `groups` maps each class to its heading in `--help`."""
    found: dict[str, Setting] = {}
    for cls, panel in groups.items():
        hints, documented = get_type_hints(cls), documented_attributes(cls)
        for field in fields(cls):
            found.setdefault(field.name, _setting(field, hints[field.name], documented, panel))
    return found


def _setting(field: Field[Any], hint: Any, documented: Mapping[str, str], panel: str) -> Setting:
    union = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    hint = next(part for part in union if part is not type(None))
    choices = get_args(hint) if get_origin(hint) is Literal else ()
    return Setting(
        name=field.name,
        type=str if choices else hint,
        optional=type(None) in union,
        several=any(get_origin(part) is list for part in union),
        choices=choices,
        default=field.default,
        help=field.metadata.get("help") or documented.get(field.name, ""),
        panel=panel,
    )


def documented_attributes(cls: type) -> dict[str, str]:
    """The entries under `Attributes:` of a Google docstring, each as one sentence."""
    section = (inspect.getdoc(cls) or "").partition("Attributes:\n")[2]
    entries = re.findall(r"^    (\w+): (.*(?:\n      .*)*)", section, flags=re.MULTILINE)
    texts = {name: " ".join(text.split()).replace("`", "") for name, text in entries}
    return {name: text[:1].upper() + text[1:] for name, text in texts.items()}


def read_settings_file(path: Path, groups: Mapping[type, str]) -> dict[str, Any]:
    """The settings in a flat YAML file; dashes and underscores are the same.

    Raises:
        ValueError: for a missing file, one that is no mapping, an unknown key, or a value of the wrong type.
    """
    return parse_settings(read_mapping(path, "config"), groups, str(path))


def read_mapping(path: Path, name: str) -> dict[Any, Any]:
    """What a YAML file holds, which the messages call `name`.

    Raises:
        ValueError: for a missing file, or one that is no mapping.
    """
    if not path.is_file():
        raise ValueError(f"{name} must be an existing YAML file, got {name}={path}")
    content = yaml.safe_load(path.read_text()) or {}
    if not isinstance(content, dict):
        raise ValueError(f"{name} must hold `name: value` lines, got a {type(content).__name__} in {path}")
    return content


def parse_settings(content: Mapping[Any, Any], groups: Mapping[type, str], source: str) -> dict[str, Any]:
    """The settings in a mapping from a YAML file; dashes and underscores are the same.

    Args:
        content: keys and values as YAML has them.
        groups: as for `settings_of`.
        source: where they are from, for the messages.

    Raises:
        ValueError: for an unknown key, or a value of the wrong type.
    """
    settings = settings_of(groups)
    by_key = {name.strip("_"): setting for name, setting in settings.items()}
    values = {}
    for key, value in content.items():
        setting = by_key.get(str(key).replace("-", "_").strip("_"))
        if setting is None:
            near = difflib.get_close_matches(str(key), by_key, n=3)
            hint = f" (did you mean {' or '.join(near)}?)" if near else "; `lte train --help` lists them all"
            raise ValueError(f"every key of {source} must be a setting, got {key}{hint}")
        values[setting.name] = setting.parse(value, source)
    return values


def build(cls: type, values: Mapping[str, Any]) -> Any:
    """An instance of a dataclass from those of `values` that are its fields."""
    return cls(**{field.name: values[field.name] for field in fields(cls) if field.name in values})
