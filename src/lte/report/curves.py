"""The curves of result records: their names, split where one would hold a target and a seed twice."""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lte.config import check_choice
from lte.records import ResultRecord

SETTINGS = ("label", "group", "tokens_trained", "method_config", "config")
"""Fields of a record that say what was run."""
FOLDER, FILE = "folder", "file"
# How the fields end that hold the name of a run.
_NAME = ".name"
# A setting whose text is longer is no part of a name.
_LONGEST = 32
Key = tuple[str, ...]


def curve_name(record: ResultRecord) -> str:
    """The curve of a record: its group, else its label, else its method."""
    return record.group or record.label or record.method


def curve_name_by(fields: Sequence[str], records: Sequence[ResultRecord]) -> Callable[[ResultRecord], str]:
    """Names curves by the method and the values of fields: `lte, expert_size=16`.

    A field that a record lacks, or that is the same in all records of its method, is no part of the name.

    Args:
        fields: dotted paths into the record: `config.lte.expert_size`.
        records: all records.

    Raises:
        ValueError: for a field that no record has.
    """
    known = {name for record in records for name, _ in flat_fields(record) if name.startswith(SETTINGS)}
    values: dict[tuple[str, str], set[str]] = defaultdict(set)
    for field in fields:
        if all(field_value(record, field) is None for record in records):
            check_choice("by", field, sorted(known))
        for record in records:
            values[record.method, field].add(field_text(field_value(record, field)))

    def name(record: ResultRecord) -> str:
        found = {field: field_value(record, field) for field in fields if len(values[record.method, field]) > 1}
        known = {field: value for field, value in found.items() if value is not None}
        parts = [f"{field.rpartition('.')[-1]}={field_text(value)}" for field, value in known.items()]
        return ", ".join([record.method, *parts])

    return name


def field_value(record: Mapping[str, Any], field: str) -> Any:
    """The value at a dotted path, `None` where there is none."""
    value: Any = record
    for name in field.split("."):
        value = value.get(name) if isinstance(value, Mapping) else None
    return value


def flat_fields(record: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """All fields that hold no object, by their dotted paths."""
    for name, value in record.items():
        if isinstance(value, Mapping):
            yield from flat_fields(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def field_text(value: Any) -> str:
    """A value as a part of a curve's name."""
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True)


@dataclass(frozen=True)
class _Member:
    """A record of a curve that may be split."""

    # The key and index of its name in the result.
    place: tuple[Key, int]
    # What no other record of its curve may have: the key, method, label, target, and seed.
    cell: tuple[Any, ...]
    # What may tell it apart: the folder, the settings, the file.
    facts: Mapping[str, str]


def told_apart(
    groups: Mapping[Key, Sequence[ResultRecord]], curve: Callable[[ResultRecord], str]
) -> dict[Key, list[str]]:
    """The name of each record's curve.

    A curve that holds the same key, method, label, target and seed twice is split, in all keys of its task and model
    alike: by folders if these differ, and in a folder by the settings that make the fewest curves, then by the file's
    name. A part is named as `lte, folder=first_recipe, grouping=kmeans`. What nothing tells apart keeps one name.

    Args:
        groups: records by what makes them comparable; the task, the split, and the model come first in a key.
        curve: the name of a record's curve before.

    Returns:
        Names by key, in the order of its records.
    """
    names = {key: [curve(record) for record in found] for key, found in groups.items()}
    together: dict[tuple[str, str, str], list[tuple[ResultRecord, Key, int]]] = defaultdict(list)
    for key, records in groups.items():
        task, _, model, *_ = key
        for index, record in enumerate(records):
            together[task, model, names[key][index]].append((record, key, index))
    for (_, _, name), found in together.items():
        # Of fields that differ alike the first is taken: names do not depend on the order of the records.
        found.sort(key=lambda each: (each[0].source, each[1:]))
        for member, fields in _split(_members(found)):
            key, index = member.place
            parts = [f"{each.rpartition('.')[-1]}={member.facts[each]}" for each in fields if member.facts.get(each)]
            names[key][index] = ", ".join([name, *parts])
    return names


def _members(places: Sequence[tuple[ResultRecord, Key, int]]) -> list[_Member]:
    files = [Path(record.source).absolute() for record, *_ in places]
    root = Path(os.path.commonpath([file.parent for file in files]))
    found = []
    for (record, key, index), file in zip(places, files, strict=True):
        folder = file.parent.relative_to(root).as_posix()
        settings = flat_fields({name: record[name] for name in SETTINGS})
        facts = {FOLDER: "" if folder == "." else folder}
        facts |= {name: field_text(value) for name, value in settings if value is not None}
        # What is read from a file has an ending; other sources are no names.
        facts |= {FILE: file.stem} if file.suffix else {}
        cell = (key, record.method, record.label, record.target_sparsity, record.seed)
        found.append(_Member((key, index), cell, facts))
    return found


def _split(members: Sequence[_Member], fields: tuple[str, ...] = ()) -> Iterator[tuple[_Member, tuple[str, ...]]]:
    """Each member with the fields that its name needs."""
    chosen = _choose(members)
    if chosen is None:
        yield from ((member, fields) for member in members)
        return
    parts: dict[str, list[_Member]] = defaultdict(list)
    for member in members:
        parts[member.facts.get(chosen, "")].append(member)
    for part in parts.values():
        yield from _split(part, (*fields, chosen))


def _choose(members: Sequence[_Member]) -> str | None:
    """The field to split by next; `None` where all members differ, or nothing tells more of them apart."""

    def count(*fields: str) -> int:
        return len({tuple(member.facts.get(name, "") for name in fields) for member in members})

    def apart(*fields: str) -> int:
        """How many members are told apart."""
        return len({(member.cell, *(member.facts.get(name, "") for name in fields)) for member in members})

    helping = [name for name in (FOLDER, *_settings(members), FILE) if apart(name) > apart()]
    whole = [name for name in helping if apart(name) == len(members) and name != FILE]
    if FOLDER in helping:
        # One setting may say it better than the folders of its values.
        return min(whole, key=count, default=FOLDER)
    # Names of runs tell everything apart, seeds as well: several settings may make fewer curves.
    several = [name for name in helping if not name.endswith(_NAME) and name != FILE]
    if apart(*several) == len(members) and count(*several) < min(map(count, whole), default=len(members) + 1):
        whole = several
    return min(whole, key=count, default=FILE if FILE in helping else None)


def _settings(members: Sequence[_Member]) -> list[str]:
    """Those that differ and are short: names before other texts before numbers."""
    found = {}
    for name in dict.fromkeys(name for member in members for name in member.facts):
        values = {member.facts.get(name, "") for member in members}
        if name not in (FOLDER, FILE) and len(values) > 1 and max(map(len, values)) <= _LONGEST:
            found[name] = values
    return sorted(found, key=lambda name: (not name.endswith(_NAME), all(map(_is_number, found[name]))))


def _is_number(text: str) -> bool:
    return not text or text.lstrip("-")[:1].isdigit()
