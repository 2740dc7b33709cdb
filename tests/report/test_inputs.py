"""Records and benchmarks among the same files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lte.eval.results import write_json_atomic
from lte.report.inputs import load_inputs
from tests.report.sample_benches import bench_content, bench_row
from tests.report.sample_records import record


def test_records_and_benchmarks_are_told_apart(tmp_path: Path) -> None:
    write_json_atomic(tmp_path / "a.json", record())
    write_json_atomic(tmp_path / "b.json", bench_content())
    write_json_atomic(tmp_path / "c.json", bench_content(rows=[]))
    runs, benches = load_inputs([tmp_path])
    assert [run.source for run in runs] == [str(tmp_path / "a.json")]
    assert runs[0].record == record()
    assert [bench.source for bench in benches] == [str(tmp_path / name) for name in ("b.json", "c.json")]
    assert benches[0].content["rows"][1]["provider"] == "lte"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"rows": 3}, r"x\.json must hold a list of objects in rows, got int; give files of lte bench"),
        ({"rows": [{"provider": "lte"}]}, r"in each row; missing: batch, benchmark, .*; give files of lte bench"),
        ({"rows": [bench_row("lte", "0.5", 0.5, 1.0, p20_ms="fast")]}, r"a number in p20_ms, got p20_ms='fast'"),
        ({"clusters": 3}, r"x\.json must be a result record"),
        ([1], r"x\.json must be a result record, which must be a JSON object, got list"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, content: Any, message: str) -> None:
    write_json_atomic(tmp_path / "x.json", content)
    with pytest.raises(ValueError, match=message):
        load_inputs([tmp_path / "x.json"])


def test_a_file_without_json_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(ValueError, match=r"x\.json must hold JSON, got a file that does not"):
        load_inputs([tmp_path / "x.json"])
