"""`lte convert` and `lte densify`: folders that the other commands take, and mistakes in a sentence."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import lte
from tests.cli.conftest import SHORT
from tests.tiny_models import EXPERT_SIZE


@pytest.fixture(scope="module")
def converted(dense_folder: Path, run: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Any:
    output = tmp_path_factory.mktemp("converted") / "sparse"
    result = run("convert", dense_folder, "--output", output, "--expert-size", EXPERT_SIZE, "--device", "cpu")
    assert result.exit_code == 0, result.output
    return output, result.output


def test_says_what_it_did_and_what_comes_next(converted: tuple[Path, str]) -> None:
    folder, said = converted
    assert "wrote 3 files of weights, in" in said
    assert "peak memory" in said
    assert f"lte train --model {folder}" in said.replace("\n", "")
    assert "tokenizer" not in said


def test_the_folder_loads_and_computes_the_same(converted: tuple[Path, str], dense_folder: Path) -> None:
    tokens = torch.arange(3, 20)[None]
    sparse, dense = (AutoModelForCausalLM.from_pretrained(folder) for folder in (converted[0], dense_folder))
    assert len(lte.sparse_ffns(sparse)) == 2
    assert torch.allclose(sparse(tokens).logits, dense(tokens).logits, atol=1e-5)


def test_it_trains_to_what_the_dense_model_trains_to(
    converted: tuple[Path, str], trained: Any, run: Callable[..., Any], tmp_path: Path
) -> None:
    result = run("train", "--model", converted[0], "--output", tmp_path / "out", *SHORT)
    assert result.exit_code == 0, result.output
    found, wanted = (load_file(folder / "model.safetensors") for folder in (tmp_path / "out", trained[0]))
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())


def test_groups_by_activations_on_text(dense_folder: Path, run: Callable[..., Any], tmp_path: Path) -> None:
    options = ["--grouping", "contribution", "--expert-size", EXPERT_SIZE, "--device", "cpu"]
    text = ["--texts", "pydoc-topics", "--sequence-length", "64", "--calibration-tokens", "512"]
    result = run("convert", dense_folder, "--output", tmp_path / "out", *options, *text)
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "out" / "config.json").read_text())["lte"]
    assert found["grouping"] == "contribution"
    assert len(lte.sparse_ffns(AutoModelForCausalLM.from_pretrained(tmp_path / "out"))) == 2


def test_back_to_dense(
    converted: tuple[Path, str], dense_folder: Path, run: Callable[..., Any], tmp_path: Path
) -> None:
    result = run("densify", converted[0], "--output", tmp_path / "back", "--dtype", "float16")
    assert result.exit_code == 0, result.output
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    stock = json.loads((dense_folder / "config.json").read_text())
    assert config == {**stock, "dtype": "float16", "rope_theta": stock["rope_parameters"]["rope_theta"]}
    text = "the while statement"
    back, before = (AutoTokenizer.from_pretrained(folder) for folder in (tmp_path / "back", dense_folder))
    assert back(text).input_ids == before(text).input_ids
    assert back.chat_template == before.chat_template


def test_the_same_command_is_told_that_it_is_done(
    converted: tuple[Path, str], dense_folder: Path, run: Callable[..., Any]
) -> None:
    result = run("convert", dense_folder, "--output", converted[0], "--expert-size", EXPERT_SIZE)
    assert result.exit_code == 1
    assert "Error: output must be a folder without a model, got" in result.stderr


@pytest.mark.parametrize(
    ("command", "options", "message"),
    [
        ("convert", ["--grouping", "contribution"], "--texts must be given with grouping=contribution, which goes by"),
        ("convert", ["--always-on", "0.1"], "--texts must be given with always_on=0.1, which goes by activations"),
        ("convert", ["--texts", "pydoc-topics"], "--texts must be given with a grouping by activations, got it with"),
        ("convert", ["--sequence-length", "64"], "--sequence-length must be given with a grouping by activations"),
        (
            "convert",
            ["--calibration-tokens", "64"],
            "--calibration-tokens must be given with a grouping by",
        ),
        ("convert", ["--dtype", "int8"], "dtype must be one of float32, bfloat16, float16, got dtype='int8'"),
        ("convert", ["--device", "tpu"], "device must be one of auto, cpu, cuda, got device='tpu'"),
        ("densify", [], "model must be an LTE folder or one of another method, got"),
    ],
)
def test_mistakes(
    command: str, options: list[str], message: str, dense_folder: Path, run: Callable[..., Any], tmp_path: Path
) -> None:
    result = run(command, dense_folder, "--output", tmp_path / "out", *options)
    assert result.exit_code == 1
    assert f"Error: {message}" in result.stderr
    assert not (tmp_path / "out").exists()


def test_a_sparse_model_and_its_own_folder_are_refused(
    converted: tuple[Path, str], dense_folder: Path, run: Callable[..., Any], tmp_path: Path
) -> None:
    failed = run("convert", converted[0], "--output", tmp_path / "out")
    assert "model must be dense, got" in failed.stderr
    assert "lte densify makes it dense again" in failed.stderr
    copy = shutil.copytree(dense_folder, tmp_path / "dense")
    assert "output must be another folder than model" in run("convert", copy, "--output", copy).stderr


def test_an_adapter_is_refused_by_name(dense_folder: Path, run: Callable[..., Any], tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    message = f"Error: model must be a whole model to be read layer by layer, got {adapter}, an adapter of peft; merge"
    assert message in run("convert", adapter, "--output", tmp_path / "out").stderr
    # Some trainers save the config of the base beside it.
    shutil.copy(dense_folder / "config.json", adapter)
    assert message in run("convert", adapter, "--output", tmp_path / "out").stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_a_gpu_that_is_not_there(dense_folder: Path, run: Callable[..., Any], tmp_path: Path) -> None:
    failed = run("convert", dense_folder, "--output", tmp_path / "out", "--device", "cuda")
    assert "device must be auto or cpu where PyTorch finds no GPU, got device=cuda" in failed.stderr
