"""Grouping the neurons of an FFN into experts of exactly equal size.

The grouping follows from the features and the seed alone: random draws are made on the CPU, and all decisions rest on
exact integer sums (`lte.nn.balanced_kmeans`), so devices, thread counts and matrix product settings do not matter.

Shapes: F neurons, D width of the features, E = F / S experts of S neurons, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import get_args

import torch
from torch import Tensor

from lte.config import Grouping, check_choice, check_expert_size
from lte.nn.balanced_kmeans import integer_gram, partition

# Of a matrix [F, F] that are in fp64 at once: 22 MB at F = 11008.
_ROWS = 256


def group_neurons(
    features: Tensor | None,
    *,
    num_neurons: int,
    expert_size: int,
    method: Grouping,
    seed: int,
    overwrite: bool = False,
) -> Tensor:
    """The order of neurons in which expert e owns the places [e S, (e + 1) S).

    Neurons ascend within each expert, and experts ascend by their first neuron.

    Args:
        features: for `kmeans` the (gate) input weights [F, D]; for `coactivation` the counts [F, F] of
            `CoactivationCounts`, for `contribution` the products [F, F] of `ContributionProducts`, for `chunks` those
            of `ChunkProducts`; ignored otherwise. CUDA tensors are grouped on their device.
        num_neurons: F.
        expert_size: S.
        method: `kmeans` (balanced k-means, the paper's choice), `coactivation` (neurons that fire together; the
            balanced graph split of MoEfication, arXiv 2110.01786), `contribution` (balanced k-means on how strongly
            neurons contribute to each token), `chunks` (to each chunk of tokens in a row), `random`, or `contiguous`.
        seed: of the neurons that start the experts, and of the random groups.
        overwrite: whether counts and products may be lost, which saves the memory of a second [F, F].

    Returns:
        int64 [F] on the CPU, a permutation.

    Raises:
        ValueError: if `expert_size` does not divide F, `method` is unknown, or the features are missing, of another
            shape, or not finite.
    """
    check_choice("method", method, get_args(Grouping))
    check_expert_size(num_neurons, expert_size)
    if method == "contiguous":
        return torch.arange(num_neurons)
    if method == "random":
        experts = torch.randperm(num_neurons, generator=torch.Generator().manual_seed(seed)).view(-1, expert_size)
    else:
        features = _checked_features(features, num_neurons, method)
        if method != "kmeans":
            features = features.float() if overwrite else features.clone().float()
        similarity = _SIMILARITIES[method](features)
        experts = partition(similarity, expert_size, seed).cpu()
    experts = experts.sort(1).values
    return experts[experts[:, 0].argsort()].flatten()


def _checked_features(features: Tensor | None, num_neurons: int, method: Grouping) -> Tensor:
    """The features without gradient, on a device that has fp64; raises a `ValueError` if their shape is wrong."""
    square = method != "kmeans"
    source = "result of CoactivationCounts or ContributionProducts" if square else "neurons' input weights [F, D]"
    wrong = features is None or features.ndim != 2 or len(features) != num_neurons or not features.shape[1]
    if features is None or wrong or (square and features.shape[1] != num_neurons):
        shape = None if features is None else tuple(features.shape)
        raise ValueError(
            f"features must have {num_neurons} rows{' and columns' if square else ''} for method={method}, got shape "
            f"{shape}; pass the {source}"
        )
    return features.detach() if features.is_cuda else features.detach().cpu()


def _coactivation_graph_(counts: Tensor) -> Tensor:
    """Edge weights [F, F] between different neurons, in place: integers, symmetric, no loops.

    Counts are not normalised. Their cosines put 1-3% less co-activation into the experts of three layers of SmolLM2,
    and half the experts then covered fewer of the firing neurons.
    """
    least, most = counts.aminmax()
    if not (least.isfinite() and most.isfinite()):
        raise ValueError("features must be finite, got counts with NaN or infinity; check the activations")
    if least < 0 or most > 2**24:
        raise ValueError(
            f"features must be counts from 0 to 2^24, got values from {least} to {most}; pass the counts of "
            "CoactivationCounts over fewer tokens"
        )
    return _symmetric_(counts, lambda rows, columns: (rows + columns).round()).fill_diagonal_(0)


def _contribution_gram_(products: Tensor) -> Tensor:
    """The products [F, F] as integers of at most 2^24, in place."""
    largest = max(-products.min().item(), products.max().item())
    if not 0 <= largest < float("inf"):
        raise ValueError(f"features must be finite, got products of at most {largest}; check the activations")
    scale = 2.0**24 / max(largest, 1e-290)
    return _symmetric_(products, lambda rows, columns: ((rows.double() + columns.double()) / 2 * scale).round())


def _symmetric_(matrix: Tensor, function: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Puts what a function makes of each number of a matrix [F, F] and the one across in the place of both.

    Some rows at a time: in fp64 the whole would be twice as large again.
    """
    for start in range(0, len(matrix), _ROWS):
        rows, rest = slice(start, start + _ROWS), slice(start, None)
        made = function(matrix[rows, rest], matrix[rest, rows].T).to(matrix.dtype)
        matrix[rows, rest], matrix[rest, rows] = made, made.T
    return matrix


