"""docs/methods.md shows how to add a method: its example is followed here, from a file outside the package."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import lte
from lte.eval.cost import measured_cost, record_fields
from lte.hf.loading import INSTALLERS, NO_KERNELS
from lte.methods import METHODS, config_of
from tests.methods.methods import calibration_batches
from tests.tiny_models import logits_of, tiny_dense_model

DOCUMENT = Path(__file__).parents[2] / "docs" / "methods.md"


@pytest.fixture
def mean_mask(tmp_path: Path) -> Iterator[ModuleType]:
    section = DOCUMENT.read_text().split("## How to add a method")[1]
    code = re.findall(r"```python\n(.*?)```", section, flags=re.DOTALL)
    assert len(code) == 1
    file = tmp_path / "mean_mask.py"
    file.write_text(code[0])
    spec = importlib.util.spec_from_file_location("mean_mask", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look their module up.
    sys.modules["mean_mask"] = module
    spec.loader.exec_module(module)
    yield module
    for registry in (METHODS, INSTALLERS, NO_KERNELS):
        registry.pop("mean_mask")  # type: ignore[attr-defined]
    del sys.modules["mean_mask"]


@pytest.mark.parametrize("model_type", ["llama", "opt"])
def test_the_example_of_the_documents_works(
    mean_mask: Any, model_type: str, tokens: Tensor, tmp_path: Path, relative_rms: Any
) -> None:
    dense, config = tiny_dense_model(model_type), mean_mask.MeanMaskConfig(target_sparsity=0.75)
    model: Any = lte.sparsify_(tiny_dense_model(model_type), config, calibration=calibration_batches())
    measured = lte.measure_sparsity(model, calibration_batches())
    assert measured.sparsity == 0.75
    assert measured_cost(model, measured).flops_per_token < measured_cost(dense, None).flops_per_token
    assert record_fields(model, measured)["method"] == "mean_mask"

    model.save_pretrained(tmp_path / "folder")
    assert json.loads((tmp_path / "folder" / "config.json").read_text())["lte"]["name"] == "mean_mask"
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "folder")
    assert torch.equal(logits_of(loaded, tokens), logits_of(model, tokens))
    assert config_of(loaded) == config

    masks = {name: value.clone() for name, value in loaded.state_dict().items() if name.endswith("kept")}
    other = [{"input_ids": torch.full((2, 9), 5)}]
    lte.calibrate_(loaded, other, target_sparsity=0.5)
    assert lte.measure_sparsity(loaded, other).sparsity == 0.5
    assert all(not torch.equal(value, loaded.state_dict()[name]) for name, value in masks.items())
    assert relative_rms(logits_of(lte.densify_(loaded), tokens), logits_of(dense, tokens)) == 0
    assert "`lte.accelerate_` has no kernels for mean_mask" in METHODS["mean_mask"].abilities()[1]
