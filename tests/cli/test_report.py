"""`lte report` on folders of records."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lte.files import write_json_atomic
from tests.report.sample_benches import bench_content
from tests.report.sample_records import record
from tests.report.test_report_page import held_data

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "results"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two tasks: one with a sweep over the size of experts, and a diverged run; one with another metric."""
    sizes = [record(config={"lte": {"expert_size": size}}, value=20.0 + size, seed=size) for size in (8, 16)]
    records = [record("dense"), *sizes, record("cats", value=None)]
    records += [
        record(name, task="sst2", metric="accuracy", value=0.9, metrics={"f1": 0.8}) for name in ("dense", "lte")
    ]
    for place, each in enumerate(records):
        write_json_atomic(tmp_path / "results" / f"{place}.json", each)
    return tmp_path / "results"


def test_tables_and_sentences_are_printed(run: Callable[..., Any], folder: Path) -> None:
    result = run("report", folder)
    assert result.exit_code == 0
    for part in ("lm, test: tiny", "32.00 ± 5.66", "Reference, the best: dense", "Failed runs", "sst2, test: tiny"):
        assert part in result.output
    assert "Fewest GFLOPs per token at a drop of at most 0.5 perplexity" in result.output
    assert "no other method was measured with that few" in result.output
    assert "Written" not in result.output


def test_output_writes_a_folder(run: Callable[..., Any], folder: Path, tmp_path: Path) -> None:
    result = run("report", folder, "--output", tmp_path / "out", "--task", "lm", "--drop", "3")
    assert result.exit_code == 0
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert written == {"report.md", "report.csv", "lm-test-perplexity.png"}
    assert "Written" in result.output
    assert "a drop of at most 3 perplexity" in (tmp_path / "out" / "report.md").read_text()
    assert "sst2" not in result.output


def test_a_field_makes_curves_of_its_own(run: Callable[..., Any], folder: Path) -> None:
    output = run("report", folder, "--by", "config.lte.expert_size").output
    assert "lte, expert_size=8" in output
    assert "lte, expert_size=16" in output


def test_another_metric_leaves_other_tasks_out(run: Callable[..., Any], folder: Path) -> None:
    output = run("report", folder, "--metric", "f1").output
    assert "0.8000" in output
    assert "lm, test" not in output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing"], "paths must be existing files or folders with result records, got missing"),
        (["{folder}", "--task", "sst"], "task must be one of lm, sst2, got task='sst' (did you mean sst2?)"),
        (["{folder}", "--metric", "em"], "metric must be one that a record has, got metric='em'"),
        (["{folder}", "--by", "config.lte.size"], "by must be one of config.lte.expert_size"),
        (["{folder}/../bench.json"], "RESULTS must hold at least one result record, got 1 files of lte bench, which"),
        (["{folder}/../others"], "RESULTS must hold at least one result record, got 1 other JSON files in"),
        (["{folder}", "{folder}/../others/x.json"], "x.json must be a result record"),
        (["{folder}/../odd.json"], "got metric=speed; declare it with --higher speed or --lower speed"),
    ],
)
def test_mistakes_are_explained(run: Callable[..., Any], folder: Path, arguments: list[str], message: str) -> None:
    write_json_atomic(folder.parent / "bench.json", bench_content())
    write_json_atomic(folder.parent / "others" / "x.json", {"clusters": 3})
    write_json_atomic(folder.parent / "odd.json", record(metric="speed"))
    result = run("report", *(argument.format(folder=folder) for argument in arguments))
    assert result.exit_code == 1
    assert message in result.stderr


def test_a_declared_metric_is_compared(run: Callable[..., Any], tmp_path: Path) -> None:
    write_json_atomic(tmp_path / "odd.json", record(metric="speed"))
    assert run("report", tmp_path, "--higher", "speed").exit_code == 0


def test_all_tracked_results_at_once(run: Callable[..., Any]) -> None:
    result = run("report", RESULTS)
    assert result.exit_code == 0
    text = " ".join(result.output.split())
    for part in ("14.82 ± 0.03", "best of 9 dense models: dense, name=dense-distilled", "lte, folder=fewer_articles"):
        assert part in text
    (skipped,) = (line for line in result.output.splitlines() if line.startswith("Skipped, "))
    names = skipped.partition(": ")[2].split(", ")
    assert str(RESULTS / "clustering.json") in names
    assert skipped.startswith(f"Skipped, {len(names)} JSON files without a result record")
    assert "files of lte bench, which --html shows" in text


def test_a_page_of_all_tracked_results(run: Callable[..., Any], tmp_path: Path) -> None:
    result = run("report", RESULTS, "--html", tmp_path / "report.html")
    assert result.exit_code == 0
    assert "which --html shows" not in result.output
    data = held_data((tmp_path / "report.html").read_text())
    curves = {point["curve"] for each in data["comparisons"] for point in each["points"]}
    assert {"lte, recipe=straight_through", "dense, folder=second_teacher"} <= curves
    assert any(bench["name"].endswith("(llama2_7b_decode_h100.json)") for bench in data["benches"])
    assert "lte grouped, same routing" in data["colours"]
    assert len(data["overview"]["rows"]) > 20


def test_the_tracked_results_of_wikipedia(run: Callable[..., Any]) -> None:
    result = run("report", RESULTS / "wikipedia")
    assert result.exit_code == 0
    assert "Skipped" not in result.output
    assert "lte, folder=first_recipe, name=lte-50-36M" in " ".join(result.output.split())


def test_the_documents_example_is_what_the_command_prints(run: Callable[..., Any]) -> None:
    text = (ROOT / "docs" / "report.md").read_text()
    output = run("report", RESULTS / "wikipedia" / "records.jsonl").output
    example = text.split("```text\n")[1].split("```")[0]
    assert example.strip()
    for line in example.strip().splitlines():
        assert " ".join(line.split()) in " ".join(output.split()), line


def test_a_page_takes_records_and_benchmarks(run: Callable[..., Any], folder: Path, tmp_path: Path) -> None:
    write_json_atomic(folder / "bench.json", bench_content())
    result = run("report", folder, "--html", tmp_path / "new" / "report.html", "--task", "lm")
    assert result.exit_code == 0
    assert "lm, test: tiny" in result.output
    assert "Written" in result.output
    data = held_data((tmp_path / "new" / "report.html").read_text())
    assert [each["title"] for each in data["comparisons"]] == ["lm, test: tiny, perplexity"]
    assert data["colours"]["dense eager"] == "dense"


def test_a_page_of_benchmarks_alone(run: Callable[..., Any], tmp_path: Path) -> None:
    write_json_atomic(tmp_path / "bench.json", bench_content())
    assert run("report", tmp_path / "bench.json", "--html", tmp_path / "report.html").exit_code == 0
    assert "dense eager" in (tmp_path / "report.html").read_text()


def test_files_of_which_tables_show_nothing_are_named(run: Callable[..., Any], folder: Path) -> None:
    write_json_atomic(folder / "bench.json", bench_content())
    write_json_atomic(folder / "below" / "clusters.json", {"clusters": 3})
    result = run("report", folder)
    assert result.exit_code == 0
    assert f"Not shown, 1 files of lte bench, which --html shows: {folder / 'bench.json'}\n" in result.output
    below = folder / "below" / "clusters.json"
    assert f"Skipped, 1 JSON files without a result record or rows of lte bench: {below}\n" in result.output
