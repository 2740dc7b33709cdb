"""Result records and files of `lte bench` among the same paths, told apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from pathlib import Path
from typing import Any

from lte.bench.rows import REQUIRED_FIELDS as ROW_FIELDS
from lte.records import PACKED_FILE, REQUIRED_FIELDS, ResultRecord, read_folder, read_json, read_packed

_TIMES = ("median_ms", "p20_ms", "p80_ms")
# What a record says of its own task, and not of its question sets.
_OF_THE_MAIN_TASK = (
    *("harness", "harness_note", "metric", "value", "metrics", "split", "measurement", "layer_history"),
    *("sparsity", "weight_sparsity", "flops_per_token", "bytes_per_token", "tokens_evaluated", "wall_time_s"),
)


@dataclass(frozen=True)
class Bench:
    """What one run of `lte bench` wrote, `rows` at least, and into which file."""

    content: Mapping[str, Any]
    source: str


@dataclass(frozen=True)
class Inputs:
    """What paths hold; `skipped` are the files found in folders that are neither."""

    records: list[ResultRecord] = field(default_factory=list)
    benches: list[Bench] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)


def load_inputs(paths: Sequence[str | Path]) -> Inputs:
    """The result records and the benchmarks of files and folders.

    A folder stands for all files `*.json` and packed records in it and in the folders below, hidden ones left out; a
    `records.jsonl` for its records, and the name of a packed file for its record. A JSON object with the required
    fields of a result record is one; one that holds such by name, as `lte demo` writes, stands for them, labelled so;
    one with `rows`, each with the required fields of a benchmark's row, is a benchmark.

    Raises:
        ValueError: for a path that does not exist, paths without any file, a file named among the paths that is
            neither, or a record or benchmark with a wrong value.
    """
    inputs = Inputs()
    for file, (content, is_named) in _contents(paths).items():
        if isinstance(content, Mapping) and content and all(map(_is_record, content.values())):
            labelled = ({**each, "label": each.get("label") or name} for name, each in content.items())
            inputs.records.extend(ResultRecord.from_dict(each, str(file)) for each in labelled)
        elif isinstance(content, Mapping) and "rows" in content and (is_named or _has_bench_rows(content["rows"])):
            _check_rows(file, content["rows"])
            inputs.benches.append(Bench(content, str(file)))
        elif is_named or _is_record(content):
            inputs.records.extend(with_question_sets(ResultRecord.from_dict(content, str(file))))
        else:
            inputs.skipped.append(str(file))
    return inputs


def with_question_sets(record: ResultRecord) -> list[ResultRecord]:
    """A record of `lte compare`, and for each question set in it one that has this set for its task.

    Raises:
        ValueError: for a question set without what a result record must hold.
    """
    common = {name: value for name, value in record.items() if name not in _OF_THE_MAIN_TASK}
    found = [record]
    for name, score in (record.harness if isinstance(record.harness, Mapping) else {}).items():
        own = {**common, **score, "task": name, "config": {**record.config, **score.get("config", {})}}
        found.append(ResultRecord.from_dict(own, record.source))
    return found


def _contents(paths: Sequence[str | Path]) -> dict[Path, tuple[Any, bool]]:
    """What the files that paths stand for hold, and whether a path names the file.

    The content of a file in a folder that is no JSON is its error.
    """
    found: dict[Path, tuple[Any, bool]] = {}
    for path in map(Path, paths):
        packed = read_packed(path if path.name == PACKED_FILE else path.with_name(PACKED_FILE))
        if path.is_dir():
            found |= {file: (content, False) for file, content in read_folder(path).items() if file not in found}
        elif path.is_file() and path.name == PACKED_FILE:
            found |= {file: (content, True) for file, content in packed.items()}
        elif path.is_file():
            found[path] = (read_json(path), True)
        # Also a pattern that the shell found no files for.
        elif matching := [file for file in packed if file.match(path.name)]:
            found |= {file: (packed[file], True) for file in matching}
        else:
            raise ValueError(f"paths must be existing files or folders with result records, got {path}")
    if not found:
        names = ", ".join(map(str, paths)) or "no path"
        raise ValueError(f"paths must hold at least one result record (*.json), got none in {names}")
    return found


def _is_record(content: Any) -> bool:
    return isinstance(content, Mapping) and all(name in content for name in REQUIRED_FIELDS)


def _has_bench_rows(rows: Any) -> bool:
    return isinstance(rows, list) and all(isinstance(row, Mapping) and set(ROW_FIELDS) <= set(row) for row in rows)


def _check_rows(file: Path, rows: Any) -> None:
    hint = "; give files of lte bench"
    if not isinstance(rows, list) or not all(isinstance(row, Mapping) for row in rows):
        raise ValueError(f"{file} must hold a list of objects in rows, got {type(rows).__name__}{hint}")
    missing = sorted({name for row in rows for name in ROW_FIELDS if name not in row})
    if missing:
        raise ValueError(f"{file} must hold {', '.join(ROW_FIELDS)} in each row; missing: {', '.join(missing)}{hint}")
    for name, value in ((name, row[name]) for row in rows for name in _TIMES):
        if value is not None and (not isinstance(value, Real) or isinstance(value, bool)):
            raise ValueError(f"{file} must hold a number in {name}, got {name}={value!r}{hint}")
