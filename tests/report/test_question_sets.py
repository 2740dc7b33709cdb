"""Question sets in the record of a run: each is a record of its own to a report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lte.records import write_json_atomic
from lte.report.inputs import load_inputs
from lte.report.points import find_tradeoffs
from tests.report.sample_records import measurement, record

SCORE = {
    "metric": "acc",
    "value": 0.5,
    "metrics": {"acc": 0.5, "acc_norm": 0.25},
    "split": "test",
    "sparsity": 0.4,
    "flops_per_token": 2.0**29,
    "bytes_per_token": 2e6,
    "wall_time_s": 3.0,
    "config": {"num_fewshot": 5},
}


def write_run(folder: Path, method: str, **score: Any) -> None:
    own = {"config": {"dtype": "float32"}, "measurement": measurement().to_dict(), "latency_ms": 3.0}
    content = record(method, **own, harness={"mmlu_files": {**SCORE, **score}}, harness_note=None)
    write_json_atomic(folder / f"{method}.json", content)


def test_each_set_is_compared_by_its_own_numbers(tmp_path: Path) -> None:
    write_run(tmp_path, "dense", value=0.75, sparsity=0.0, flops_per_token=2.0**30)
    write_run(tmp_path, "lte")
    runs = load_inputs([tmp_path]).records
    assert [run.task for run in runs] == ["lm", "mmlu_files"] * 2
    _, questions = find_tradeoffs(runs)
    (point,) = questions.curves["lte"]
    assert (questions.task, questions.metric.name, questions.metric.higher_is_better) == ("mmlu_files", "acc", True)
    assert (point.value.mean, point.mean("sparsity"), questions.drop(point)) == (0.5, 0.4, 0.25)
    assert questions.share(point, "gflops") == 0.5
    # What is said of the model stays, what is said of the other text does not.
    found = point.records[0]
    assert (found["latency_ms"], found["config"]) == (3.0, {"dtype": "float32", "num_fewshot": 5})
    assert found.measurement is found.harness is None
    (by_norm,) = find_tradeoffs(runs, metric="acc_norm")
    assert by_norm.curves["lte"][0].value.mean == 0.25


def test_a_set_without_its_numbers_is_refused(tmp_path: Path) -> None:
    score = {name: value for name, value in SCORE.items() if name != "sparsity"}
    write_json_atomic(tmp_path / "lte.json", record(harness={"mmlu_files": score}))
    with pytest.raises(ValueError, match=r"lte.json must be a result record, .*missing: sparsity"):
        load_inputs([tmp_path])
