"""MoEfication and Deja Vu: what is predicted, and that the predictions are worth more than chance."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import lte
from lte.hf.activations import activation_name
from lte.hf.families import dense_ffns
from lte.hf.install import wrapped_ffns
from lte.methods.calibration import observe_
from lte.methods.deja_vu import DejaVuConfig
from lte.methods.moefication import MoeficationConfig, relu_fy_
from tests.methods.methods import calibration_batches, config_for
from tests.tiny_models import HIDDEN, NEURONS, VOCAB, auto_class, logits_of, row_of, tiny_dense_model


def text(seed: int) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [{"input_ids": torch.randint(3, VOCAB, (16, 32), generator=generator)} for _ in range(4)]


def first_ffn(model: Any) -> Any:
    return next(iter(wrapped_ffns(model).values()))


def recall(model: Any, kept: Any, wanted: Any) -> float:
    """Share of what is wanted that is kept, over held-out text and all FFNs; both map (ffn, x, activated, hidden)."""
    shares: list[Tensor] = []

    def see(name: str, ffn: Any, values: tuple[Tensor, ...]) -> None:
        want = wanted(ffn, *values)
        shares.append((want * kept(ffn, *values)).sum() / want.sum())

    observe_(model, text(9), see)
    return torch.stack(shares).mean().item()


def kept_neurons(ffn: Any, x: Tensor, activated: Tensor, hidden: Tensor) -> Tensor:
    return ffn.multipliers(x, activated, hidden)


@pytest.mark.parametrize(("model_type", "least"), [("llama", 0.6), ("opt", 0.65)])
def test_deja_vu_predicts_the_neurons_that_matter(model_type: str, least: float) -> None:
    config = DejaVuConfig(rank=16, fit_epochs=20, fit_learning_rate=1e-2)
    model = lte.sparsify_(tiny_dense_model(model_type), config, calibration=text(1))
    assert recall(model, kept_neurons, lambda ffn, x, activated, hidden: ffn.labels(hidden)) > least
    unfitted = DejaVuConfig(rank=16, fit_epochs=1, fit_learning_rate=1e-9)
    chance = lte.sparsify_(tiny_dense_model(model_type), unfitted, calibration=text(1))
    assert recall(chance, kept_neurons, lambda ffn, x, activated, hidden: ffn.labels(hidden)) < 0.58


def test_deja_vu_labels_are_the_positive_neurons_of_relu_and_the_largest_of_others() -> None:
    hidden = torch.randn(6, NEURONS)
    relu = first_ffn(
        lte.sparsify_(tiny_dense_model("opt"), DejaVuConfig(fit_epochs=1), calibration=calibration_batches())
    )
    assert torch.equal(relu.labels(hidden.relu()), (hidden > 0).float())
    config = DejaVuConfig(fit_epochs=1, target_sparsity=0.75)
    silu = first_ffn(lte.sparsify_(tiny_dense_model(), config, calibration=calibration_batches()))
    assert silu.labels(hidden).sum(-1).tolist() == [NEURONS // 4] * 6
    assert silu.labels(hidden)[0, hidden[0].abs().argmax()] == 1


@pytest.mark.parametrize(("hidden_size", "rank"), [(12288, 1000), (4096, 333), (576, 47), (8, 1)])
def test_the_rank_is_the_papers_scaled(hidden_size: int, rank: int) -> None:
    assert DejaVuConfig().rank_for(hidden_size) == rank
    assert DejaVuConfig(rank=5).rank_for(hidden_size) == 5


def test_fitting_changes_the_selector_alone() -> None:
    dense = tiny_dense_model()
    model = lte.sparsify_(copy.deepcopy(dense), DejaVuConfig(fit_epochs=2), calibration=calibration_batches())
    own = model.state_dict()
    assert all(torch.equal(value, own[name]) for name, value in dense.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not any(module.observer is not None for module in wrapped_ffns(model).values())  # type: ignore[union-attr, operator]


def expert_scores(ffn: Any, x: Tensor, activated: Tensor, hidden: Tensor) -> Tensor:
    return ffn.scores(activated)


def kept_experts(ffn: Any, x: Tensor, activated: Tensor, hidden: Tensor) -> Tensor:
    return ffn.expert_multipliers(x, activated, hidden)


def test_moefication_routers_find_the_experts_of_the_largest_scores() -> None:
    config: Any = config_for("moefication", grouping="kmeans", fit_epochs=30)
    model = lte.sparsify_(tiny_dense_model("opt"), config, calibration=text(1))
    truth = lte.sparsify_(tiny_dense_model("opt"), config_for("moefication ground truth", grouping="kmeans"))
    chance = lte.sparsify_(tiny_dense_model("opt"), config_for("random_router", grouping="kmeans"))
    best, routed = (recall(one, kept_experts, expert_scores) for one in (truth, model))
    by_chance = recall(
        chance, kept_experts, lambda ffn, x, activated, hidden: ffn.by_expert(activated.clamp_min(0)).sum(-1)
    )
    assert by_chance < 0.55
    assert best > routed > by_chance + 0.5 * (best - by_chance)


@torch.no_grad()
def test_ground_truth_keeps_the_experts_of_the_largest_sums_of_positive_activations() -> None:
    dense = relu_fy_(tiny_dense_model())
    config = config_for("moefication ground truth", grouping="contiguous", target_sparsity=0.75)
    model: Any = lte.sparsify_(copy.deepcopy(dense), config)
    mlp: Any = dense.model.layers[0].mlp  # type: ignore[union-attr, operator]
    x = torch.randn(6, HIDDEN)
    gate = mlp.gate_proj(x).relu()
    best = gate.unflatten(1, (8, 8)).sum(-1).topk(2).indices
    mask = torch.zeros(6, 8).scatter(1, best, 1.0).repeat_interleave(8, 1)
    expected = mlp.down_proj(gate * mlp.up_proj(x) * mask)
    torch.testing.assert_close(model.model.layers[0].mlp(x), expected)


def test_the_router_starts_from_the_experts_mean_normalised_weights() -> None:
    config: Any = config_for("moefication", grouping="contiguous", fit_epochs=1, fit_learning_rate=1e-9)
    ffn = first_ffn(lte.sparsify_(tiny_dense_model(), config, calibration=calibration_batches()))
    rows = torch.nn.functional.normalize(ffn.part("gate_proj").weight, dim=1)
    torch.testing.assert_close(ffn.router.down, rows.unflatten(0, (8, 8)).mean(1), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(ffn.router.weight, torch.eye(8), atol=1e-6, rtol=1e-5)


def test_any_family_becomes_a_relu_model_that_saves_and_loads(model_type: str, tokens: Tensor, tmp_path: Any) -> None:
    model: Any = relu_fy_(tiny_dense_model(model_type))
    family = row_of(model_type)
    for ffn in dense_ffns(model, family).values():
        *path, name = family.layout.activation.split(".")
        assert activation_name(getattr(ffn.get_submodule(".".join(path)), name)) == "relu"
    model.save_pretrained(tmp_path)
    loaded = auto_class(model_type).from_pretrained(tmp_path).eval()
    assert torch.equal(logits_of(loaded, tokens), logits_of(model, tokens))


def test_relu_makes_real_zeros(tokens: Tensor) -> None:
    dense = tiny_dense_model()
    changed = relu_fy_(copy.deepcopy(dense))
    assert not torch.equal(logits_of(changed, tokens), logits_of(dense, tokens))
    shares: list[float] = []
    model = lte.sparsify_(changed, config_for("kla"))
    observe_(model, text(3), lambda name, ffn, values: shares.append((values[2] == 0).float().mean().item()))
    assert min(shares) > 0.3
    assert changed.config.hidden_act == "relu"  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("config_class", "settings", "message"),
    [
        (DejaVuConfig, {"rank": 0}, "rank must be positive, got rank=0"),
        (DejaVuConfig, {"fit_epochs": 0}, "fit_epochs must be positive, got fit_epochs=0"),
        (DejaVuConfig, {"fit_learning_rate": -1.0}, "fit_learning_rate must be positive, got"),
        (MoeficationConfig, {"selection": "oracle"}, "selection must be one of ground_truth, router, got"),
        (MoeficationConfig, {"fit_epochs": 0}, "fit_epochs must be positive, got fit_epochs=0"),
    ],
)
def test_wrong_settings_are_refused(config_class: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config_class(**settings)


def test_a_loss_that_is_not_finite_is_told() -> None:
    dense = tiny_dense_model()
    with torch.no_grad():
        dense.model.layers[0].mlp.gate_proj.weight[0] = float("nan")
    with pytest.raises(ValueError, match=r"the loss of model.layers.1.mlp.predictor must be finite, got nan"):
        lte.sparsify_(dense, DejaVuConfig(), calibration=calibration_batches())
