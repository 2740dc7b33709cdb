"""Result records and files of `lte bench` among the same paths, told apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any

from lte.bench.rows import REQUIRED_FIELDS
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


def load_inputs(paths: Sequence[str | Path]) -> tuple[list[Run], list[Bench]]:
    """The result records and the benchmarks of files and folders, which stand for files as `result_files` says.

    A JSON object with `rows` is a benchmark, any other one a record.

    Raises:
        ValueError: for a path that does not exist, paths without any file, or a file that is neither.
    """
    runs, benches = [], []
    for file in result_files(paths):
        content = read_json(file)
        if isinstance(content, Mapping) and "rows" in content:
            _check_rows(file, content["rows"])
            benches.append(Bench(content, str(file)))
        else:
            check_result(content, file)
            runs += with_question_sets(Run(content, str(file)))
    return runs, benches


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
