"""Whole comparisons of tiny models: records, resuming, sharing, failures."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import lte
from lte.bench.routing import recorded_masks
from lte.eval.models import load_any_model
from lte.hf.dense import load_tokenizer
from lte.runs.latency import time_decoding
from lte.runs.own_answers import calibrate_on_answers_
from lte.runs.runner import execute_all
from lte.train.trainer import LteTrainer
from lte_cli import app
from tests.data.tasks.made_up import write_e2e
from tests.runs.conftest import FIELDS, records_of, runner_of, write_comparison
from tests.tiny_models import EXPERT_SIZE, randomise_routers_


def write_e2e_comparison(folder: Path, model: Path, **content: Any) -> Path:
    """A comparison in which LTE answers."""
    write_e2e(folder / "e2e")
    defaults = {"max_new_tokens": 24, "sequence_length": 96, "pack": False}
    own = {"task": "e2e", "model": str(model), "data_dir": str(folder), "methods": ["lte"], "defaults": defaults}
    return write_comparison(folder / "e2e.yaml", **own, **content)


def done(lines: list[str]) -> list[str]:
    return [line.partition(":")[0] for line in lines if not line.startswith("Data: ")]


@pytest.mark.slow
def test_a_comparison_on_a_task(mrpc: Callable[..., Path], tmp_path: Path) -> None:
    methods = [
        "dense",
        {"method": "lte", "distill_from": "start", "group": "ours", "seeds": [0, 1]},
        "static_pruning",
        "cats",
        {"method": "deja_vu", "fine_tune": True, "label": "fine"},
        {"method": "sigma_moe", "keep": True},
        {"method": "moefication", "relu": True},
    ]
    file = mrpc(*methods)
    first, lines = runner_of(file, tmp_path)
    assert execute_all([first]) == []
    records = records_of(tmp_path)
    assert set(records) == {
        *("dense-0-seed0", "lte-0.5-seed0", "lte-0.5-seed1", "static_pruning-0.5-seed0", "cats-0.5-seed0"),
        *("fine-0.5-seed0", "sigma_moe-0.5-seed0", "moefication-relu-0.5-seed0"),
    }
    assert all(set(record) >= FIELDS for record in records.values())
    # Everything had the same training after the same start.
    tokens = {(r["seed"], r["tokens_trained"], r["config"]["tokens_start"]) for r in records.values()}
    # Rows differ in length, and each seed has an order of its own.
    assert sorted(seed for seed, _, _ in tokens) == [0, 1]
    assert all(trained > 0 and start > 0 for _, trained, start in tokens)
    sparse = records["lte-0.5-seed0"]
    assert sparse["sparsity"] == pytest.approx(0.5, abs=0.05)
    assert set(sparse["metrics"]) == {"accuracy", "f1"}
    assert (sparse["group"], sparse["config"]["distill_from"]) == ("ours", "start-seed0")
    assert sparse["config"]["kernels"] is not None
    assert sparse["config"]["lte"]["expert_size"] == EXPERT_SIZE
    assert sparse["command"] == f"lte compare {file} --only lte-0.5-seed0"
    assert sparse["latency_note"] == "not timed: latency is off"
    assert records["static_pruning-0.5-seed0"]["sparsity"] == 0.5
    # Only what is to be kept is left, and no checkpoint.
    assert [path.name for path in (tmp_path / "work").iterdir()] == ["sigma_moe-0.5-seed0"]
    # A run without its record is done again, with the models that it needs and nothing else.
    before = records["cats-0.5-seed0"]
    (tmp_path / "records" / "cats-0.5-seed0.json").unlink()
    second, lines = runner_of(file, tmp_path)
    assert execute_all([second]) == []
    assert done(lines) == ["start-seed0", "dense-0-seed0", "cats-0.5-seed0"]
    again = records_of(tmp_path)["cats-0.5-seed0"]
    assert (again["value"], again["measurement"]) == (before["value"], before["measurement"])


def test_thresholds_are_set_on_own_answers(tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write_e2e_comparison(tmp_path, llama, sparsities=[0.3])
    answered: list[float] = []

    def calibrated(model: Any, *arguments: Any) -> None:
        # As far away as thresholds on other text could be.
        for ffn in lte.sparse_ffns(model).values():
            ffn.router.bias.data.sub_(0.5)
        calibrate_on_answers_(model, *arguments)
        answered.append(getattr(model, "target_sparsity", 0))

    monkeypatch.setattr("lte.runs.pipeline.calibrate_on_answers_", calibrated)
    folders = ["--output", str(tmp_path / "records"), "--work", str(tmp_path / "work")]
    for phase in ("train", "measure"):
        result = CliRunner().invoke(app, ["compare", str(file), *folders, "--phase", phase])
        assert result.exit_code == 0, result.output
    # The start and LTE.
    assert answered == [0, 0.3]
    record = records_of(tmp_path)["lte-0.3-seed0"]
    assert record["sparsity"] == pytest.approx(0.3, abs=0.05)
    assert record["config"]["train"]["calibration_answers"] == 256


def test_a_comparison_on_text(tmp_path: Path, llama: Path) -> None:
    methods = ["lte", "teal", "wanda", "static_pruning", {"method": "dense", "fine_tune": False, "base": "start"}]
    defaults = {"train": "pydoc-topics", "max_train_tokens": 4096, "max_validation_tokens": 512}
    file = write_comparison(tmp_path / "text.yaml", model=str(llama), methods=methods, defaults=defaults)
    first, lines = runner_of(file, tmp_path)
    assert execute_all([first]) == []
    assert lines[0].startswith("Data: pydoc-topics: ")
    assert " documents of kind text; trained is what stands in [[ ]]: [[" in lines[0]
    assert not any(line.startswith("Data: ") for line in lines[1:])
    assert done(lines)[:2] == ["start-seed0", "lte-0.5-seed0"]
    assert "control-seed0: made" in lines[3]
    records = records_of(tmp_path)
    tokens = {name: record["tokens_trained"] for name, record in records.items()}
    assert tokens.pop("dense-0-seed0") == 0
    assert set(tokens.values()) == {4 * 8 * 48}
    assert {record["metric"] for record in records.values()} == {"perplexity"}
    assert records["wanda-0.5-seed0"]["weight_sparsity"] > 0.2
    assert not list((tmp_path / "work").iterdir())


def test_training_and_measuring_by_different_processes(mrpc: Callable[..., Path], tmp_path: Path) -> None:
    file = mrpc("dense", {"method": "lte", "distill_from": "start"}, "teal", sparsities=[0.5])
    measuring, measured = runner_of(file, tmp_path, phase="measure")
    measuring.begin()
    assert not measuring.advance()
    training, trained = runner_of(file, tmp_path, phase="train")
    assert execute_all([training]) == []
    assert trained[0].startswith("Data: mrpc: ")
    assert [line.partition(" (")[0] for line in trained[1:]] == [
        *("start-seed0: made", "dense-0-seed0: made", "lte-0.5-seed0: made")
    ]
    assert records_of(tmp_path) == {}
    assert execute_all([training]) == []
    # All of it is there.
    assert len(trained) == 4
    assert execute_all([measuring]) == []
    assert done(measured) == ["dense-0-seed0", "lte-0.5-seed0", "teal-0.5-seed0"]
    assert not list((tmp_path / "work").iterdir())
    # As by one process.
    execute_all([runner_of(file, tmp_path / "one")[0]])
    values = [{name: r["value"] for name, r in records_of(folder).items()} for folder in (tmp_path, tmp_path / "one")]
    assert values[0] == values[1]
    with pytest.raises(ValueError, match="phase must be one of both, train, measure, got phase='trian'"):
        runner_of(file, tmp_path, phase="trian")


def test_what_others_made_ready_comes_first(mrpc: Callable[..., Path], tmp_path: Path) -> None:
    file = mrpc("lte", "cats", "teal")
    execute_all([runner_of(file, tmp_path, "teal-0.5-seed0", phase="train")[0]])
    measuring, measured = runner_of(file, tmp_path, phase="measure")
    measuring.begin()
    assert measuring.advance()
    assert done(measured) == ["cats-0.5-seed0"]
    # Another process has trained LTE meanwhile.
    execute_all([runner_of(file, tmp_path, phase="train")[0]])
    assert execute_all([measuring]) == []
    assert done(measured)[1:] == ["lte-0.5-seed0", "teal-0.5-seed0"]


def test_a_killed_training_goes_on_from_its_checkpoint(
    mrpc: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = mrpc("lte", defaults={"save_steps": 1})
    straight, _ = runner_of(file, tmp_path / "straight")
    execute_all([straight])
    control = LteTrainer.control_sparsity

    def killed(self: LteTrainer) -> None:
        control(self)
        if self.target_sparsity == 0.5 and self.stage.number == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(LteTrainer, "control_sparsity", killed)
        with pytest.raises(KeyboardInterrupt):
            execute_all([runner_of(file, tmp_path)[0]])
    assert not list((tmp_path / "records").iterdir())
    trained: list[int] = []

    def counted(self: LteTrainer) -> None:
        control(self)
        trained.append(self.stage.number)

    monkeypatch.setattr(LteTrainer, "control_sparsity", counted)
    again, lines = runner_of(file, tmp_path)
    execute_all([again])
    # Neither the start nor stage 1 trained again.
    assert done(lines) == ["lte-0.5-seed0"]
    assert set(trained) == {2}
    mine, theirs = (records_of(folder)["lte-0.5-seed0"] for folder in (tmp_path, tmp_path / "straight"))
    assert (mine["value"], mine["measurement"]) == (theirs["value"], theirs["measurement"])


def test_other_settings_make_models_anew_and_leave_records(mrpc: Callable[..., Path], tmp_path: Path) -> None:
    keep = {"method": "lte", "keep": True}
    execute_all([runner_of(mrpc(keep, start={"stage1_steps": 1, "stage2_steps": 1}), tmp_path)[0]])
    made = tmp_path / "work" / "lte-0.5-seed0" / "made.json"
    before = json.loads(made.read_text())["fingerprint"]
    changed, lines = runner_of(mrpc(keep), tmp_path)
    assert execute_all([changed]) == []
    assert "made with other settings; delete" in lines[0]
    (tmp_path / "records" / "lte-0.5-seed0.json").unlink()
    changed, lines = runner_of(mrpc(keep), tmp_path)
    execute_all([changed])
    assert done(lines) == ["start-seed0", "lte-0.5-seed0"]
    assert json.loads(made.read_text())["fingerprint"] != before


def test_the_lock_of_a_dead_process_is_taken_over(mrpc: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "work").mkdir()
    lock = tmp_path / "work" / "start-seed0.lock"
    code = f"import filelock, os; lock = filelock.SoftFileLock({str(lock)!r}); lock.acquire(); os._exit(1)"
    subprocess.run([sys.executable, "-c", code], check=False)
    assert lock.exists()
    first, _ = runner_of(mrpc("cats"), tmp_path)
    assert execute_all([first]) == []


def test_what_dead_processes_left_goes(mrpc: Callable[..., Path], tmp_path: Path) -> None:
    runner, _ = runner_of(mrpc("cats"), tmp_path)
    doomed, old, new = (
        tmp_path / "work" / name for name in ("cats.deleted-12", ".made.json.12.partial", ".x.9.partial")
    )
    doomed.mkdir(parents=True)
    for path in (doomed / "model.safetensors", old, new):
        path.write_text("half")
    os.utime(old, (0, 0))
    runner.begin()
    assert [path.exists() for path in (doomed, old, new)] == [False, False, True]


def test_a_model_folder_that_cannot_be_read_is_named(mrpc: Callable[..., Path], tmp_path: Path) -> None:
    runner, _ = runner_of(mrpc("cats"), tmp_path)
    folder = tmp_path / "work" / "start-seed0"
    folder.mkdir(parents=True)
    (folder / "made.json").write_text('{"fingerprint": ')
    with pytest.raises(ValueError, match=rf"{folder}/made.json must say how .* delete {folder} to make it anew"):
        execute_all([runner])


def test_a_run_of_a_living_process_is_left_to_it(mrpc: Callable[..., Path], tmp_path: Path) -> None:
    first, _ = runner_of(mrpc("cats"), tmp_path)
    (tmp_path / "work").mkdir()
    start = first.runs[0]
    with first.folders.lock(start) as mine:
        assert mine
        content = (tmp_path / "work" / "start-seed0.lock").read_text().split()
        assert content[:2] == [str(os.getpid()), socket.gethostname()]
        with first.folders.lock(start) as second:
            assert not second
        assert not first._try(start)
    assert first._try(start)


@pytest.mark.slow
def test_two_processes_share_the_runs(mrpc: Callable[..., Path], tmp_path: Path) -> None:
    file = mrpc("dense", "lte", "cats", "sigma_moe", seeds=[0, 1])
    folders = ["--output", str(tmp_path / "records"), "--work", str(tmp_path / "work")]
    command = [sys.executable, "-m", "lte", "compare", str(file), *folders]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen(command, **pipes) for _ in range(2)]  # type: ignore[call-overload]
    said = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    lines = [line for out, _ in said for line in out.splitlines() if "seed" in line and "Waiting" not in line]
    names = sorted(line.partition(":")[0] for line in lines)
    assert names == sorted({*records_of(tmp_path), "start-seed0", "start-seed1"})
    assert not list((tmp_path / "work").iterdir())


def test_decoding_is_timed_on_the_saved_folder(tmp_path: Path, llama: Path) -> None:
    sparse = lte.sparsify_(load_any_model(str(llama)), lte.LteConfig(expert_size=EXPERT_SIZE, grouping="random"))
    randomise_routers_(sparse)
    sparse.save_pretrained(tmp_path / "sparse")
    text = load_tokenizer(llama)("the wind blows over the hill and into the wood, and then it rains")["input_ids"]
    prompt = len(text) // 2
    with recorded_masks(list(lte.sparse_ffns(sparse).values())) as masks, torch.no_grad():
        sparse(input_ids=torch.tensor([text]))
    decoded = torch.cat([mask[prompt:] for layer in masks for mask in layer])
    for folder, sparsity in ((tmp_path / "sparse", 1 - decoded.float().mean().item()), (llama, 0.0)):
        found = time_decoding(folder, llama, text, prompt, lambda line: None)
        assert found["latency_sparsity"] == pytest.approx(sparsity, abs=1e-6)
        assert 0 < found["latency_p20_ms"] <= found["latency_ms"] <= found["latency_p80_ms"]
        assert found["latency_dense_ms"] > 0
        provider = "lte eager" if folder != llama else "dense eager"
        assert found["latency_note"].startswith(f"decoding step, batch 1, {provider}, float32, context 256; dense: ")
    assert found["latency_ms"] == found["latency_dense_ms"]
    broken = time_decoding(tmp_path / "no", llama, text, prompt)
    assert broken["latency_ms"] is None
    assert broken["latency_note"].startswith("failed: ValueError: model must be a hub name, folder or GGUF file")


def test_decoding_is_timed_on_what_is_measured(tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write_e2e_comparison(tmp_path, llama, latency=True)
    # As if this were a GPU.
    monkeypatch.setattr("lte.runs.measure.why_not", lambda *arguments: None)
    first, _ = runner_of(file, tmp_path)
    assert execute_all([first]) == []
    record = records_of(tmp_path)["lte-0.5-seed0"]
    assert record["latency_ms"] > 0
    assert record["latency_sparsity"] == pytest.approx(record["sparsity"], abs=0.1)


def test_a_kept_model_is_timed_again_beside_its_start(mrpc: Callable[..., Path], tmp_path: Path) -> None:
    file = mrpc({"method": "static_pruning", "keep": True}, latency=True)
    execute_all([runner_of(file, tmp_path)[0]])
    (tmp_path / "records" / "static_pruning-0.5-seed0.json").unlink()
    assert not (tmp_path / "work" / "start-seed0").exists()
    again, lines = runner_of(file, tmp_path)
    assert execute_all([again]) == []
    assert done(lines) == ["start-seed0", "static_pruning-0.5-seed0"]
    record = records_of(tmp_path)["static_pruning-0.5-seed0"]
    assert record["latency_ms"] is None
    assert record["latency_sparsity"] is None
    # Without times the start is not needed.
    (tmp_path / "records" / "static_pruning-0.5-seed0.json").unlink()
    untimed, lines = runner_of(mrpc({"method": "static_pruning", "keep": True}), tmp_path)
    assert execute_all([untimed]) == []
    assert done(lines) == ["static_pruning-0.5-seed0"]


def test_a_dry_run_tells_what_would_be_done(mrpc: Callable[..., Path], tmp_path: Path) -> None:
    file = mrpc(
        "dense", "cats", {"method": "lte", "distill_from": "start"}, train={"stage1_epochs": 2, "stage2_steps": 3}
    )
    folders = ["--output", str(tmp_path / "records"), "--work", str(tmp_path / "work")]
    result = CliRunner().invoke(app, ["compare", str(file), *folders, "--dry-run"], env={"COLUMNS": "160"})
    assert result.exit_code == 0, result.output
    rows = {line.split()[0]: line.split()[1:] for line in result.output.splitlines() if "seed0" in line}
    # 48 rows make 6 steps of 8 in an epoch.
    assert rows["lte-0.5-seed0"][:3] == ["start-seed0", "start-seed0", "15"]
    assert rows["dense-0-seed0"][:2] == ["start-seed0", "15"]
    assert rows["cats-0.5-seed0"][:3] == ["dense-0-seed0", "0", "0"]
    assert rows["start-seed0"][-2:] == ["as", "needed"]
    assert "3 runs with a record, 1 models that they start from" in result.output
    assert not (tmp_path / "records").exists()
    result = CliRunner().invoke(app, ["compare", str(file), *folders, "--only", "lte-0.5-seed1"])
    assert result.exit_code == 1
    assert "did you mean lte-0.5-seed0" in result.output
    result = CliRunner().invoke(app, ["compare", str(file), *folders, "--seeds", "a"])
    assert "seeds must be whole numbers, got seeds=a" in result.output
    result = CliRunner().invoke(app, ["compare", str(file), *folders, "--phase", "trian"])
    assert result.exit_code == 1
    assert "phase must be one of both, train, measure, got phase='trian' (did you mean train?)" in result.output


def test_the_command_fails_if_a_run_did(mrpc: Callable[..., Path], tmp_path: Path) -> None:
    file = mrpc(
        {"method": "lte", "expert_size": 7, "label": "odd"}, {"method": "dense", "fine_tune": False, "base": "start"}
    )
    folders = ["--output", str(tmp_path / "records"), "--work", str(tmp_path / "work")]
    result = CliRunner().invoke(app, ["compare", str(file), *folders, "--only", "odd-0.5-seed0"])
    assert result.exit_code == 1
    assert "odd-0.5-seed0: FAILED ValueError: expert_size must divide" in result.output
    assert "failed: odd-0.5-seed0; their records say why" in result.output
    assert [path.name for path in (tmp_path / "records").iterdir()] == ["odd-0.5-seed0.json"]
