"""Result records and files of `lte bench` among the same paths, told apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any

from lte.bench.rows import REQUIRED_FIELDS
from lte.eval.results import REQUIRED_FIELDS as RECORD_FIELDS
from lte.eval.results import check_result, read_json
from lte.report.records import Run, result_files, with_question_sets

_TIMES = ("median_ms", "p20_ms", "p80_ms")


@dataclass(frozen=True)
class Bench:
    """What one run of `lte bench` wrote.

    Attributes:
        content: `rows` at least.
        source: the file.
    """

    content: Mapping[str, Any]
    source: str


@dataclass(frozen=True)
class Inputs:
    """What paths hold.

    Attributes:
        runs: the result records.
        benches: the files of `lte bench`.
        skipped: files found in folders that are neither.
    """

    runs: list[Run]
    benches: list[Bench]
    skipped: list[str]


def load_inputs(paths: Sequence[str | Path]) -> Inputs:
    """The result records and the benchmarks of files and folders, which stand for files as `result_files` says.

    A JSON object with the required fields of a result record is one; one with `rows`, each with the required fields of
    a benchmark's row, is a benchmark.

    Raises:
        ValueError: for a path that does not exist, paths without any file, a file named among the paths that is
            neither, or a record or benchmark with a wrong value.
    """
    inputs = Inputs([], [], [])
    for file, is_named in result_files(paths).items():
        content = read_json(file) if is_named else _json_or_none(file)
        if isinstance(content, Mapping) and "rows" in content and (is_named or _has_bench_rows(content["rows"])):
            _check_rows(file, content["rows"])
            inputs.benches.append(Bench(content, str(file)))
        elif is_named or (isinstance(content, Mapping) and all(name in content for name in RECORD_FIELDS)):
            check_result(content, file)
            inputs.runs.extend(with_question_sets(Run(content, str(file))))
        else:
            inputs.skipped.append(str(file))
    return inputs


def _json_or_none(file: Path) -> Any:
    try:
        return read_json(file)
    except ValueError:
        return None


def _has_bench_rows(rows: Any) -> bool:
    return isinstance(rows, list) and all(
        isinstance(row, Mapping) and all(name in row for name in REQUIRED_FIELDS) for row in rows
    )


def _check_rows(file: Path, rows: Any) -> None:
    if not isinstance(rows, list) or not all(isinstance(row, Mapping) for row in rows):
        raise ValueError(
            f"{file} must hold a list of objects in rows, got {type(rows).__name__}; give files of lte bench"
        )
    missing = sorted({name for row in rows for name in REQUIRED_FIELDS if name not in row})
    if missing:
        raise ValueError(
            f"{file} must hold {', '.join(REQUIRED_FIELDS)} in each row; missing: {', '.join(missing)}; "
            "give files of lte bench"
        )
    for row in rows:
        for name in _TIMES:
            if row[name] is not None and (not isinstance(row[name], Real) or isinstance(row[name], bool)):
                raise ValueError(
                    f"{file} must hold a number in {name}, got {name}={row[name]!r}; give files of lte bench"
                )