_SIMILARITIES = {"kmeans": integer_gram, "coactivation": _coactivation_graph_}
_SIMILARITIES |= dict.fromkeys(("contribution", "chunks"), _contribution_gram_)


def inertia(features: Tensor, order: Tensor, expert_size: int) -> float:
    """Mean squared distance of the feature rows to the mean of their expert.

    Args:
        features: [F, D].
        order: permutation [F] from `group_neurons`.
        expert_size: S.

    Raises:
        ValueError: if `expert_size` does not divide F.
    """
    check_expert_size(len(features), expert_size)
    grouped = features.detach()[order.to(features.device)].float().unflatten(0, (-1, expert_size))
    squares = (grouped - grouped.mean(1, keepdim=True)).square().sum(-1)
    return squares.mean(dtype=torch.float64).item()


class CoactivationCounts:
    """Counts how often two neurons fire for the same token (the graph of MoEfication, arXiv 2110.01786).

    A neuron fires where its |h| is not zero and among the `top_fraction` largest of the token: activations other
    than ReLU have no zeros to go by. Ties, which low precision makes likely, fall as `torch.topk` breaks them, so
    counts of bf16 activations may differ between devices; the grouping of given counts does not.

    Attributes:
        gram: fp32 [F, F] on the device of the activations, exact up to 2^24 tokens (485 MB at F = 11008); the
            diagonal holds how often each neuron fired.
    """

    def __init__(self, num_neurons: int, top_fraction: float = 0.1):
        if not 0 < top_fraction <= 1:
            raise ValueError(f"top_fraction must lie in (0, 1], got top_fraction={top_fraction}; 0.1 suits most FFNs")
        self.top = max(1, round(top_fraction * num_neurons))
        self.gram = torch.zeros(num_neurons, num_neurons)

    @torch.no_grad()
    def update(self, intermediate: Tensor) -> None:
        """Adds the intermediate activations [T, F] of some tokens.

        Raises:
            ValueError: if `intermediate` has another shape.
        """
        if intermediate.ndim != 2 or intermediate.shape[1] != len(self.gram):
            raise ValueError(
                f"intermediate must have shape [tokens, {len(self.gram)}], got shape {tuple(intermediate.shape)}; "
                "flatten batch and sequence"
            )
        largest, index = intermediate.abs().topk(self.top, dim=1)
        fires = torch.zeros(intermediate.shape, device=intermediate.device)
        fires.scatter_(1, index, (largest > 0).float())
        self.gram = self.gram.to(fires.device)
        self.gram.addmm_(fires.T, fires)


