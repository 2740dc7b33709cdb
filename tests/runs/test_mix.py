"""A mix of texts through `lte train` and `lte compare`: measured by kind, from the model as it is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from lte.records import load_records
from lte.runs.plan import plan_runs
from lte.runs.runner import execute_all
from lte.runs.settings import read_comparison
from lte_cli import app
from tests.cli.conftest import save_tiny_model
from tests.runs.conftest import BUDGET, SMALL, runner_of, write_comparison


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    folder = tmp_path / "texts"
    folder.mkdir()
    for name, word in (("a", "apple"), ("b", "bread")):
        rows = [{"text": f"{word} {i} " * 20} for i in range(40)]
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    mix = {"apples": {"train": "a.jsonl", "weight": 2}, "bread": {"train": "b.jsonl"}}
    (tmp_path / "mix.yaml").write_text(yaml.safe_dump(mix))
    return folder


def comparison(tmp_path: Path, texts: Path, **content: object) -> Path:
    save_tiny_model(tmp_path / "model")
    defaults = {"mix": str(tmp_path / "mix.yaml"), "max_train_tokens": 2000, "max_validation_tokens": 500}
    teaching = {"distill_from": "start", "distillation_weight": 1.0}
    whole = {"data_dir": str(texts), "defaults": defaults, "start": "original", "train": {**BUDGET, **teaching}}
    return write_comparison(
        tmp_path / "mixed.yaml", model=str(tmp_path / "model"), **{**whole, **content},
        methods=["lte", {"method": "dense", "label": "original", "fine_tune": False, "base": "start"}, "dense"],
    )  # fmt: skip


def test_runs_start_from_the_model_as_it_is(tmp_path: Path, texts: Path) -> None:
    runs = {run.name: run for run in plan_runs(read_comparison(comparison(tmp_path, texts)))}
    assert set(runs) == {"lte-0.5-seed0", "original-0-seed0", "dense-0-seed0"}
    assert {run.base for run in runs.values()} == {None}
    assert runs["lte-0.5-seed0"].teacher == str(tmp_path / "model")
    assert not any(run.is_start for run in runs.values())
    before = runs["lte-0.5-seed0"].fingerprint
    mix = yaml.safe_load((tmp_path / "mix.yaml").read_text())
    (tmp_path / "mix.yaml").write_text(yaml.safe_dump({**mix, "bread": {"train": "b.jsonl", "weight": 3}}))
    assert plan_runs(read_comparison(tmp_path / "mixed.yaml"))[0].fingerprint != before


def test_records_hold_each_kind_by_name(tmp_path: Path, texts: Path) -> None:
    runner, _ = runner_of(comparison(tmp_path, texts), tmp_path / "out")
    assert execute_all([runner]) == []
    records = {record["label"]: record for record in load_records(tmp_path / "out" / "records")}
    assert set(records) == {"lte", "original", "dense"}
    for record in records.values():
        metrics = record["metrics"]
        assert {"perplexity", "perplexity_apples", "perplexity_bread"} <= set(metrics)
        low, high = sorted((metrics["perplexity_apples"], metrics["perplexity_bread"]))
        assert low <= record["value"] <= high
    assert 0 <= records["lte"]["metrics"]["sparsity_bread"] <= 1
    assert 0 <= records["lte"]["metrics"]["near_threshold_bread"] <= 1
    together = [records["lte"]["metrics"][f"union_sparsity_{tokens}_bread"] for tokens in (2, 4, 8, 16)]
    assert together == sorted(together, reverse=True)
    assert together[0] <= records["lte"]["metrics"]["sparsity_bread"]
    assert records["lte"]["tokens_trained"] > 0
    assert records["original"]["tokens_trained"] == 0
    assert records["dense"]["tokens_trained"] == records["lte"]["tokens_trained"]


def test_lte_train_takes_a_mix(tmp_path: Path, texts: Path) -> None:
    save_tiny_model(tmp_path / "model")
    settings = {**SMALL, **BUDGET, "model": str(tmp_path / "model"), "output": str(tmp_path / "out")}
    settings |= {"mix": str(tmp_path / "mix.yaml"), "mix_folder": str(texts), "max_train_tokens": 2000}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
    result = CliRunner().invoke(app, ["train", "--config", str(tmp_path / "run.yaml")])
    assert result.exit_code == 0, result.output
    assert "Perplexity on apples: " in result.output
    record = json.loads((tmp_path / "out" / "result.json").read_text())
    assert record["task"] == "mix"
    # What is measured needs no number of training tokens.
    flags = ["--mix", str(tmp_path / "mix.yaml"), "--mix-folder", str(texts), "--json", str(tmp_path / "eval.json")]
    for name in SMALL.keys() & {"sequence_length", "max_validation_tokens"}:
        flags += [f"--{name.replace('_', '-')}", str(SMALL[name])]
    result = CliRunner().invoke(app, ["eval", str(tmp_path / "out"), *flags])
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "eval.json").read_text())
    assert found["metrics"] == record["metrics"]
