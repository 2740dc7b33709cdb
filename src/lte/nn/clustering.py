"""Grouping the neurons of an FFN into experts of exactly equal size.

Everything runs on the CPU in fp32, wherever the weights are, so that the grouping does not depend on the device.

Shapes: F neurons, D width of the features, E = F / S experts of S neurons, T tokens.
"""

from __future__ import annotations

from typing import get_args

import numpy as np
import torch
from torch import Tensor

from lte.config import Grouping, check_choice

KMEANS_ITERATIONS = 20


def check_expert_size(num_neurons: int, expert_size: int) -> int:
    """The number of experts E.

    Raises:
        ValueError: if `expert_size` does not divide `num_neurons`, naming the nearest sizes that do.
    """
    if expert_size < 1 or num_neurons % expert_size:
        divisors = [size for size in range(1, num_neurons + 1) if num_neurons % size == 0]
        nearest = sorted(sorted(divisors, key=lambda size: abs(size - expert_size))[:6])
        raise ValueError(
            f"expert_size must divide the number of FFN neurons, got expert_size={expert_size} for {num_neurons} "
            f"neurons; sizes that fit: {', '.join(map(str, nearest))}"
        )
    return num_neurons // expert_size


def group_neurons(
    features: Tensor | None, *, num_neurons: int, expert_size: int, method: Grouping, seed: int
) -> Tensor:
    """The order of neurons in which expert e owns the places [e S, (e + 1) S); int64 [F] on the CPU.

    Args:
        features: for `kmeans` the (gate) input weights [F, D]; for `coactivation` the counts [F, F] of
            `CoactivationCounts`; ignored otherwise.
        num_neurons: F.
        expert_size: S.
        method: `kmeans` (balanced k-means, the paper's choice), `coactivation` (neurons that fire together),
            `random`, or `contiguous`.
        seed: of the first centroids and of the random order.

    Raises:
        ValueError: if `expert_size` does not divide F, `method` is unknown, or features are missing or of another
            length.
    """
    check_choice("method", method, get_args(Grouping))
    num_experts = check_expert_size(num_neurons, expert_size)
    if method == "contiguous":
        return torch.arange(num_neurons)
    if method == "random":
        return torch.randperm(num_neurons, generator=torch.Generator().manual_seed(seed))
    if features is None or len(features) != num_neurons:
        shape = None if features is None else tuple(features.shape)
        raise ValueError(f"features must have {num_neurons} rows for method={method}, got shape {shape}")
    rows = features.detach().to("cpu", torch.float32)
    if method == "coactivation":
        # Cosine of two neurons' firing patterns; neurons that fire with the same others come close.
        norm = rows.diagonal().clamp_min(1).sqrt()
        rows = rows / norm[:, None] / norm[None, :]
    assignment = balanced_kmeans(rows, num_experts, seed)
    return torch.from_numpy(np.argsort(assignment, kind="stable"))


def balanced_kmeans(features: Tensor, num_experts: int, seed: int) -> np.ndarray:
    """Lloyd's k-means with exactly F / E rows per cluster; returns the cluster of each row, int64 [F].

    Each round assigns rows to centroids by deferred acceptance (Gale and Shapley): every row asks for its nearest
    centroid that has not refused it, and a centroid keeps the F / E nearest that ask. Rounds stop when nothing moves
    or after `KMEANS_ITERATIONS`. LLaMA-7B's 11008 x 4096 take seconds on two cores (benchmarks/clustering.py).

    Args:
        features: [F, D] fp32 on the CPU.
        num_experts: E, a divisor of F.
        seed: of the rows that start as centroids.
    """
    rows, size = len(features), len(features) // num_experts
    start = torch.randperm(rows, generator=torch.Generator().manual_seed(seed))[:num_experts]
    centroids, assignment = features[start], np.full(rows, -1)
    for _ in range(KMEANS_ITERATIONS):
        # Squared distance less |x|^2, which is the same for all centroids.
        distance = torch.addmm(centroids.square().sum(1), features, centroids.T, alpha=-2).numpy()
        previous, assignment = assignment, _deferred_acceptance(distance, size)
        if (assignment == previous).all():
            break
        sums = torch.zeros_like(centroids).index_add_(0, torch.from_numpy(assignment), features)
        centroids = sums / size
    return assignment


def _deferred_acceptance(distance: np.ndarray, size: int) -> np.ndarray:
    """A stable assignment of the rows of `distance` [F, E] to columns, `size` rows each; ties go to the lower row."""
    rows, columns = distance.shape
    preference = np.argsort(distance, axis=1, kind="stable")
    asked = np.zeros(rows, dtype=np.int64)
    assignment = np.full(rows, -1, dtype=np.int64)
    free = np.arange(rows)
    while len(free):
        assignment[free] = preference[free, asked[free]]
        asked[free] += 1
        held = np.flatnonzero(assignment >= 0)
        column = assignment[held]
        # Rows sorted by column, then by distance: the place within its column tells whether a row is kept.
        order = np.lexsort((held, distance[held, column], column))
        first = np.searchsorted(column[order], np.arange(columns))
        place = np.arange(len(order)) - first[column[order]]
        free = held[order[place >= size]]
        assignment[free] = -1
    return assignment


def inertia(features: Tensor, order: Tensor, expert_size: int) -> float:
    """Mean squared distance of the feature rows [F, D] to the mean of their expert, for an order of neurons."""
    grouped = features.detach().float().cpu()[order].unflatten(0, (-1, expert_size))
    return (grouped - grouped.mean(1, keepdim=True)).square().sum(-1).mean().item()


class CoactivationCounts:
    """Counts how often two neurons fire for the same token (MoEfication's graph).

    A neuron fires where its |h| is among the `top_fraction` largest of the token: activations other than ReLU have no
    zeros to go by.

    Attributes:
        counts: [F, F] fp32; the diagonal holds how often each neuron fired.
    """

    def __init__(self, num_neurons: int, top_fraction: float = 0.1):
        self.top = max(1, round(top_fraction * num_neurons))
        self.counts = torch.zeros(num_neurons, num_neurons)

    @torch.no_grad()
    def update(self, intermediate: Tensor) -> None:
        """Adds the intermediate activations [T, F] of some tokens."""
        magnitude = intermediate.abs()
        fires = torch.zeros_like(magnitude, dtype=torch.float32)
        fires.scatter_(1, magnitude.topk(self.top, dim=1).indices, 1.0)
        self.counts = self.counts.to(fires.device)
        self.counts.addmm_(fires.T, fires)