class ContributionProducts:
    """Inner products of neurons' contributions over tokens: the Gram matrix of k-means on activity profiles.

    What neuron i adds to the FFN's output has the norm c_i = |h_i| ||w_down,i||. Its profile is sqrt(c_i) less the
    token's mean over the neurons, since a few tokens and neurons are far larger than all others. Neurons with like
    profiles are strong for the same tokens, so that an expert of them is worth its reading or is not. Sums of floats
    depend on the device in their last bits, and so may the groups.

    Args:
        down_norms: ||w_down,i|| of each neuron, [F].

    Attributes:
        gram: fp32 [F, F].
    """

    def __init__(self, down_norms: Tensor):
        self.down_norms = down_norms.detach().float()
        self.gram = torch.zeros(len(down_norms), len(down_norms), device=down_norms.device)

    @torch.no_grad()
    def update(self, intermediate: Tensor) -> None:
        """Adds the intermediate activations [T, F] of some tokens."""
        profiles = self._profiles(intermediate)
        self.gram.addmm_(profiles.T, profiles)

    def _profiles(self, intermediate: Tensor) -> Tensor:
        profiles = (intermediate.float().abs() * self.down_norms).sqrt()
        return profiles.sub_(profiles.mean(-1, keepdim=True))


class ChunkProducts(ContributionProducts):
    """As `ContributionProducts`, of profiles over chunks of tokens in a row: the means of the tokens' profiles.

    Neurons with like profiles are strong in the same stretches of text, so that neighbouring tokens need the same
    experts.

    Args:
        down_norms: ||w_down,i|| of each neuron, [F].
        chunk: tokens.

    Attributes:
        chunks: how many were added.
    """

    def __init__(self, down_norms: Tensor, chunk: int = 8):
        super().__init__(down_norms)
        self.chunk, self.chunks = chunk, 0

    @torch.no_grad()
    def update_rows(self, intermediate: Tensor, mask: Tensor) -> None:
        """Adds the intermediate activations [B, T, F] of rows, by chunks from their start.

        Args:
            intermediate: of all tokens.
            mask: bool [B, T], which tokens count; a chunk does if all of its tokens do.
        """
        whole = mask.shape[1] // self.chunk * self.chunk
        shape = whole // self.chunk, self.chunk
        counted = mask[:, :whole].unflatten(1, shape).all(2)
        chunks = intermediate[:, :whole].unflatten(1, shape)[counted]
        profiles = self._profiles(chunks).mean(1)
        self.chunks += len(profiles)
        self.gram.addmm_(profiles.T, profiles)


class UsageCounts:
    """Counts how often each neuron is among those that contribute most to a token.

    What neuron i adds to the FFN's output has the norm c_i = |h_i| ||w_down,i||. Counting the tokens in which it is one
    of the largest, and not adding it up, keeps a few tokens with huge activations from deciding.

    Args:
        down_norms: ||w_down,i|| of each neuron, [F].
        top_fraction: share of a token's neurons that count as the largest.

    Attributes:
        counts: fp32 [F], exact up to 2^24 tokens.
    """

    def __init__(self, down_norms: Tensor, top_fraction: float = 0.1):
        self.down_norms = down_norms.detach().float()
        self.top = max(1, round(top_fraction * len(down_norms)))
        self.counts = torch.zeros(len(down_norms), device=down_norms.device)

    @torch.no_grad()
    def update(self, intermediate: Tensor) -> None:
        """Adds the intermediate activations [T, F] of some tokens."""
        largest = (intermediate.float().abs() * self.down_norms).topk(self.top, dim=1).indices
        self.counts += torch.bincount(largest.flatten(), minlength=len(self.counts))

    def most_used(self, number: int) -> Tensor:
        """The `number` neurons with the largest counts, ascending, int64 on the CPU; of equal ones the first."""
        order = self.counts.cpu().argsort(descending=True, stable=True)
        return order[:number].sort().values
