"""The router losses against values worked out by hand, and the masks, guards and dtypes around them."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lte.nn.losses import (
    POLE_GUARD,
    active_fraction,
    efficiency_loss,
    margin_loss,
    masked_mean,
    mean_over_layers,
    near_threshold_fraction,
    separability_loss,
)

# Two tokens, two experts.
SCORES = torch.tensor([[0.9, 0.4], [0.6, 0.1]])
STATISTICS = {
    "efficiency": efficiency_loss,
    "separability": separability_loss,
    "active": active_fraction,
    "near": near_threshold_fraction,
    "mean": masked_mean,
}


def test_efficiency_by_hand() -> None:
    assert efficiency_loss(SCORES).item() == pytest.approx((0.81 + 0.16 + 0.36 + 0.01) / 4)


def test_separability_by_hand() -> None:
    # Squared distances to 0.5: 0.16, 0.01, 0.01, 0.16.
    by_hand = (1 / 0.16 + 1 / 0.01 + 1 / 0.01 + 1 / 0.16) / 4
    assert separability_loss(SCORES, guard=0.0).item() == pytest.approx(by_hand, rel=1e-5)
    with_guard = (1 / 0.17 + 1 / 0.02 + 1 / 0.02 + 1 / 0.17) / 4
    assert separability_loss(SCORES, guard=0.01).item() == pytest.approx(with_guard, rel=1e-5)


def test_separability_moves_with_the_threshold() -> None:
    by_hand = (1 / 0.36 + 1 / 0.01 + 1 / 0.09 + 1 / 0.04) / 4
    assert separability_loss(SCORES, threshold=0.3, guard=0.0).item() == pytest.approx(by_hand, rel=1e-5)


def test_guard_bounds_the_pole() -> None:
    pole = torch.full((3, 4), 0.5, requires_grad=True)
    loss = separability_loss(pole)
    loss.backward()
    assert loss.item() == pytest.approx(1 / POLE_GUARD)
    assert pole.grad is not None
    assert pole.grad.isfinite().all()
    assert separability_loss(torch.full((3, 4), 0.5), guard=0.0).item() == math.inf


def test_steepest_slope_with_the_guard_is_as_documented() -> None:
    score = torch.linspace(0, 1, 10001, dtype=torch.float64, requires_grad=True)
    (1 / ((score - 0.5).square() + POLE_GUARD)).sum().backward()
    assert score.grad is not None
    assert score.grad.abs().max().item() == pytest.approx(0.65 / POLE_GUARD**1.5, rel=0.01)
    assert score.grad.abs().max().item() == pytest.approx(650, rel=0.01)


def test_active_and_near_fractions_by_hand() -> None:
    assert active_fraction(SCORES.logit()).item() == 0.5
    # A score at tau is not active.
    assert active_fraction(torch.zeros(2, 2)).item() == 0
    tau_logit = math.log(0.3 / 0.7)
    assert active_fraction(SCORES.logit(), threshold_logit=tau_logit).item() == 0.75
    assert near_threshold_fraction(SCORES, width=0.15).item() == 0.5
    assert near_threshold_fraction(SCORES, threshold=0.1, width=0.05).item() == 0.25


@pytest.mark.parametrize("name", STATISTICS)
def test_padding_counts_in_nothing(name: str) -> None:
    statistic = STATISTICS[name]
    values = torch.rand(2, 5, 4)
    mask = torch.tensor([[True] * 3 + [False] * 2, [True] * 5])
    expected = statistic(values[mask], None)
    changed = torch.where(mask.unsqueeze(-1), values, torch.rand(2, 5, 4) * 3 - 1)
    assert statistic(values, mask).item() == pytest.approx(expected.item(), rel=1e-6)
    assert torch.equal(statistic(values, mask), statistic(changed, mask))
    assert torch.equal(statistic(values, mask.long()), statistic(values, mask))


@pytest.mark.parametrize("loss", [efficiency_loss, separability_loss])
def test_padding_gets_no_gradient(loss) -> None:
    values = torch.rand(2, 5, 4, requires_grad=True)
    mask = torch.tensor([[True] * 3 + [False] * 2, [True] * 5])
    loss(values, mask).backward()
    assert values.grad is not None
    assert (values.grad[~mask] == 0).all()
    assert (values.grad[mask] != 0).all()


@pytest.mark.parametrize("name", STATISTICS)
def test_nothing_but_padding_gives_zero(name: str) -> None:
    values = torch.rand(2, 5, 4, requires_grad=True)
    result = STATISTICS[name](values, torch.zeros(2, 5, dtype=torch.bool))
    assert result.item() == 0
    if result.requires_grad:
        result.backward()
        assert (values.grad == 0).all()  # type: ignore[union-attr]


@pytest.mark.parametrize("name", STATISTICS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_inputs_are_reduced_in_fp32(name: str, dtype: torch.dtype) -> None:
    """1,001 tokens cannot even be counted in bf16, and 1 / 0.001^2 overflows fp16."""
    values = torch.rand(1001, 3).to(dtype)
    values[0] = 0.501
    mask = torch.ones(1001, dtype=torch.bool)
    result = STATISTICS[name](values, mask)
    assert result.dtype == torch.float32
    assert torch.equal(result, STATISTICS[name](values.float(), mask))


def test_fp64_stays_fp64_and_gradients_are_right() -> None:
    mask = torch.tensor([[True, True, False], [True, False, False]])
    values = torch.rand(2, 3, 4, dtype=torch.float64).mul(0.4).requires_grad_()

    def both(values: Tensor) -> Tensor:
        return efficiency_loss(values, mask) + separability_loss(values, mask)

    assert torch.autograd.gradcheck(both, values)


def test_every_layer_counts_the_same() -> None:
    assert mean_over_layers([torch.tensor([1.0, 4.0]), torch.tensor([7.0])]).item() == 4


def test_margin_loss_by_hand() -> None:
    # Distances to 0.5: 0.5, 0, 1.5, 3.
    logits = torch.tensor([[1.0, 0.5], [-1.0, 3.5]], requires_grad=True)
    loss = margin_loss(logits, threshold_logit=0.5, margin=2.0)
    assert loss.item() == pytest.approx((0.75 + 1 + 0.25 + 0) / 4)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert gradient.tolist() == [[-0.125, 0.0], [0.125, 0.0]]
    mask = torch.tensor([True, False])
    assert margin_loss(logits, mask, threshold_logit=0.5, margin=2.0).item() == pytest.approx(0.875)
    by_layer = margin_loss(torch.stack([logits, logits + 9]), threshold_logit=0.5, margin=2.0, layers=True)
    assert by_layer.tolist() == pytest.approx([0.5, 0.0])
