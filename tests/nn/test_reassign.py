"""Assigning neurons to experts of fixed size by their affinity."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lte.nn.balanced_kmeans import reassign


def total(affinity: Tensor, order: Tensor) -> float:
    """The summed affinity of neurons to the experts whose places they have."""
    num_neurons, num_experts = affinity.shape
    experts = torch.arange(num_neurons) // (num_neurons // num_experts)
    return affinity[order, experts].sum().item()


def structured(num_neurons: int, num_experts: int, seed: int = 0) -> Tensor:
    """Busy neurons and experts, a few common directions, and neurons of very different size."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    busy = draw(num_neurons, 1).abs() * draw(1, num_experts).abs()
    return (busy + draw(num_neurons, 4) @ draw(4, num_experts)) * draw(num_neurons, 1).abs() ** 3


@pytest.mark.parametrize(("neurons", "experts"), [(64, 8), (96, 4), (60, 60), (64, 1), (768, 24)])
def test_the_sum_comes_close_to_the_best_one(neurons: int, experts: int) -> None:
    optimize = pytest.importorskip("scipy.optimize")
    affinity = structured(neurons, experts)
    order = reassign(affinity)
    assert torch.equal(order.sort().values, torch.arange(neurons))
    # Each expert as often as it has places.
    places = affinity.repeat_interleave(neurons // experts, 1).numpy()
    best = places[optimize.linear_sum_assignment(places, maximize=True)].sum()
    start = total(affinity, torch.arange(neurons))
    assert total(affinity, order) - start >= 0.97 * (best - start)


def test_no_swap_of_two_neurons_helps_in_the_end() -> None:
    affinity = structured(64, 8, seed=1)
    placed = affinity[reassign(affinity)]
    experts = torch.arange(64) // 8
    own = placed.gather(1, experts[:, None])
    change = placed[:, experts] - own
    assert (change + change.T).max() <= 1e-6 * affinity.abs().max()


def test_neurons_that_gain_nothing_stay() -> None:
    assert torch.equal(reassign(torch.zeros(16, 4)), torch.arange(16))
    # What all experts, or all neurons, have in common does not count.
    common = torch.rand(16, 1, dtype=torch.float64).round(decimals=3) + torch.tensor([[0.0, 1.0, 2.0, 4.0]])
    assert torch.equal(reassign(common.double().mul(2**20).round()), torch.arange(16))
    one = torch.zeros(16, 4)
    one[0, 1] = 1.0
    order = reassign(one)
    assert order[:4].tolist().count(0) == 0
    assert 0 in order[4:8]
    assert (order != torch.arange(16)).sum() == 2


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_affinities_that_are_not_finite_are_errors(bad: float) -> None:
    affinity = torch.zeros(8, 2)
    affinity[3, 1] = bad
    with pytest.raises(ValueError, match=r"affinity must be finite, got a largest value of (nan|inf); check"):
        reassign(affinity)
