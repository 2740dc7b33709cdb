"""Result records with the files that they come from, and the curves that they belong to."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lte.config import check_choice
from lte.eval.results import check_result

Record = Mapping[str, Any]
SETTINGS = ("label", "group", "tokens_trained", "method_config", "config")
"""Fields of a record that say what was run."""
# What a record says of its own task, and not of its question sets.
_OF_THE_MAIN_TASK = (
    *("harness", "harness_note", "metric", "value", "metrics", "split", "measurement", "layer_history"),
    *("sparsity", "weight_sparsity", "flops_per_token", "bytes_per_token", "tokens_evaluated", "wall_time_s"),
)


@dataclass(frozen=True)
class Run:
    """One result record.

    Attributes:
        record: its fields, those of `lte.eval.results.REQUIRED_FIELDS` at least.
        source: the file, or whatever else names the record.
    """

    record: Record
    source: str


def with_question_sets(run: Run) -> list[Run]:
    """A run of `lte compare`, and for each question set in its record one that has this set for its task.

    Raises:
        ValueError: for a question set without what a result record must hold.
    """
    sets = run.record.get("harness")
    if not isinstance(sets, Mapping):
        return [run]
    common = {name: value for name, value in run.record.items() if name not in _OF_THE_MAIN_TASK}
    found = [run]
    for name, score in sets.items():
        config = {**common["config"], **score.get("config", {})}
        record = {**common, **score, "task": name, "config": config}
        check_result(record, run.source)
        found.append(Run(record, run.source))
    return found


def result_files(paths: Sequence[str | Path]) -> dict[Path, bool]:
    """The files that paths stand for, and whether a path names the file itself.

    A folder stands for all files `*.json` in it and in the folders below, hidden ones left out.

    Raises:
        ValueError: for a path that does not exist, or paths without any file.
    """
    files: dict[Path, bool] = {}
    for path in map(Path, paths):
        if not path.exists():
            raise ValueError(f"paths must be existing files or folders with result records, got {path}")
        for file in [path] if path.is_file() else _files_below(path):
            files[file] = files.get(file, False) or path.is_file()
    if not files:
        names = ", ".join(map(str, paths)) or "no path"
        raise ValueError(f"paths must hold at least one result record (*.json), got none in {names}")
    return files


def _files_below(folder: Path) -> list[Path]:
    found = (file for file in folder.rglob("*.json") if file.is_file())
    return sorted(file for file in found if not any(part.startswith(".") for part in file.relative_to(folder).parts))


def curve_name(record: Record) -> str:
    """The curve of a record: its group, else its label, else its method."""
    return record.get("group") or record.get("label") or record["method"]


def curve_name_by(fields: Sequence[str], runs: Sequence[Run]) -> Callable[[Record], str]:
    """Names curves by the method and the values of fields: `lte, expert_size=16`.

    A field that a record lacks, or that is the same in all runs of its method, is no part of the name.

    Args:
        fields: dotted paths into the record: `config.lte.expert_size`.
        runs: all runs.

    Raises:
        ValueError: for a field that no run has.
    """
    known = {name for run in runs for name, _ in flat_fields(run.record) if name.startswith(SETTINGS)}
    values: dict[tuple[str, str], set[str]] = defaultdict(set)
    for field in fields:
        if all(field_value(run.record, field) is None for run in runs):
            check_choice("by", field, sorted(known))
        for run in runs:
            values[run.record["method"], field].add(field_text(field_value(run.record, field)))

    def name(record: Record) -> str:
        found = {field: field_value(record, field) for field in fields if len(values[record["method"], field]) > 1}
        known = {field: value for field, value in found.items() if value is not None}
        parts = [f"{field.rpartition('.')[-1]}={field_text(value)}" for field, value in known.items()]
        return ", ".join([record["method"], *parts])

    return name


def field_value(record: Record, field: str) -> Any:
    """The value at a dotted path, `None` where there is none."""
    value: Any = record
    for name in field.split("."):
        value = value.get(name) if isinstance(value, Mapping) else None
    return value


def flat_fields(record: Record, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """All fields that hold no object, by their dotted paths."""
    for name, value in record.items():
        if isinstance(value, Mapping):
            yield from flat_fields(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def field_text(value: Any) -> str:
    """A value as a part of a curve's name."""
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True)
