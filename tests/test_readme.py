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


def speed_row(name: str, source: str) -> list[str]:
    """The figures of a row of the README, which names the hardware of its result file."""
    (figures,) = re.findall(rf"^\| {re.escape(name)} \| (.*) \|$", README, re.MULTILINE)
    where, *found = figures.split(" | ")
    hardware = json.loads((ROOT / "results" / source).read_text())["hardware"]
    assert where in (hardware if "NVIDIA" in hardware else f"two CPU cores: {hardware}")
    return found


def fastest_dense(rows: list[dict]) -> float:
    return min(row["median_ms"] for row in rows if row["provider"].startswith("dense"))


def test_whole_steps_of_the_speed_table_are_in_a_result_file():
    trained, shape = "step/h200_qwen_coder_1_5b.json", "step/h200_llama2_7b.json"
    forced = ("0.5", "0.8", "0.9")
    for source, settings, name in (
        (trained, ("own", "own@0.8", "own@0.9"), "Qwen2.5-Coder-1.5B, trained, its own routing"),
        (trained, forced, "the same folder, forced routing"),
        (shape, forced, "7B, random weights, forced routing"),
        ("step/h200_smollm2_135m.json", ("own", "own@0.8", "own@0.9"), "SmolLM2-135M, trained, its own routing"),
        ("bench/qwen_coder_0_5b_step_cpu.json", forced, "Qwen2.5-Coder-0.5B, bfloat16, forced routing"),
        ("bench/smollm2_135m_step_cpu.json", forced, "SmolLM2-135M, float32, forced routing"),
    ):
        first = [row for row in records_of(source) if row["batch"] == 1]
        rows = {row["setting"]: row for row in first if row["provider"] == "lte whole step"}
        (dense,) = [row for row in first if row["provider"] == "dense whole step"]
        expected = [f"{dense['ratio_to_dense']:.2f}"]
        for setting in settings:
            row = rows.get(setting)
            off = f" ({100 * row['sparsity']:.0f}%)" if row and setting.startswith("own") else ""
            expected.append(f"{row['ratio_to_dense']:.2f}{off}" if row else "-")
        assert [cell.replace("% off)", "%)") for cell in speed_row(name, source)] == expected
    for batch, ratio in ((1, "0.92"), (4, "1.05")):
        rows = records_of(f"step/h200_llama2_7b_32768_batch_{batch}.json")
        (half,) = [row for row in rows if row["provider"] == "lte whole step" and row["setting"] == "0.5"]
        assert f"{half['ratio_to_dense']:.2f}" == ratio
        assert ratio in README
    (llama_cpp,) = [row for row in records_of("bench/qwen_coder_0_5b_step_cpu.json") if row["provider"] == "llama.cpp"]
    assert f"llama.cpp takes {llama_cpp['ratio_to_dense']:.2f}" in README


def test_every_figure_of_the_other_speed_table_is_in_a_result_file():
    one = "bench/llama2_7b_ffn_h100.json"
    for provider, name in (
        ("lte", "7B, FFN, 1 token, router included"),
        ("PyTorch indexing", "the same by PyTorch indexing"),
    ):
        of_batch = [row for row in records_of(one) if row["batch"] == 1]
        by_setting = [{**row, "sparsity": row["setting"]} for row in of_batch if row["provider"] == provider]
        assert speed_row(name, one) == ratios(by_setting, fastest_dense(of_batch))
    for source, name in (("prefill.json", "7B"), ("prefill_smollm2.json", "135M")):
        prefill = [row for row in records_of(source) if row["tokens"] == 2048]
        independent = [row for row in prefill if row.get("routing") == "independent"]
        found = ratios(independent, fastest_dense(prefill))
        assert speed_row(f"{name}, FFNs of a prompt of 2048 tokens", source) == found
    for source, provider, name in (
        ("bench/llama2_7b_decode_h100.json", "lte compiled, tuned", "7B, decoding one text, compiled"),
        ("bench/llama2_7b_decode_batch_4_h100.json", "lte compiled", "7B, decoding 4 texts at once, compiled"),
    ):
        rows = [row for row in records_of(source) if row["benchmark"] == "decode"]
        forced = [{**row, "sparsity": row["setting"]} for row in rows if row["provider"] == provider]
        assert speed_row(name, source) == ratios(forced, fastest_dense(rows))


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
