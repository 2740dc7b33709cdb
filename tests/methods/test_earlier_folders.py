"""Folders that version 1 saved, one of each method: they load, compute and cost what they did then.

`fixtures/` holds a tiny LLaMA of each, the logits on a fixed input, and what was measured on fixed tokens.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

import lte
from lte.config import CONFIG_VERSION
from lte.eval.cost import method_name, record_fields
from lte.eval.sparsity import Measurement
from lte.methods import METHODS, config_of
from lte.nn.metering import metered_modules

FOLDERS = Path(__file__).parent / "fixtures"
NUMBERS: dict[str, Any] = json.loads((FOLDERS / "numbers.json").read_text())
TENSORS = load_file(FOLDERS / "logits.safetensors")


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder)


@torch.no_grad()
def logits_of(model: Any) -> torch.Tensor:
    return model(TENSORS["input_ids"]).logits


def test_there_is_a_folder_of_every_method_of_then() -> None:
    assert {path.name for path in FOLDERS.iterdir() if path.is_dir()} == set(NUMBERS) <= set(METHODS)
    assert len(NUMBERS) == 12


@pytest.mark.parametrize("name", NUMBERS)
def test_an_earlier_folder_gives_equal_logits_then_and_saved_again(
    name: str, tmp_path: Path, relative_rms: Callable[[torch.Tensor, torch.Tensor], float]
) -> None:
    model = load(FOLDERS / name)
    # To the bit on a processor of the same kind; others add up in another order.
    logits = logits_of(model)
    assert relative_rms(logits, TENSORS[name]) <= 1e-6
    assert method_name(model) == name
    model.save_pretrained(tmp_path)
    assert torch.equal(logits_of(load(tmp_path)), logits)
    config = json.loads((tmp_path / "config.json").read_text())
    if not METHODS[name].leaves_stock:
        assert (config["lte"]["name"], config["lte"]["version"]) == (name, CONFIG_VERSION)
        assert "lte_method" not in config


@pytest.mark.parametrize("name", NUMBERS)
def test_an_earlier_folder_costs_what_it_did(name: str) -> None:
    model, then = load(FOLDERS / name), NUMBERS[name]
    batches = [{"input_ids": ids} for ids in TENSORS["calibration"]]
    measured = lte.measure_sparsity(model, batches) if metered_modules(model) else None
    now = record_fields(model, measured)
    own = config_of(model)
    assert own is not None
    assert {**own.to_dict(), **then["method_config"], "version": CONFIG_VERSION} == now["method_config"]
    assert now["sparsity"] == then["sparsity"]
    for field in ("weight_sparsity", "flops_per_token", "bytes_per_token"):
        assert now[field] == pytest.approx(then[field], rel=1e-12)
    if then["measurement"] is None:
        assert now["measurement"] is None
    else:
        assert {key: now["measurement"][key] for key in then["measurement"]} == then["measurement"]
        assert Measurement.from_dict(then["measurement"]).layer_sparsity == now["measurement"]["layer_sparsity"]


@pytest.mark.parametrize(("name", "slot"), [("lte", "lte"), ("teal", "lte_method"), ("wanda", "lte_method")])
def test_a_folder_of_a_newer_version_is_refused(name: str, slot: str, tmp_path: Path) -> None:
    shutil.copytree(FOLDERS / name, tmp_path / name)
    path = tmp_path / name / "config.json"
    config = json.loads(path.read_text())
    newer = {"name": name, **config.pop(slot), "version": CONFIG_VERSION + 1}
    path.write_text(json.dumps({**config, "lte": newer}))
    with pytest.raises(ValueError, match=r"saved by a newer lte.*Install that newer lte"):
        config_of(load(path.parent))


def test_a_stock_config_remembers_in_the_same_place(tmp_path: Path) -> None:
    dense = lte.densify_(load(FOLDERS / "cats"))
    batches = [{"input_ids": ids} for ids in TENSORS["calibration"]]
    pruned: Any = lte.sparsify_(dense, lte.StaticPruningConfig(expert_size=8), calibration=batches)
    pruned.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert config.lte["name"] == "static_pruning"
    assert config.lte["dense_neurons"] == 32
    assert config_of(load(tmp_path)) == lte.StaticPruningConfig(expert_size=8)
