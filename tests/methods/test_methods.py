"""What holds for every method on every kind of FFN; a new method is tested here without a new line."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import lte
from lte.eval.cost import measured_cost, method_name
from lte.eval.flops import flops_per_token
from lte.eval.sparsity import measure_sparsity
from lte.methods import METHODS, config_of
from tests.methods.methods import EVERY_METHOD, calibration_batches, config_for, made
from tests.tiny_models import PAD, auto_class, logits_of, row_of, tiny_dense_model

# One family of each kind: gated, fused, transposed, spread in two ways, two-sided.
KINDS = ["llama", "phi3", "gpt2", "bert", "opt", "t5"]

RELU = ("opt", "t5")


def applied(method: str, model_type: str = "llama", target: float = 0.75, **settings: Any) -> Any:
    return made(method, model_type, target_sparsity=target, **settings)


@pytest.fixture(params=EVERY_METHOD)
def method(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


def test_a_saved_model_loads_bit_equal(method: str, kind: str, tokens: Tensor, tmp_path: Path) -> None:
    model = applied(method, kind)
    expected = logits_of(model, tokens)
    assert not torch.equal(expected, logits_of(tiny_dense_model(kind), tokens))
    assert torch.equal(logits_of(model, tokens), expected), "measuring twice must give the same"
    model.save_pretrained(tmp_path)
    loaded = auto_class(kind).from_pretrained(tmp_path).eval()
    assert type(loaded) is type(model)
    assert torch.equal(logits_of(loaded, tokens), expected)
    assert config_of(loaded) == config_of(model)
    assert method_name(loaded) == method_name(model) == config_for(method).name
    stock = METHODS[config_for(method).name].install is None
    model_type = json.loads((tmp_path / "config.json").read_text())["model_type"]
    assert model_type == row_of(kind).model_type if stock else f"lte_{row_of(kind).model_type}"


def test_a_target_of_0_leaves_the_dense_model(method: str, kind: str, tokens: Tensor, relative_rms) -> None:
    dense = tiny_dense_model(kind)
    model = applied(method, kind, target=0.0)
    assert relative_rms(logits_of(model, tokens), logits_of(dense, tokens)) <= 1e-4
    if METHODS[config_for(method).name].install is not None:
        cost = measured_cost(model, measure_sparsity(model, calibration_batches()))
        # What ReLU makes 0 needs no reading whatever the target is.
        assert cost.sparsity == pytest.approx(0, abs=1e-6) or kind in RELU
        assert cost.flops_per_token >= flops_per_token(dense) or kind in RELU


def test_a_token_is_computed_the_same_in_any_company(method: str, tokens: Tensor, relative_rms) -> None:
    model = applied(method)
    alone = torch.cat([logits_of(model, row[None]) for row in tokens])
    assert relative_rms(alone, logits_of(model, tokens)) <= 1e-5
    padded = torch.cat([tokens, torch.full((2, 4), PAD)], 1)
    mask = (padded != PAD).long()
    assert relative_rms(logits_of(model, padded, attention_mask=mask)[:, :7], logits_of(model, tokens)) <= 1e-5


def test_padding_is_in_no_fit_and_no_count(method: str, kind: str, tokens: Tensor, relative_rms) -> None:
    plain, padded = calibration_batches(), []
    for batch in plain:
        ids = torch.cat([batch["input_ids"], torch.full((4, 3), PAD)], 1)
        labels = torch.cat([batch["labels"], torch.full((4, 3), -100)], 1)
        padded.append({"input_ids": ids, "labels": labels, "attention_mask": (ids != PAD).long()})
    config = config_for(method)
    one, other = (lte.sparsify_(tiny_dense_model(kind), config, calibration=batches) for batches in (plain, padded))
    assert relative_rms(logits_of(other, tokens), logits_of(one, tokens)) <= 1e-4
    if METHODS[config.name].install is not None:
        first, second = measure_sparsity(one, plain), measure_sparsity(one, padded)
        assert first.tokens == second.tokens
        assert second.weights_read == pytest.approx(first.weights_read, rel=1e-3)


def test_a_copy_and_a_move_keep_working(method: str, tokens: Tensor) -> None:
    model = applied(method)
    assert torch.equal(logits_of(copy.deepcopy(model), tokens), logits_of(model, tokens))
    assert logits_of(model.to(torch.bfloat16), tokens).isfinite().all()


def test_a_folder_in_bfloat16_decides_in_fp32(method: str, tmp_path: Path) -> None:
    model = applied(method)
    model.save_pretrained(tmp_path)
    loaded = auto_class("llama").from_pretrained(tmp_path, dtype=torch.bfloat16)
    own = {name: value for name, value in loaded.state_dict().items() if name not in tiny_dense_model().state_dict()}
    for name, value in own.items():
        assert value.dtype == torch.float32, name
        assert torch.equal(value, model.state_dict()[name]), name


def test_modes_and_gradients_are_left_as_they_were(method: str) -> None:
    model = tiny_dense_model().train()
    model.model.layers[0].self_attn.eval()
    model.model.layers[1].mlp.up_proj.weight.requires_grad_(False)
    expected = {name: module.training for name, module in model.named_modules()}
    lte.sparsify_(model, config_for(method), calibration=calibration_batches())
    found = {name: module.training for name, module in model.named_modules()}
    assert {name: found[name] for name in expected} == expected
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    assert frozen == ["model.layers.1.mlp.up_proj.weight"]
    assert all(parameter.grad is None for parameter in model.parameters())


def test_configs_round_trip(method: str) -> None:
    config = config_for(method, target_sparsity=0.25)
    again = type(config).from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config
