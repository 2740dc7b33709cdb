"""Grouping the neurons of an FFN into experts of exactly equal size.

Shapes: F neurons, D width of the features, E = F / S experts of S neurons.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


class CoactivationCounts:
    def __init__(self, num_neurons, top_fraction=0.1): raise NotImplementedError


def check_expert_size(num_neurons: int, expert_size: int) -> int:
    if num_neurons % expert_size:
        sizes = [s for s in range(1, num_neurons + 1) if num_neurons % s == 0]
        near = sorted(sorted(sizes, key=lambda s: abs(s - expert_size))[:6])
        raise ValueError(
            f"expert_size must divide the number of FFN neurons, got expert_size={expert_size} for {num_neurons} "
            f"neurons; sizes that fit: {', '.join(map(str, near))}"
        )
    return num_neurons // expert_size


def _deferred_acceptance(distance: np.ndarray, size: int) -> np.ndarray:
    F, E = distance.shape
    pref = np.argsort(distance, axis=1, kind="stable")
    nxt = np.zeros(F, dtype=np.int64)
    assign = np.full(F, -1)
    free = np.arange(F)
    while len(free):
        choice = pref[free, nxt[free]]
        nxt[free] += 1
        assign[free] = choice
        counts = np.bincount(assign[assign >= 0], minlength=E)
        free = []
        for e in np.flatnonzero(counts > size):
            members = np.flatnonzero(assign == e)
            order = np.argsort(distance[members, e], kind="stable")
            out = members[order[size:]]
            assign[out] = -1
            free.append(out)
        free = np.concatenate(free) if free else np.empty(0, dtype=np.int64)
    return assign


def balanced_kmeans(features: Tensor, num_experts: int, seed: int, iterations: int = 10) -> np.ndarray:
    x = features.detach().float().cpu()
    F = len(x)
    size = F // num_experts
    g = torch.Generator().manual_seed(seed)
    centroids = x[torch.randperm(F, generator=g)[:num_experts]]
    assign = None
    for _ in range(iterations):
        d = (centroids.square().sum(1) - 2 * x @ centroids.T).numpy()
        new = _deferred_acceptance(d, size)
        if assign is not None and (new == assign).all():
            break
        assign = new
        a = torch.from_numpy(assign)
        centroids = torch.zeros_like(centroids).index_add_(0, a, x) / size
    return assign


def group_neurons(features, *, num_neurons: int, expert_size: int, method: str, seed: int) -> Tensor:
    E = check_expert_size(num_neurons, expert_size)
    if method == "contiguous":
        return torch.arange(num_neurons)
    if method == "random":
        return torch.randperm(num_neurons, generator=torch.Generator().manual_seed(seed))
    assign = balanced_kmeans(features, E, seed)
    return torch.from_numpy(np.argsort(assign, kind="stable"))
