from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import lte
from lte.methods.wanda import WandaConfig, pruned_weights
from tests.methods.methods import calibration_batches
from tests.tiny_models import PAD, tiny_dense_model


def test_a_worked_example() -> None:
    """In the second row a weight of 1 with a large input stays, and one of 3 with a small input goes."""
    weight = torch.tensor([[4.0, 0.0, 1.0, -1.0], [3.0, -2.0, -1.0, -3.0], [-3.0, 1.0, 0.0, 2.0]])
    norms = torch.tensor([1.0, 2.0, 8.0, 3.0])
    gone = pruned_weights(weight, norms, WandaConfig())
    # Scores: 4 0 8 3 / 3 4 8 9 / 3 2 0 6; the two smallest of each row go.
    expected = [[False, True, False, True], [True, True, False, False], [False, True, True, False]]
    assert gone.tolist() == expected
    by_magnitude = pruned_weights(weight, torch.ones(4), WandaConfig())
    assert by_magnitude.tolist() != expected


@pytest.mark.parametrize(("pattern", "kept", "group"), [("2:4", 2, 4), ("4:8", 4, 8)])
def test_patterns_keep_the_best_of_every_group(pattern: Any, kept: int, group: int) -> None:
    weight, norms = torch.randn(6, 32), torch.rand(32)
    gone = pruned_weights(weight, norms, WandaConfig(pattern=pattern)).unflatten(1, (-1, group))
    assert ((~gone).sum(-1) == kept).all()
    scores = (weight.abs() * norms).unflatten(1, (-1, group))
    assert (scores.masked_fill(gone, torch.inf).amin(-1) > scores.masked_fill(~gone, 0).amax(-1)).all()


@pytest.mark.parametrize("target", [0.0, 0.3, 0.5, 0.9])
def test_every_row_loses_the_same_share(target: float) -> None:
    gone = pruned_weights(torch.randn(5, 32), torch.rand(32), WandaConfig(target_sparsity=target))
    assert gone.sum(1).tolist() == [round(32 * target)] * 5


def zeros(model: Any, suffix: str) -> float:
    weights = [value for name, value in model.state_dict().items() if name.endswith(suffix) and "layers" in name]
    return sum((weight == 0).float().mean().item() for weight in weights) / len(weights)


@pytest.mark.parametrize(("linears", "attention"), [("ffn", 0.0), ("block", 0.5)])
def test_attention_is_pruned_if_asked(linears: Any, attention: float) -> None:
    model = lte.sparsify_(tiny_dense_model(), WandaConfig(linears=linears), calibration=calibration_batches())
    assert zeros(model, "mlp.down_proj.weight") == zeros(model, "mlp.up_proj.weight") == 0.5
    assert zeros(model, "q_proj.weight") == zeros(model, "o_proj.weight") == attention
    assert model.lm_head.weight.all()  # type: ignore[union-attr, operator]


def test_inputs_decide_and_padding_does_not() -> None:
    dense, batches = tiny_dense_model(), calibration_batches()
    with torch.no_grad():
        # Neuron 3 is never active: of all columns of down, its weights must go.
        dense.model.layers[0].mlp.gate_proj.weight[3] = 0
        dense.model.layers[0].mlp.down_proj.weight[:, 3] = 100
    model: Any = lte.sparsify_(copy.deepcopy(dense), WandaConfig(), calibration=batches)
    assert (model.model.layers[0].mlp.down_proj.weight[:, 3] == 0).all()
    padded = [
        {
            "input_ids": torch.cat([batch["input_ids"], torch.full((4, 5), PAD)], 1),
            "attention_mask": torch.cat([torch.ones(4, 9), torch.zeros(4, 5)], 1).long(),
        }
        for batch in batches
    ]
    other = lte.sparsify_(copy.deepcopy(dense), WandaConfig(), calibration=padded)
    same = [a.equal(b) for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True)]
    assert all(same)


def input_norms(model: Any, name: str) -> Tensor:
    seen: list[Tensor] = []
    hook = model.get_submodule(name).register_forward_pre_hook(lambda module, args: seen.append(args[0].flatten(0, 1)))
    with torch.no_grad():
        for batch in calibration_batches():
            model(batch["input_ids"])
    hook.remove()
    return torch.cat(seen).norm(dim=0)


def test_a_block_sees_what_the_pruned_ones_before_it_give() -> None:
    dense, name = tiny_dense_model(), "model.layers.1.mlp.down_proj"
    weight = dense.get_submodule(name).weight.detach()
    first_pruned = copy.deepcopy(dense)
    for sequential in (True, False):
        config = WandaConfig(sequential=sequential)
        model: Any = lte.sparsify_(copy.deepcopy(dense), config, calibration=calibration_batches())
        first_pruned.model.layers[0] = model.model.layers[0]
        norms = input_norms(first_pruned if sequential else dense, name)
        assert torch.equal(model.get_submodule(name).weight == 0, pruned_weights(weight, norms, config))


def test_it_stays_a_stock_model(tmp_path: Any) -> None:
    model: Any = lte.sparsify_(tiny_dense_model(), WandaConfig(pattern="2:4"), calibration=calibration_batches())
    assert type(model).__name__ == "LlamaForCausalLM"
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is type(model)
    assert loaded.config.lte["pattern"] == "2:4"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pattern": "1:4"}, "pattern must be one of unstructured, 2:4, 4:8, got pattern='1:4'"),
        ({"pattern": "2:4", "target_sparsity": 0.25}, "target_sparsity must be 0.5 for pattern='2:4', got"),
        ({"linears": "all"}, "linears must be one of ffn, block, got linears='all'"),
    ],
)
def test_wrong_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        WandaConfig(**settings)


def test_a_pattern_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="pattern must divide 30 inputs, got pattern='4:8'"):
        pruned_weights(torch.randn(2, 30), torch.ones(30), WandaConfig(pattern="4:8"))
    with pytest.raises(ValueError, match="linears must be 'ffn' for t5"):
        lte.sparsify_(tiny_dense_model("t5"), WandaConfig(linears="block"), calibration=calibration_batches())
