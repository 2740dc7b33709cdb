"""Random, noisy top-K and sigma-MoE routers: the selection, the losses, and the properties that are stated of them."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import lte
from lte.hf.install import wrapped_ffns
from lte.methods.noisy_topk import NoisyTopkConfig, squared_variation, topk_softmax
from lte.methods.sigma_moe import SigmaMoeConfig
from lte.train.config import TrainConfig
from lte.train.two_stage import train_two_stage
from tests.methods.methods import calibration_batches, config_for
from tests.tiny_models import HIDDEN, NEURONS, logits_of, tiny_dense_model
from tests.train.toy import toy_rows

EXPERTS, KEPT = 8, 4
ALL = torch.ones(2, 5, dtype=torch.bool)


def model_of(method: str, **settings: Any) -> Any:
    return lte.sparsify_(tiny_dense_model(), config_for(method, **settings), calibration=calibration_batches())


def first_ffn(model: Any) -> Any:
    return next(iter(wrapped_ffns(model).values()))


@torch.no_grad()
def randomise_(ffn: Any) -> Any:
    for router in (ffn.router, getattr(ffn, "noise_router", ffn.router)):
        router.weight.normal_(std=HIDDEN**-0.5)
    return ffn


def multipliers_of(ffn: Any, x: Tensor) -> Tensor:
    hidden = torch.randn(*x.shape[:-1], NEURONS)
    return ffn.multipliers(x, hidden, hidden)


@pytest.mark.parametrize("method", ["random_router", "noisy_topk", "sigma_moe"])
def test_experts_are_those_of_lte(method: str) -> None:
    model = model_of(method, grouping="kmeans", seed=3)
    sparse: Any = lte.sparsify_(tiny_dense_model(), lte.LteConfig(expert_size=8, seed=3))
    for name, ffn in lte.sparse_ffns(sparse).items():
        other = model.get_submodule(name)
        assert torch.equal(ffn.part("down_proj").weight, other.part("down_proj").weight)


@pytest.mark.parametrize("method", ["random_router", "noisy_topk", "sigma_moe"])
def test_whole_experts_are_kept_as_many_as_the_target_says(method: str) -> None:
    ffn = randomise_(first_ffn(model_of(method)))
    kept = multipliers_of(ffn, torch.randn(2, 5, HIDDEN)).unflatten(-1, (EXPERTS, -1))
    assert (kept == kept[..., :1]).all()
    assert ((kept[..., 0] > 0).sum(-1) == KEPT).all()
    assert len(kept[..., 0].flatten(0, 1).gt(0).unique(dim=0)) > 1


@pytest.mark.parametrize("grouping", ["coactivation", "contribution", "chunks"])
def test_groupings_on_text_need_text(grouping: Any, tokens: Tensor) -> None:
    config = config_for("sigma_moe", grouping=grouping)
    with pytest.raises(ValueError, match="sigma_moe must get calibration batches, got none; pass calibration"):
        lte.sparsify_(tiny_dense_model(), config)
    assert (
        logits_of(lte.sparsify_(tiny_dense_model(), config, calibration=calibration_batches()), tokens).isfinite().all()
    )


def test_random_routers_follow_their_seed() -> None:
    one, same, other = (first_ffn(model_of("random_router", seed=seed)).router.weight for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    layers = [ffn.router.weight for ffn in wrapped_ffns(model_of("random_router")).values()]  # type: ignore[union-attr]
    assert not torch.equal(*layers)
    assert one.std().item() == pytest.approx(HIDDEN**-0.5, rel=0.15)


def test_gates_are_a_softmax_over_the_largest() -> None:
    gates = topk_softmax(torch.tensor([[1.0, 3.0, 2.0, 0.0]]), 2)
    high = math.e / (1 + math.e)
    torch.testing.assert_close(gates, torch.tensor([[0.0, high, 1 - high, 0.0]]))


def test_the_variation_is_0_for_equal_experts_and_largest_for_one_alone() -> None:
    assert squared_variation(torch.full((8,), 3.0)) == 0
    assert squared_variation(torch.eye(8)[0]).item() == pytest.approx(7)


def test_noise_is_for_training_alone() -> None:
    ffn, x = randomise_(first_ffn(model_of("noisy_topk"))), torch.randn(2, 5, HIDDEN)
    assert torch.equal(multipliers_of(ffn.eval(), x), multipliers_of(ffn, x))
    assert not torch.equal(multipliers_of(ffn.train(), x), multipliers_of(ffn, x))


def test_the_expected_load_is_the_share_of_new_draws_in_which_an_expert_is_kept() -> None:
    ffn, x = randomise_(first_ffn(model_of("noisy_topk"))).train(), torch.randn(1, 1, HIDDEN)
    clean = ffn.router(x)
    scale = torch.nn.functional.softplus(ffn.noise_router(x))
    noisy = clean + torch.randn_like(clean) * scale
    chances = ffn._chances(clean, noisy, scale).squeeze()
    for expert in range(EXPERTS):
        drawn = noisy.expand(4000, 1, EXPERTS).clone()
        drawn[..., expert] = clean[..., expert] + torch.randn(4000, 1) * scale[..., expert]
        kept = (drawn.topk(KEPT, dim=-1).indices == expert).any(-1).float().mean().item()
        assert chances[expert].item() == pytest.approx(kept, abs=0.03)


def test_the_balance_loss_reaches_both_routers_and_counts_only_tokens_that_count() -> None:
    ffn, x = randomise_(first_ffn(model_of("noisy_topk"))).train(), torch.randn(2, 5, HIDDEN)
    multipliers_of(ffn, x)
    ffn.auxiliary_loss(ALL).backward()
    assert ffn.router.weight.grad.any()
    assert ffn.noise_router.weight.grad.any()
    assert ffn.auxiliary_loss(ALL) is None, "a pass is counted once"
    multipliers_of(ffn, x)
    gates, chances = ffn._of_thread.left["routing"]
    mask = torch.tensor([[True] * 5, [False] * 5])
    expected = 0.1 * squared_variation(gates[0].sum(0)) + 0.1 * squared_variation(chances[0].sum(0))
    torch.testing.assert_close(ffn.auxiliary_loss(mask), expected)


def largest_share(model: Any) -> float:
    """Mean share of the largest gate, over tokens and layers."""
    shares: list[Tensor] = []
    for ffn in wrapped_ffns(model).values():
        ffn.router.register_forward_hook(  # type: ignore[union-attr, operator]
            lambda module, args, logits: shares.append(topk_softmax(logits, KEPT).amax(-1).mean())
        )
    with torch.no_grad():
        for batch in calibration_batches():
            model.eval()(batch["input_ids"])
    return torch.stack(shares).mean().item()


def test_noisy_topk_collapses_to_one_expert_without_the_balance_loss(tmp_path: Path) -> None:
    """A softmax of equal gates gives each of the kept experts 1 / K; training moves it towards one of them."""
    model = model_of("noisy_topk", importance_weight=0.0, load_weight=0.0)
    assert largest_share(model) == pytest.approx(1 / KEPT)
    config = TrainConfig(recipe="method", batch_size=8, learning_rate=1e-2, stage1_steps=100, stage2_steps=40)
    train_two_stage(model, toy_rows(256), config, tmp_path)
    assert largest_share(model) > 1.5 / KEPT


def test_sigma_moe_scales_experts_by_twice_their_scores() -> None:
    ffn, x = randomise_(first_ffn(model_of("sigma_moe"))).eval(), torch.randn(2, 5, HIDDEN)
    scores = torch.sigmoid(x @ ffn.router.weight.T)
    best = scores.topk(KEPT, dim=-1)
    expected = torch.zeros_like(scores).scatter(-1, best.indices, 2 * best.values)
    torch.testing.assert_close(multipliers_of(ffn, x)[..., ::8], expected.detach())


def test_expert_dropout_is_for_training_alone_and_as_frequent_as_said() -> None:
    ffn, x = first_ffn(model_of("sigma_moe", expert_dropout=0.75)), torch.randn(40, 50, HIDDEN)
    kept = (multipliers_of(ffn.train(), x)[..., ::8] > 0).sum(-1).float()
    # Of 8 experts 2 are left on average, and 4 at most are kept.
    by_chance = torch.distributions.Binomial(8, torch.tensor(0.25)).sample((20000,)).clamp_max(4).mean()
    assert kept.mean().item() == pytest.approx(by_chance.item(), abs=0.06)
    assert ((multipliers_of(ffn.eval(), x)[..., ::8] > 0).sum(-1) == KEPT).all()


def test_rows_of_the_sigma_router_start_with_equal_norms() -> None:
    norms = first_ffn(model_of("sigma_moe")).router.weight.norm(dim=1)
    torch.testing.assert_close(norms, norms[:1].expand(EXPERTS))


def test_the_entropy_loss_is_lowest_for_a_broad_selection_over_the_tokens_that_count() -> None:
    ffn = first_ffn(model_of("sigma_moe", entropy_weight=1.0)).train()
    ffn._of_thread.left["routing"] = torch.zeros(2, 5, EXPERTS)
    assert ffn.auxiliary_loss(ALL).item() == pytest.approx(-math.log(EXPERTS))
    narrow = 100 * torch.eye(EXPERTS)[0].expand(2, 5, EXPERTS)
    ffn._of_thread.left["routing"] = narrow
    assert ffn.auxiliary_loss(ALL).item() == pytest.approx(0)
    # Different experts for different tokens are broad as well; the mask leaves one of them.
    ffn._of_thread.left["routing"] = torch.stack([narrow[0], 100 * torch.eye(EXPERTS)[1].expand(5, EXPERTS)])
    half = copy.copy(ffn._of_thread.left["routing"])
    assert ffn.auxiliary_loss(ALL).item() == pytest.approx(-math.log(2))
    ffn._of_thread.left["routing"] = half
    assert ffn.auxiliary_loss(torch.tensor([[True] * 5, [False] * 5])).item() == pytest.approx(0)


@pytest.mark.parametrize(
    ("config_class", "settings", "message"),
    [
        (NoisyTopkConfig, {"load_weight": -1}, "load_weight must not be negative, got load_weight=-1"),
        (NoisyTopkConfig, {"importance_weight": -1}, "importance_weight must not be negative, got"),
        (NoisyTopkConfig, {"grouping": "size"}, "grouping must be one of kmeans, coactivation, contribution, chunks"),
        (SigmaMoeConfig, {"entropy_weight": -1}, "entropy_weight must not be negative, got entropy_weight=-1"),
        (SigmaMoeConfig, {"expert_dropout": 1.0}, r"expert_dropout must lie in \[0, 1\), got expert_dropout=1.0"),
    ],
)
def test_wrong_settings_are_refused(config_class: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config_class(**settings)
