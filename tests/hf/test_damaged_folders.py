"""Folders that are damaged, incomplete, or written by another version must be refused, not half loaded."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lte.config import CONFIG_VERSION
from tests.tiny_models import tiny_sparse_model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A good folder of one weight file."""
    tiny_sparse_model().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """A good folder of many weight files."""
    tiny_sparse_model().save_pretrained(tmp_path / "model", max_shard_size="20KB")
    return tmp_path / "model"


def edit_config(folder: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    edit(config)
    path.write_text(json.dumps(config))


def shard_with(folder: Path, part: str) -> Path:
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    return folder / next(file for key, file in index.items() if part in key)


@pytest.mark.parametrize("damage", ["header", "truncated", "empty"])
@pytest.mark.parametrize("kind", ["folder", "sharded"])
def test_damaged_weight_file(kind: str, damage: str, request: pytest.FixtureRequest) -> None:
    path: Path = request.getfixturevalue(kind)
    file = path / "model.safetensors" if kind == "folder" else shard_with(path, "router")
    data = file.read_bytes()
    file.write_bytes({"header": b"\xff" * 64 + data[64:], "truncated": data[:-100], "empty": b""}[damage])
    with pytest.raises(ValueError, match=rf"got {path}: the weight file {file.name} is corrupt or cut short .*; copy"):
        AutoModelForCausalLM.from_pretrained(path)


@pytest.mark.parametrize("part", ["mlp.router", "self_attn.q_proj"])
def test_missing_shard(sharded: Path, part: str) -> None:
    file = shard_with(sharded, part)
    file.unlink()
    with pytest.raises((OSError, ValueError), match=file.name):
        AutoModelForCausalLM.from_pretrained(sharded)


def test_missing_index(sharded: Path) -> None:
    (sharded / "model.safetensors.index.json").unlink()
    with pytest.raises(OSError, match=r"model\.safetensors"):
        AutoModelForCausalLM.from_pretrained(sharded)


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.1.mlp.router.bias",
        "model.layers.0.mlp.down_proj.weight",
        "model.layers.0.self_attn.q_proj.weight",
        "lm_head.weight",
    ],
)
def test_missing_weight(folder: Path, name: str) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights[name]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"must hold all weights of the model, got 1 missing: {name}"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_many_missing_weights_are_counted_and_abridged(folder: Path) -> None:
    weights = {k: v for k, v in load_file(folder / "model.safetensors").items() if "mlp." not in k}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"got 10 missing: .*, \.\.\.; copy, download"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_weights_of_another_expert_size(folder: Path) -> None:
    edit_config(folder, lambda config: config["lte"].update(expert_size=16))
    with pytest.raises((RuntimeError, ValueError), match=r"size mismatch|mismatched"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_newer_version(folder: Path) -> None:
    edit_config(folder, lambda config: config["lte"].update(version=CONFIG_VERSION + 1))
    with pytest.raises(ValueError, match=r"saved by a newer lte.*Install that newer lte"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_unknown_field(folder: Path) -> None:
    edit_config(folder, lambda config: config["lte"].update(colour="red"))
    with pytest.raises(ValueError, match="known fields only, got colour"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_config_without_lte(folder: Path) -> None:
    edit_config(folder, lambda config: config.pop("lte"))
    with pytest.raises(ValueError, match=r"config\.lte must hold the settings of a method, got None"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_expert_size_that_does_not_fit(folder: Path) -> None:
    edit_config(folder, lambda config: config["lte"].update(expert_size=7))
    with pytest.raises(ValueError, match="expert_size must divide"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_loading_info_is_returned_on_request(folder: Path) -> None:
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert type(model).__name__ == "LteLlamaForCausalLM"
    assert not info["missing_keys"]
