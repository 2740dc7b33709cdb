"""The settings files of experiments/step and the step of benchmarks/reproduce.sh that trains and times by them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from lte_cli import load_command
from tests.cli.conftest import run, save_tiny_model

__all__ = ["run"]

ROOT = Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "experiments" / "step").glob("*.yaml"))
# What a CPU and a tiny model need otherwise; the rest is as the file has it.
TINY = ["--sequence-length", 32, "--expert-size", 8, "--batch-size", 2, "--no-compile", "--no-bf16"]
SHORT = ["--stage1-steps", 1, "--stage2-steps", 1, "--router-fit-tokens", 64, "--calibration-tokens", 64]


def write_articles(path: Path) -> Path:
    text = "A cat sat on a mat while it rained, and nobody knew with whom it had come. " * 4
    path.write_text("".join(json.dumps({"text": f"{number}. {text}"}) + "\n" for number in range(8)), encoding="utf-8")
    return path


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_each_is_the_recipe_of_six_and_a_half_million_tokens(config: Path) -> None:
    settings = yaml.safe_load(config.read_text(encoding="utf-8"))
    steps = settings["stage1_steps"] + settings["stage2_steps"]
    assert steps * settings["batch_size"] * settings["sequence_length"] == 400 * 16 * 1024
    common = {"distill_from": "initial", "grouping": "contribution", "router_learning_rate": 1e-3, "bf16": True}
    assert common.items() <= settings.items()


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_each_trains_a_folder(run: Callable[..., Any], config: Path, tmp_path: Path) -> None:
    articles = write_articles(tmp_path / "articles.jsonl")
    model = save_tiny_model(tmp_path / "dense", "llama" if "smollm" in config.stem else "qwen2")
    flags = ["--model", model, "--train", articles, "--validation", articles, "--target-sparsity", 0.8]
    result = run("train", "--config", config, "--output", tmp_path / "out", *flags, *TINY, *SHORT)
    assert result.exit_code == 0, result.output + result.stderr
    record = json.loads((tmp_path / "out" / "result.json").read_text(encoding="utf-8"))
    assert record["target_sparsity"] == 0.8
    assert record["config"]["train"]["distillation_weight"] == 1


def commands_of(tmp_path: Path, steps: list[str], **values: str) -> list[str]:
    """What steps of the script run, which is printed in place of running it."""
    python = tmp_path / "bin" / "python3"
    python.parent.mkdir()
    python.write_text(
        f'#!/bin/sh\n[ "$1" = - ] && exec {sys.executable} "$@"\necho "$@" >>{tmp_path}/commands\n'
        'while [ $# -gt 1 ]; do [ "$1" = --output ] && out=$2; shift; done\n'
        'mkdir -p "$out" && touch "$out/result.json"\n',
        encoding="utf-8",
    )
    python.chmod(0o755)
    values |= {"HELD_OUT": str(write_articles(tmp_path / "articles.jsonl"))}
    path = {"PATH": f"{python.parent}:{os.environ['PATH']}"}
    command = ["bash", str(ROOT / "benchmarks" / "reproduce.sh"), str(tmp_path / "out"), *steps]
    subprocess.run(command, env={**os.environ, **path, **values}, check=True, stdout=subprocess.PIPE)
    return (tmp_path / "commands").read_text(encoding="utf-8").splitlines()


def test_the_script_trains_and_times_the_models_that_are_there(tmp_path: Path) -> None:
    lines = commands_of(tmp_path, ["step", "whole_step"], QWEN_CODER_0_5B="coder.gguf", TRAIN="train.jsonl.xz")
    for line in lines:
        name, *arguments = line.split()[2:]
        assert not load_command(name).make_context(name, arguments).args
    assert [line.split()[2] for line in lines] == ["train", "bench"] * 2 + ["bench"] * 5
    assert "--context-length 32768 --prompt-length 32704" in lines[-1]
    for line, target in zip(lines[:4:2], ("0.5", "0.8"), strict=True):
        assert "--config experiments/step/qwen_coder_0_5b.yaml --model coder.gguf --train train.jsonl.xz" in line
        assert f"--target-sparsity {target} " in line
        assert (tmp_path / "out" / f"qwen_coder_0_5b_{target[2:]}0_result.json").exists()
    text = tmp_path / "out" / "held_out.txt"
    assert text.read_text(encoding="utf-8").count("A cat sat") == 8 * 4
    assert f"--text {text}" in lines[1]


def test_the_script_trains_and_serves_the_models_that_are_there(
    tmp_path: Path, script: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = ["serve_shape", "serve", "speculate"]
    lines = commands_of(tmp_path, steps, QWEN_CODER_1_5B="coder.gguf", MIX_FOLDER="texts")
    trained = [line for line in lines if line.startswith("-m lte train")]
    for line in trained:
        assert not load_command("train").make_context("train", line.split()[3:]).args
        assert "--mix-folder texts" in line
    assert {line.partition("--target-sparsity ")[2].split()[0] for line in trained} == {"0.5", "0.8"}
    served = [line.split()[1:] for line in lines if line.startswith("benchmarks/vllm_bench.py")]
    assert len(served) == 2 + 4
    for arguments in served:
        monkeypatch.setattr(sys, "argv", ["vllm_bench.py", *arguments])
        assert script("vllm_bench").parse().together
    folders = [str(tmp_path / "out" / "served" / f"qwen_coder_1_5b_{target}0") for target in (5, 8)]
    assert all(folder in served[2] for folder in folders)
    for line, folder in zip(lines[-2:], folders, strict=True):
        monkeypatch.setattr(sys, "argv", line.split())
        assert script("speculation").parse().folder == folder
    assert (tmp_path / "out" / "qwen_coder_1_5b_80_served.json").exists()
