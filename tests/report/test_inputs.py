"""Records and benchmarks among the same files, and question sets in records."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lte.files import write_json_atomic
from lte.report.inputs import load_inputs
from lte.report.points import find_tradeoffs
from tests.report.sample_benches import bench_content, bench_row
from tests.report.sample_records import measurement, record


def test_records_and_benchmarks_are_told_apart(tmp_path: Path) -> None:
    write_json_atomic(tmp_path / "a.json", record())
    write_json_atomic(tmp_path / "b.json", bench_content())
    write_json_atomic(tmp_path / "c.json", bench_content(rows=[]))
    inputs = load_inputs([tmp_path])
    runs, benches = inputs.records, inputs.benches
    assert [run.source for run in runs] == [str(tmp_path / "a.json")]
    assert runs[0] == record()
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
def test_other_files_that_are_named_are_refused(tmp_path: Path, content: Any, message: str) -> None:
    write_json_atomic(tmp_path / "x.json", content)
    with pytest.raises(ValueError, match=message):
        load_inputs([tmp_path / "x.json"])


def test_a_file_without_json_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(ValueError, match=r"x\.json must hold JSON, got a file that does not"):
        load_inputs([tmp_path / "x.json"])


def write_records(folder: Path, *names: str) -> None:
    for name in names:
        write_json_atomic(folder / f"{name}.json", record(label=name))


def test_a_folder_stands_for_all_files_below_it(tmp_path: Path) -> None:
    write_records(tmp_path, "b", "a", "older/c", "older/oldest/d", ".cache/e", ".hidden")
    assert labels([tmp_path]) == ["a", "b", "older/c", "older/oldest/d"]
    assert labels([tmp_path / "older" / "oldest"]) == ["older/oldest/d"]
    assert labels([tmp_path / "b.json", tmp_path, tmp_path / "older"]) == ["b", "a", "older/c", "older/oldest/d"]


def labels(paths: list[Path]) -> list[str]:
    return [each.label for each in load_inputs(paths).records]


def test_other_files_in_a_folder_are_skipped_and_named(tmp_path: Path) -> None:
    write_records(tmp_path, "a")
    others = {"clusters": {"clusters": 3}, "list": [1], "rows": {"rows": 3}, "training": {"rows": [{"step": 1}]}}
    for name, content in others.items():
        write_json_atomic(tmp_path / f"{name}.json", content)
    (tmp_path / "broken.json").write_text("{")
    inputs = load_inputs([tmp_path])
    assert len(inputs.records) == 1
    assert inputs.skipped == [str(tmp_path / f"{name}.json") for name in sorted([*others, "broken"])]
    with pytest.raises(ValueError, match=r"clusters\.json must be a result record"):
        load_inputs([tmp_path, tmp_path / "clusters.json"])


def test_records_by_name_are_labelled_so(tmp_path: Path) -> None:
    content = {"dense": record("dense"), "sparse, untrained": record(value=90.0), "sparse": record()}
    write_json_atomic(tmp_path / "report.json", content)
    for path in (tmp_path, tmp_path / "report.json"):
        (tradeoff,) = find_tradeoffs(load_inputs([path]).records)
        assert list(tradeoff.curves) == ["sparse", "sparse, untrained"]
        assert [point.curve for point in tradeoff.dense] == ["dense"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({**record(), "sparsity": 2.0}, r"hold a share in \[0, 1\] in sparsity, got sparsity=2.0"),
        ({"rows": [bench_row("lte", "0.5", 0.5, 1.0, p20_ms="fast")]}, r"a number in p20_ms, got p20_ms='fast'"),
    ],
)
def test_a_wrong_value_is_refused_in_a_folder_too(tmp_path: Path, content: Any, message: str) -> None:
    write_json_atomic(tmp_path / "x.json", content)
    with pytest.raises(ValueError, match=message):
        load_inputs([tmp_path])


def test_paths_without_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"paths must hold at least one result record \(\*.json\), got none in"):
        load_inputs([tmp_path])
    with pytest.raises(ValueError, match=r"paths must be existing files or folders with result records, got .*missing"):
        load_inputs([tmp_path / "missing"])


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
