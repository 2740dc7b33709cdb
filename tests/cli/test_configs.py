"""`lte configs`, the launch files of the examples, and runs that a launcher starts or ends."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from safetensors.torch import load_file

import lte
from lte.launch import FOLDER, shipped_configs
from lte.runs.conversion import convert_folder
from tests.cli.conftest import SHORT
from tests.processes import ROOT, run_forked
from tests.tiny_models import EXPERT_SIZE


def test_they_are_listed_printed_and_copied(run: Callable[..., Any], tmp_path: Path) -> None:
    listed = run("configs").output
    assert [line.partition(":")[0] for line in listed.splitlines()] == ["fsdp2", "fsdp2_offload", "zero2", "zero3"]
    printed = run("configs", "fsdp2").output
    assert printed == (FOLDER / "fsdp2.yaml").read_text()
    copied = run("configs", "zero3", "--output", tmp_path)
    assert f"Written to {tmp_path / 'zero3.yaml'}" in copied.output
    assert (tmp_path / "zero3.yaml").read_text() == (FOLDER / "zero3.yaml").read_text()
    again = run("configs", "zero3", "--output", tmp_path / "zero3.yaml")
    assert again.exit_code == 1
    assert "output must be a new file, got output=" in again.output
    assert "name must be one of" in run("configs", "zero4").output
    assert "name must be given with output" in run("configs", "--output", tmp_path).output


def test_commands_that_we_name_say_how_many_processes() -> None:
    """accelerate takes none of the configs without."""
    named = re.findall(
        r"accelerate launch --config_file \S+(?:\s+\S+){2}",
        "\n".join(path.read_text() for path in [*(ROOT / "docs").glob("*.md"), *FOLDER.glob("*.yaml")]),
    )
    assert len(named) >= 7
    assert all("--num_processes" in command for command in named)


@pytest.mark.parametrize("name", shipped_configs())
def test_accelerate_reads_them(name: str) -> None:
    read = load_config_from_file(str(FOLDER / f"{name}.yaml"))
    kind = "FSDP" if name.startswith("fsdp2") else "DEEPSPEED"
    assert read.distributed_type.value == kind
    if kind == "FSDP":
        assert read.fsdp_config["fsdp_version"] == 2
        assert read.fsdp_config["fsdp_state_dict_type"] == "SHARDED_STATE_DICT"
        assert read.fsdp_config["fsdp_offload_params"] == (name == "fsdp2_offload")
    else:
        assert read.deepspeed_config["zero_stage"] == int(name[-1])


def test_the_launch_files_say_that_they_were_not_run_and_use_flags_that_there_are() -> None:
    flags = (ROOT / "docs" / "cli.md").read_text()
    for name in ("slurm.sbatch", "kubernetes.yaml"):
        text = (ROOT / "examples" / "cluster" / name).read_text()
        assert "NOT RUN" in text
        own = text.partition("-m lte train")[2]
        words = [word.strip("'\"") for word in own.split() if word.startswith("--")]
        assert len(words) >= 8
        assert "TORCH_ELASTIC_SHUTDOWN_TIMEOUT" in text
        assert all(f"`{word}`" in flags or f"{word} " in flags or f"{word}/" in flags for word in words)
    job = yaml.safe_load((ROOT / "examples" / "cluster" / "kubernetes.yaml").read_text())
    assert job["spec"]["template"]["spec"]["terminationGracePeriodSeconds"] >= 60


def environment() -> dict[str, str]:
    path = os.pathsep.join([str(ROOT), str(ROOT / "src")])
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


@pytest.mark.slow
def test_a_sigterm_ends_a_run_and_the_same_command_goes_on(dense_folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    # Long enough that a signal meets it.
    own = [*SHORT, "--stage1-steps", "80", "--stage2-steps", "80", "--save-steps", "20"]
    command = [sys.executable, "-m", "lte", "train", "--resume", "--model", str(dense_folder), *own]
    command += ["--output", str(output)]
    with subprocess.Popen(command, cwd=ROOT, env=environment(), stderr=subprocess.PIPE, text=True) as first:
        log = output / "checkpoints"
        begun = time.monotonic()
        # Its first checkpoint says that it trains.
        while not list(log.glob("checkpoint-*/lte_manifest.json")):
            assert first.poll() is None
            assert time.monotonic() - begun < 120
            time.sleep(0.1)
        first.send_signal(signal.SIGTERM)
        asked = time.monotonic()
        _, said = first.communicate(timeout=60)
        assert time.monotonic() - asked < 60
    assert first.returncode == 143
    assert "Stopped: the training ended after step" in said
    assert f"Go on with: lte train --resume --output {output}" in " ".join(said.split())
    (newest,) = log.glob("checkpoint-*")
    step = json.loads((newest / "trainer_state.json").read_text())["global_step"]
    assert f"after step {step} of" in said
    assert not (output / "config.json").exists()
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert (output / "result.json").exists()
    logged = json.loads((output / "training_log.json").read_text())
    steps = [entry["step"] for entry in logged if "task_loss" in entry]
    # One curve, as of a run that nothing had stopped.
    assert steps == sorted(set(steps))
    assert (steps[0], steps[-1]) == (2, 160)


@pytest.mark.slow
def test_accelerate_launches_the_command_in_two_processes(dense_folder: Path, tmp_path: Path) -> None:
    output, launcher = tmp_path / "out", [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"]
    launcher += ["--config_file", str(FOLDER / "fsdp2.yaml"), "--num_processes", "2", "-m", "lte"]
    arguments = ["train", "--model", str(dense_folder), "--output", str(output), *SHORT, "--batch-size", "2"]
    done = subprocess.run(
        [*launcher, *arguments], cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    # Each of the two says that it holds the whole model, as there are no GPUs.
    assert done.stderr.count("UserWarning: accelerate shards models on GPUs alone") == 2
    assert done.stdout.count("Saved to") == 1
    record = json.loads((output / "result.json").read_text())
    assert record["tokens_trained"] == 12 * 2 * 2 * 32
    assert record["sparsity"] == pytest.approx(0.5, abs=0.05)


def check_adapter(output: Path) -> None:
    """The routers of an adapter are those of the model that has it merged."""
    adapter = load_file(output / "adapter" / "adapter_model.safetensors")
    assert sum("router.weight" in name for name in adapter) == 2
    state = load_file(output / "model.safetensors")
    weight = next(name for name in state if name.endswith("layers.0.mlp.router.weight"))
    kept = next(value for name, value in adapter.items() if name.endswith("layers.0.mlp.router.weight"))
    assert torch.equal(state[weight], kept)
    assert state[weight].any()


@pytest.mark.slow
def test_a_run_in_shards_ends_with_one_folder_and_reads_weights_once_from_a_folder_of_lte(
    dense_folder: Path, tmp_path: Path
) -> None:
    convert_folder(dense_folder, tmp_path / "start", lte.LteConfig(expert_size=EXPERT_SIZE))
    outputs = {}
    for start in (dense_folder, tmp_path / "start"):
        output = outputs[start] = tmp_path / f"out-{start.name}"
        settings = [*SHORT, "--batch-size", "2", "--lora-rank", "2"]
        said = run_forked("2", "tests.cli.train_in_shards", "train", "--model", start, "--output", output, *settings)
        assert "process 0 reads weights" in said
        assert ("process 1 reads weights" in said) == (start == dense_folder)
        # What the first process says, and no other one.
        assert said.count("Saved to") == 1
        assert json.loads((output / "result.json").read_text())["sparsity"] == pytest.approx(0.5, abs=0.05)
        check_adapter(output)
    found, wanted = (load_file(output / "model.safetensors") for output in outputs.values())
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())
