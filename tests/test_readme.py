"""The README's own commands run, on a tiny model in place of the one that it names."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from statistics import mean, stdev

import pytest
from typer.testing import CliRunner

import lte
from lte.records import load_records, read_folder
from lte_cli import app
from tests.cli.conftest import save_tiny_model

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
MODEL = "HuggingFaceTB/SmolLM2-135M"


# What makes a training small enough for a test.
SMALL = {"max_steps": 4, "per_device_train_batch_size": 4, "router_fit_tokens": 512, "calibration_tokens": 2048}


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def test_the_layout_is_for_readers_in_a_hurry():
    lines = README.splitlines()
    assert len(lines) <= 200
    assert max(map(len, lines)) <= 120
    assert lines.index("## Quick start") < 40
    start = blocks("python")[0]
    assert len(start.splitlines()) <= 20
    assert set(re.findall(r"^(?:from|import) ([\w.]+)", start, re.MULTILINE)) == {"datasets", "lte", "transformers"}


@pytest.fixture
def work_folder(tmp_path, monkeypatch):
    """A folder with a tiny model and a text, where the commands run."""
    monkeypatch.chdir(tmp_path)
    save_tiny_model(tmp_path / "tiny")
    lines = [json.dumps({"text": f"the river runs past house number {i} and on to the sea " * 8}) for i in range(64)]
    (tmp_path / "my-text.jsonl").write_text("\n".join(lines))
    # numba compiles the kernel for most of a minute, and on a busy machine for ten; tests/ops does that.
    monkeypatch.setattr("lte.ops.cpu._kernel", lambda: None)
    return tmp_path


def test_the_python_examples_run(work_folder):
    example = "\n".join(blocks("python"))
    # Only what makes it small enough for a test is changed.
    small = example.replace(MODEL, "./tiny").replace("max_length=512", "max_length=32")
    small = small.replace("target_sparsity=0.5", "target_sparsity=0.5, expert_size=8")
    settings = ", ".join(f"{name}={value}" for name, value in SMALL.items())
    small = small.replace("num_train_epochs=2", settings)
    assert small.count("./tiny") == 2
    assert small.count(settings) == 1
    names: dict[str, object] = {}
    exec(small, names)
    assert lte.sparse_ffns(names["model"])
    assert lte.is_accelerated(names["model"])
    assert names["ids"].shape[1] > 20


def test_the_shell_example_runs(work_folder):
    commands = [line for block in blocks("bash") for line in block.splitlines() if line.startswith("lte ")]
    assert [shlex.split(line)[1] for line in commands] == ["train", "eval", "inspect", "generate"]
    for line in commands:
        arguments = shlex.split(line.replace(MODEL, "./tiny"))[1:]
        if arguments[0] in ("train", "eval"):
            arguments += ["--sequence-length", "32", "--max-validation-tokens", "512"]
        if arguments[0] == "train":
            arguments += ["--expert-size", "8", "--stage1-steps", "4", "--stage2-steps", "4"]
            arguments += ["--router-fit-tokens", "512", "--calibration-tokens", "2048"]
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 0, (line, result.output, result.stderr)


def test_every_figure_of_the_results_table_is_in_a_result_file():
    rows = re.findall(r"\| [^|]* \| ([\d.]+)% \| (\d+)M \| ([\d.]+) \| ([\d.]+) \|", README)
    assert len(rows) >= 4
    records = load_records(ROOT / "results" / "wikipedia", "*-wikipedia_valid.json")
    dense = min(record["value"] for record in records if record["method"] == "dense")
    found = {
        (
            f"{100 * r['sparsity']:.1f}",
            f"{r['tokens_trained'] / 1e6:.0f}",
            f"{r['value']:.2f}",
            f"{r['value'] / dense:.2f}",
        )
        for r in records
    }
    for sparsity, tokens, value, ratio in rows:
        assert (f"{float(sparsity):.1f}", tokens, value, ratio) in found


def records_of(name: str) -> list[dict]:
    return json.loads((ROOT / "results" / name).read_text())["rows"]


def ratios(rows: list[dict], dense: float) -> list[str]:
    """The fastest time at each sparsity over the dense one."""
    found = []
    for sparsity in (0.0, 0.5, 0.8, 0.9):
        times = [row["median_ms"] for row in rows if abs(float(row["sparsity"]) - sparsity) < 0.02]
        found.append(f"{min(times) / dense:.2f}" if times else "-")
    return found


def test_every_figure_of_the_speed_tables_is_in_a_result_file():
    def row_of(name: str, source: str | None = None) -> list[str]:
        (figures,) = re.findall(rf"^\| {re.escape(name)} \| (.*) \|$", README, re.MULTILINE)
        gpu, *found = figures.split(" | ")
        if source is None:
            return [gpu, *found]
        assert gpu in json.loads((ROOT / "results" / source).read_text())["hardware"]
        return found

    def dense(rows: list[dict]) -> float:
        return min(row["median_ms"] for row in rows if row["provider"].startswith("dense"))

    one, many = "bench/llama2_7b_ffn_h100.json", "prefill.json"
    for source, batch, provider, name in (
        (one, 1, "lte", "FFN, 1 token, router included"),
        (one, 1, "PyTorch indexing", "the same by PyTorch indexing"),
    ):
        of_batch = [row for row in records_of(source) if row["batch"] == batch]
        found = [row for row in of_batch if row["provider"] == provider]
        by_setting = [{**row, "sparsity": row["setting"]} for row in found]
        assert row_of(name, source) == ratios(by_setting, dense(of_batch))
    for source, name in ((many, "7B"), ("prefill_smollm2.json", "135M")):
        prefill = [row for row in records_of(source) if row["tokens"] == 2048]
        independent = [row for row in prefill if row.get("routing") == "independent"]
        found = ratios(independent, dense(prefill))
        assert row_of(f"{name}, FFNs of a prompt of 2048 tokens", source) == found
    step = "bench/llama2_7b_decode_h100.json"
    compiled = [
        {**row, "sparsity": row["setting"]} for row in records_of(step) if row["provider"] == "lte compiled, tuned"
    ]
    beside = "decoding step, compiled, over the one timed beside it"
    assert row_of(beside, step) == ratios(compiled, dense(records_of(step)))
    log = (ROOT / "results" / "bench" / "llama2_7b_decode_two_tunings_h100.txt").read_text()
    fastest = min(float(ms) for ms in re.findall(r"compiled dense compiled, tuned for batch 1: ([0-9.]+) ms", log))
    assert fastest < dense(records_of(step))
    any_run = "7B, decoding one text"
    assert row_of(any_run, step) == ratios(compiled, fastest)
    for source, name in (
        ("bench/llama2_7b_decode_batch_4_h100.json", "7B, decoding 4 texts at once"),
        ("bench/smollm2_50_h100.json", "135M, decoding one text"),
    ):
        steps = [row for row in records_of(source) if row["benchmark"] == "decode"]
        forced = [
            {**row, "sparsity": row["setting"]}
            for row in steps
            if row["provider"] == "lte compiled" and row["routing"] != "own"
        ]
        assert row_of(name, source) == ratios(forced, dense(steps))
    launches = "step/h200.json"
    for shape, name in (
        ("llama2-7b", "7B, one text, a whole step in one launch, over itself with all on"),
        ("qwen2.5-1.5b", "1.5B, the same"),
        ("smollm2-135m", "135M, the same"),
    ):
        of_shape = [row for row in records_of(launches) if row["shape"] == shape]
        (base,) = [row["median_ms"] for row in of_shape if row["provider"] == "step dense"]
        assert f"{base:.2f}" in README
        steps = [row for row in of_shape if row["provider"] == "step"]
        assert row_of(name, launches) == ratios(steps, base)
    cpu = [row for row in records_of("cpu_decode.json") if row["benchmark"] == "decode"]
    for dtype in ("float32", "bfloat16"):
        rows = [row for row in cpu if row["dtype"] == dtype]
        sparse = [row for row in rows if row["provider"] == "sparse"]
        where, *figures = row_of(f"135M, decoding one text, {dtype}")
        assert (where, figures) == ("two CPU cores", ratios(sparse, dense(rows)))


def test_every_figure_of_the_tasks_table_is_in_a_result_file():
    tasks = ("e2e", "dialogsum", "sst2", "mrpc", "rte", "cola", "stsb")

    def column(task: str, label: str, field: str) -> str:
        values = [record[field] for record in load_records(ROOT / "results/compare" / task, f"{label}-seed*.json")]
        assert len(values) == 3
        if field == "sparsity":
            return f"{100 * mean(values):.1f}%"
        if task in tasks[:2]:
            return f"{mean(values):.3f} ± {stdev(values):.3f}"
        return f"{100 * mean(values):.1f} ± {100 * stdev(values):.1f}"

    (table,) = re.findall(r"^\| \| E2E \|.*\n(?:\|.*\n)+", README, re.MULTILINE)
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]
    expected = [
        [name, *(column(task, label, field) for task in tasks)]
        for name, label, field in (
            ("dense, the start", "dense-start-0", "value"),
            ("dense, trained on", "dense-0", "value"),
            ("LTE, target 80%", "lte-0.8", "value"),
            ("sparsity, measured", "lte-0.8", "sparsity"),
            ("LTE, target 90%", "lte-0.9", "value"),
            ("sparsity, measured", "lte-0.9", "sparsity"),
            ("static pruning 80%", "static_pruning-0.8", "value"),
            ("static pruning 90%", "static_pruning-0.9", "value"),
        )
    ]
    assert rows == expected


def test_the_readme_names_only_files_that_exist():
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target


def test_results_say_where_they_come_from():
    for path, record in read_folder(ROOT / "results").items():
        assert re.fullmatch(r"[0-9a-f]{40}", record["git_commit"] or ""), path
        assert record["hardware"], path
        assert record["versions"]["torch"], path
