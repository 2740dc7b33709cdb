from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import lte
from lte.hf.families import dense_ffns
from lte.methods.static_pruning import StaticPruningConfig, neuron_importance, prune_static_
from tests.tiny_models import (
    HIDDEN,
    NEURONS,
    PAD,
    VOCAB,
    auto_class,
    logits_of,
    num_ffns,
    row_of,
    tiny_config,
    tiny_dense_model,
    tiny_sparse_model,
)

HALF = StaticPruningConfig(target_sparsity=0.5, expert_size=8)


def calibration() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(2)
    rows = [torch.randint(3, VOCAB, (2, 9), generator=generator) for _ in range(2)]
    return [{"input_ids": row, "labels": row} for row in rows]


def ffns_of(model: Any, model_type: str) -> dict[str, nn.Module]:
    return dense_ffns(model, row_of(model_type))


@torch.no_grad()
def zero_neurons_(model: Any, model_type: str, kept: list[Tensor]) -> None:
    """Sets the down projection's columns of all other neurons to zero."""
    down = row_of(model_type).layout.down
    for ffn, index in zip(ffns_of(model, model_type).values(), kept, strict=True):
        weight = row_of(model_type).layout.matrix(ffn.get_submodule(down))
        mask = torch.zeros(weight.shape[1])
        mask[index] = 1
        weight.mul_(mask)


def kept_columns(dense: Any, pruned: Any, model_type: str) -> list[Tensor]:
    """Which columns of the dense down projection the pruned one holds."""
    layout = row_of(model_type).layout
    found = []
    for old, new in zip(ffns_of(dense, model_type).values(), ffns_of(pruned, model_type).values(), strict=True):
        columns = [layout.matrix(ffn.get_submodule(layout.down)).T for ffn in (old, new)]
        found.append(torch.stack([(columns[0] == column).all(1).nonzero()[0, 0] for column in columns[1]]))
    return found


