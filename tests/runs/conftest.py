"""Tiny comparisons: a random BERT on a made-up MRPC, a random Llama on made-up text."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from lte.hf.dense import load_tokenizer
from lte.records import load_records
from lte.runs.folders import Folders
from lte.runs.plan import plan_runs
from lte.runs.runner import Runner
from lte.runs.settings import read_comparison
from lte.runs.workload import Workloads
from tests.cli.conftest import save_tiny_model
from tests.data.tasks.made_up import BAD, GOOD, write
from tests.tiny_models import EXPERT_SIZE

# A run of about a second: 2 + 2 steps of 8 rows.
SMALL = {
    "batch_size": 8,
    "sequence_length": 48,
    "learning_rate": 1e-3,
    "expert_size": EXPERT_SIZE,
    "router_fit_tokens": 256,
    "calibration_tokens": 512,
    "logging_steps": 2,
    "report_to": "none",
}
BUDGET = {"stage1_steps": 2, "stage2_steps": 2}
# Of a record, beyond those of `lte eval`.
FIELDS = {
    *("metrics", "weight_sparsity", "method_config", "measurement", "label", "group", "command", "data_sha256", "eta"),
    *("layer_history", "peak_memory_bytes", "latency_ms", "latency_p20_ms", "latency_p80_ms", "latency_dense_ms"),
    *("latency_sparsity", "latency_note"),
}


def write_mrpc(folder: Path) -> Path:
    """MRPC in which a word gives the label away."""
    rows = [
        f"{label}\t{i}\t{i}\t{text}\t{GOOD[i % 3]}"
        for i in range(8)
        for label, texts in enumerate((BAD, GOOD))
        for text in texts
    ]
    header = "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String"
    write(folder / "train.tsv", header, *rows)
    write(folder / "dev.tsv", header, *rows[:16])
    return folder


def write_comparison(path: Path, **content: Any) -> Path:
    """The YAML file of a small comparison."""
    whole = {"seeds": [0], "sparsities": [0.5], "start": BUDGET, "train": BUDGET, **content}
    path.write_text(yaml.safe_dump({**whole, "defaults": {**SMALL, **content.get("defaults", {})}}), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny dense BERT with a tokenizer."""
    return save_tiny_model(tmp_path_factory.mktemp("models") / "bert", "bert")


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny dense Llama with a tokenizer."""
    return save_tiny_model(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with MRPC."""
    folder = tmp_path_factory.mktemp("data")
    write_mrpc(folder / "MRPC")
    return folder


@pytest.fixture
def mrpc(tmp_path: Path, bert: Path, data_dir: Path) -> Callable[..., Path]:
    """Writes the file of a comparison on MRPC."""

    def write_file(*methods: Any, **content: Any) -> Path:
        values = {"task": "mrpc", "model": str(bert), "data_dir": str(data_dir), "methods": list(methods)}
        return write_comparison(tmp_path / "mrpc.yaml", **values, **content)

    return write_file


def runner_of(file: Path, folder: Path, *only: str, phase: str = "both", **overrides: Any) -> tuple[Runner, list[str]]:
    """What does the runs of a file, and the lines that it says."""
    comparison = read_comparison(file, **overrides)
    lines: list[str] = []
    workloads = Workloads(comparison.model, load_tokenizer(comparison.model), comparison.eval_batch_size)
    folders = Folders(folder / "records", folder / "work")
    return Runner(comparison, plan_runs(comparison), folders, workloads, only, lines.append, phase), lines


def records_of(folder: Path) -> dict[str, dict[str, Any]]:
    """The records of a comparison by the names of their runs."""
    records = load_records(folder / "records")
    return {f"{r['label']}-{r['target_sparsity']:g}-seed{r['seed']}": r for r in records}
