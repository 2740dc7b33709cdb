"""Settings from dataclasses: each field is a key of a YAML file, and a flag of a command (`lte.cli.command`).

A field's help is its `help` metadata, or its entry under `Attributes:` in the docstring of its class. A name that
several classes have (`seed`) is one setting that goes to all of them.
"""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import math
import re
import types
from collections.abc import Collection, Mapping
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
                if math.isfinite(number) and (self.type is float or number.is_integer()):
                    # Not of the float: it holds no whole numbers of 17 digits.
                    return value if self.type is int and isinstance(value, int) else self.type(number)
            except (TypeError, ValueError, OverflowError):
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
        near = difflib.get_close_matches(path.name, _names_beside(path), n=2)
        hint = f" (did you mean {' or '.join(str(path.with_name(one)) for one in near)}?)" if near else ""
        raise ValueError(f"{name} must be an existing YAML file, got {name}={path}{hint}")
    content = read_yaml(path) or {}
    if not isinstance(content, dict):
        raise ValueError(f"{name} must hold `name: value` lines, got a {type(content).__name__} in {path}")
    return content


def _names_beside(path: Path) -> list[str]:
    try:
        return [entry.name for entry in path.parent.iterdir()]
    except OSError:
        return []


def read_yaml(path: Path) -> Any:
    """What a YAML file holds, in UTF-8; a key that is there twice is a mistake.

    Raises:
        ValueError: for a file that is no YAML or has a key twice, with file and line.
    """
    try:
        return yaml.load(path.read_text(encoding="utf-8-sig"), Loader=_UniqueKeys)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} must be UTF-8 text: {error}; save it as UTF-8") from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f" in line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        what = ", ".join(part for part in (error.context, error.problem) if part)
        raise ValueError(f"{path} must be YAML, got an error{where}: {what}") from error
    except yaml.YAMLError as error:
        raise ValueError(f"{path} must be YAML: {error}") from error
    except RecursionError:
        raise ValueError(f"{path} must be YAML of a few levels, got one that is nested too deeply") from None


class _UniqueKeys(yaml.SafeLoader):
    """YAML whose mappings hold each key once; PyYAML takes the last one silently."""

    def compose_mapping_node(self, anchor: Any) -> Any:
        node = super().compose_mapping_node(anchor)
        lines: dict[tuple[str, Any], int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            name, line = (key.tag, key.value), key.start_mark.line + 1
            if name in lines:
                problem = f"the key {key.value} is there twice, first in line {lines[name]}; leave one of them out"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
            lines[name] = line
        return node


def parse_settings(
    content: Mapping[Any, Any], groups: Mapping[type, str], source: str, others: Collection[str] = ()
) -> dict[str, Any]:
    """The settings in a mapping from a YAML file; dashes and underscores are the same.

    Args:
        content: keys and values as YAML has them.
        groups: as for `settings_of`.
        source: where they are from, for the messages.
        others: names that may have been meant where one is unknown.

    Raises:
        ValueError: for an unknown key, or a value of the wrong type.
    """
    settings = settings_of(groups)
    by_key = {name.strip("_"): setting for name, setting in settings.items()}
    values = {}
    for key, value in content.items():
        setting = by_key.get(str(key).replace("-", "_").strip("_"))
        if setting is None:
            near = difflib.get_close_matches(str(key), [*by_key, *others], n=3)
            hint = f" (did you mean {' or '.join(near)}?)" if near else "; `lte train --help` lists them all"
            raise ValueError(f"every key of {source} must be a setting, got {key}{hint}")
        if setting.name in values:
            raise ValueError(
                f"{source} must hold every setting once, got {setting.name} twice, with - and _ in its name"
            )
        values[setting.name] = setting.parse(value, source)
    return values


def build(cls: type, values: Mapping[str, Any]) -> Any:
    """An instance of a dataclass from those of `values` that are its fields."""
    return cls(**{field.name: values[field.name] for field in fields(cls) if field.name in values})