@pytest.mark.parametrize("granularity", ["neuron", "expert"])
def test_the_model_computes_the_dense_one_without_those_neurons(
    model_type: str, granularity: Any, tokens: Tensor
) -> None:
    dense = tiny_dense_model(model_type)
    pruned = copy.deepcopy(dense)
    config = StaticPruningConfig(expert_size=8, granularity=granularity)
    assert prune_static_(pruned, config, calibration()) is pruned
    kept = kept_columns(dense, pruned, model_type)
    assert [len(index.unique()) for index in kept] == [NEURONS // 2] * num_ffns(model_type)
    zero_neurons_(dense, model_type, kept)
    with torch.no_grad():
        torch.testing.assert_close(logits_of(pruned, tokens), logits_of(dense, tokens), rtol=1e-5, atol=1e-5)


def test_it_saves_and_loads_as_a_stock_model(model_type: str, tokens: Tensor, tmp_path: Path) -> None:
    model = prune_static_(tiny_dense_model(model_type), HALF, calibration())
    model.save_pretrained(tmp_path)  # type: ignore[operator]
    loaded = auto_class(model_type).from_pretrained(tmp_path).eval()
    assert type(loaded) is type(model)
    row = row_of(model_type)
    assert (loaded.config.model_type, getattr(loaded.config, row.neurons_field)) == (row.model_type, NEURONS // 2)
    for name, value in model.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[name]), name
    with torch.no_grad():
        assert torch.equal(logits_of(model, tokens), logits_of(loaded, tokens))


def test_it_trains_and_becomes_an_lte_model(model_type: str, tokens: Tensor) -> None:
    model: Any = prune_static_(tiny_dense_model(model_type), HALF, calibration()).train()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
    assert all(not torch.equal(before[name], parameter) for name, parameter in model.named_parameters())
    lte.sparsify_(model, lte.LteConfig(expert_size=8, grouping="contiguous"))
    assert all(ffn.num_neurons == NEURONS // 2 for ffn in lte.sparse_ffns(model).values())


def test_the_score_is_mean_activation_times_norm_without_padding() -> None:
    model = tiny_dense_model()
    batch = calibration()[0]
    seen: list[Tensor] = []
    ffn = model.model.layers[0].mlp
    hook = ffn.down_proj.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        model(**batch)
    hook.remove()
    expected = seen[0].abs().mean((0, 1)) * ffn.down_proj.weight.norm(dim=0)
    found = neuron_importance(model, [batch])["model.layers.0.mlp"]
    torch.testing.assert_close(found, expected.detach())
    padding = torch.full((2, 4), PAD)
    padded = {
        "input_ids": torch.cat([batch["input_ids"], padding], 1),
        "attention_mask": torch.cat([torch.ones(2, 9), torch.zeros(2, 4)], 1).long(),
    }
    torch.testing.assert_close(neuron_importance(model, [padded])["model.layers.0.mlp"], found)


def test_the_neurons_of_the_lowest_scores_go() -> None:
    model = tiny_dense_model()
    scores = neuron_importance(model, calibration())["model.layers.0.mlp"]
    pruned = prune_static_(copy.deepcopy(model), HALF, calibration())
    kept = kept_columns(model, pruned, "llama")[0]
    assert kept.tolist() == scores.topk(NEURONS // 2).indices.sort().values.tolist()


@pytest.mark.parametrize("grouping", ["kmeans", "random", "contiguous"])
def test_experts_are_those_of_sparsify(grouping: Any, model_type: str) -> None:
    """Every kept expert is, as a set of neurons, one of the experts that `sparsify_` makes with this seed."""
    dense = tiny_dense_model(model_type)
    config = StaticPruningConfig(expert_size=8, granularity="expert", grouping=grouping, seed=3)
    pruned = prune_static_(copy.deepcopy(dense), config, calibration())
    sparse = lte.sparsify_(copy.deepcopy(dense), lte.LteConfig(expert_size=8, grouping=grouping, seed=3))
    layout = row_of(model_type).layout
    kept = kept_columns(dense, pruned, model_type)
    scores = neuron_importance(dense, calibration())
    ffns = zip(ffns_of(dense, model_type).items(), lte.sparse_ffns(sparse).values(), kept, strict=True)
    for (name, old), ffn, index in ffns:
        columns = [layout.matrix(down).T for down in (old.get_submodule(layout.down), ffn.part(layout.down))]
        order = torch.stack([(columns[0] == column).all(1).nonzero()[0, 0] for column in columns[1]])
        experts = order.unflatten(0, (-1, 8))
        best = experts[scores[name][experts].sum(1).topk(NEURONS // 16).indices]
        assert set(best.flatten().tolist()) == set(index.tolist())


@pytest.mark.parametrize(("target", "kept"), [(0.0, 64), (0.3, 48), (0.5, 32), (0.99, 8)])
def test_the_target_is_rounded_to_whole_experts(target: float, kept: int) -> None:
    config = StaticPruningConfig(target_sparsity=target, expert_size=8)
    assert config.kept_neurons(NEURONS) == kept
    model: Any = prune_static_(tiny_dense_model(), config, calibration())
    assert model.config.intermediate_size == kept


def test_a_shared_config_frozen_weights_biases_and_modes_are_respected(tokens: Tensor) -> None:
    config = tiny_config("llama", mlp_bias=True)
    model, other = (AutoModelForCausalLM.from_config(config) for _ in range(2))
    model.train()
    model.model.layers[0].mlp.up_proj.weight.requires_grad_(False)
    with torch.no_grad():
        for ffn in ffns_of(model, "llama").values():
            ffn.up_proj.bias.normal_()  # type: ignore[union-attr, operator]
    dense = copy.deepcopy(model)
    prune_static_(model, HALF, calibration())
    assert other.config.intermediate_size == NEURONS
    assert model.model.layers[0].mlp.training
    assert not model.model.layers[0].mlp.up_proj.weight.requires_grad
    zero_neurons_(dense, "llama", kept_columns(dense, model, "llama"))
    with torch.no_grad():
        torch.testing.assert_close(model(tokens).logits, dense(tokens).logits, rtol=1e-5, atol=1e-5)


def test_all_neurons_kept_changes_nothing(tokens: Tensor) -> None:
    dense = tiny_dense_model()
    config = StaticPruningConfig(target_sparsity=0.0, expert_size=8)
    pruned = prune_static_(copy.deepcopy(dense), config, calibration())
    with torch.no_grad():
        assert torch.equal(dense(tokens).logits, pruned(tokens).logits)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_sparsity": 1.0}, r"target_sparsity must lie in \[0, 1\), got target_sparsity=1.0"),
        ({"granularity": "layer"}, "granularity must be one of neuron, expert, got granularity='layer'"),
        ({"grouping": "coactivation"}, "grouping must be one of kmeans, random, contiguous"),
        ({"expert_size": 0}, "expert_size must be at least 1, got expert_size=0"),
    ],
)
def test_a_wrong_config_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        StaticPruningConfig(**options)


def wrong_model(kind: str) -> Any:
    if kind == "sparse":
        return tiny_sparse_model()
    model = tiny_dense_model()
    mlp = model.model.layers[1].mlp
    if kind == "width":
        mlp.up_proj, mlp.gate_proj = nn.Linear(HIDDEN, 8), nn.Linear(HIDDEN, 8)
        mlp.down_proj = nn.Linear(8, HIDDEN)
    elif kind == "wrapped":
        mlp.up_proj = nn.Sequential(mlp.up_proj)
    elif kind == "nan":
        with torch.no_grad():
            mlp.up_proj.weight[0] = float("nan")
    elif kind == "headless":
        model.model.layers = nn.ModuleList()
    else:
        model.config.model_type = "no family"
    return model


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("sparse", "model must be dense, got an LTE model"),
        ("width", r"model must have FFNs of one width, got widths \[8, 64\]"),
        ("wrapped", "model.layers.1.mlp.up_proj must be a plain floating-point nn.Linear"),
        ("nan", "activations must be finite"),
        ("headless", "model must contain LlamaMLP modules, got none"),
        ("family", "model_type must be one of"),
    ],
)
def test_a_wrong_model_is_refused_and_unchanged(kind: str, message: str) -> None:
    model = wrong_model(kind)
    names = [name for name, _ in model.named_modules()]
    with pytest.raises(ValueError, match=message):
        prune_static_(model, HALF, calibration())
    assert [name for name, _ in model.named_modules()] == names
    assert model.config.intermediate_size == NEURONS


def test_no_calibration_and_experts_that_do_not_fit_are_refused() -> None:
    model = tiny_dense_model()
    with pytest.raises(ValueError, match="batches must hold at least one calibration token, got none"):
        prune_static_(model, HALF, [])
    with pytest.raises(ValueError, match="expert_size must divide the number of FFN neurons"):
        prune_static_(model, StaticPruningConfig(expert_size=48), calibration())
    assert not model.model.layers[0].mlp.down_proj._forward_pre_hooks
