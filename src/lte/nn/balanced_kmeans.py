"""Balanced k-means on a matrix of inner products: experts of exactly equal size.

With equal sizes, k-means needs the Gram matrix G = X X^T alone: the within-expert sum of squares is
sum_i G_ii - (1 / S) sum_e sum_{i, j in e} G_ij, so lowering the inertia is raising the similarity inside experts. The
same code therefore groups neurons by co-activation, with counts in the place of G.

G holds integers that fp32 sums represent exactly (`integer_gram`), and everything after it is integer arithmetic in
fp64. No sum depends on its order, so a CPU, a GPU, and any number of threads give the same grouping, bit for bit.

Shapes: F neurons, D width of the features, E = F / S experts of S neurons.
"""

from __future__ import annotations

import torch
from torch import Tensor

# fp32 adds integers exactly up to 2^24, so no row of integers may be longer than 2^12.
MAX_NORM = 2.0**12
# A few huge rows would leave all others without resolution; rows this much longer than the median are shortened.
MAX_OVER_MEDIAN = 16
# 32 MiB per block of rows at D = 4096: conversions to fp64 stay small beside G.
BLOCK_ROWS = 1024
MAX_ROUNDS = 500
# Rounds of choosing disjoint pairs of experts before the swaps are made: four leave few experts without a partner.
MATCHING_ROUNDS = 4


def integer_gram(features: Tensor) -> Tensor:
    """Inner products of the centred rows, rounded to integers that are the same on every device.

    The rows are rounded to integers of Euclidean norm at most 2^12 (at D = 4096 about 64 steps per standard
    deviation, an error of 0.5%). By Cauchy-Schwarz every partial sum of an inner product stays below 2^24, where
    fp32 is exact in any order of summation.

    Args:
        features: [F, D] of any floating dtype, finite, on the CPU or a CUDA device.

    Returns:
        fp32 [F, F] of integers, on the device of `features`.

    Raises:
        ValueError: if `features` holds NaN or infinity.
    """
    rows = _integer_rows(features)
    num_rows = len(rows)
    gram = torch.empty(num_rows, num_rows, device=rows.device)
    blocks = [slice(start, start + BLOCK_ROWS) for start in range(0, num_rows, BLOCK_ROWS)]
    for index, block in enumerate(blocks):
        left = rows[block].float()
        # G is symmetric: the blocks on and above the diagonal are 55% of the work at F = 11008.
        for other in blocks[index:]:
            product = _exact_product(left, rows[other].float())
            gram[block, other] = product
            gram[other, block] = product.T
    return gram


def _exact_product(left: Tensor, right: Tensor) -> Tensor:
    """left @ right.T for integers, in fp32, whatever precision torch's matrix products are set to.

    TF32 and bf16 products would round the integers. fp64 is never reduced on a GPU; on the CPU it would take twice as
    long, and numpy's fp32 product is beyond the reach of those settings.
    """
    if left.is_cuda:
        return (left.double() @ right.double().T).float()
    return torch.from_numpy(left.numpy() @ right.numpy().T)


def _integer_rows(features: Tensor) -> Tensor:
    """The rows [F, D], centred, scaled and rounded; int16, with norms of at most `MAX_NORM`."""
    peak = features.abs().max().double().item()
    if not 0 <= peak < float("inf"):
        raise ValueError(f"features must be finite, got features with a largest value of {peak}; check the weights")
    # A first, fine grid of integers up to 2^19 makes the mean and, up to D = 8192, the squared norms exact in fp64.
    fine = 2.0**19 / max(peak, 1e-290)
    blocks = features.split(BLOCK_ROWS)
    mean = torch.stack([(block.double() * fine).round().sum(0) for block in blocks]).sum(0) / len(features)
    mean = mean.round()
    norms = torch.cat([((block.double() * fine).round() - mean).square().sum(1) for block in blocks]).sqrt()
    median = norms.sort().values[len(norms) // 2].item()
    longest = min(norms.max().item(), MAX_OVER_MEDIAN * median or float("inf"))
    # Rounding moves a row by at most half a step per column.
    steps = (MAX_NORM - 0.5 * features.shape[1] ** 0.5) / max(longest, 1.0)
    rows = torch.empty(features.shape, device=features.device, dtype=torch.int16)
    for start, block in zip(range(0, len(features), BLOCK_ROWS), blocks, strict=True):
        shorten = (longest / norms[start : start + BLOCK_ROWS]).clamp(max=1.0).nan_to_num(1.0)
        centred = (block.double() * fine).round() - mean
        rows[start : start + BLOCK_ROWS] = (centred * (steps * shorten[:, None])).round().to(torch.int16)
    return rows


def partition(similarity: Tensor, expert_size: int, seed: int) -> Tensor:
    """Splits neurons into experts of equal size with a large similarity inside each expert.

    First experts are carved one after another: a random free neuron, its S nearest free neurons, then the S free
    neurons nearest to the mean of those. Then pairs of neurons change places wherever this raises the similarity
    inside their two experts, in many disjoint pairs of experts at a time, until none of the swaps tried helps or
    `MAX_ROUNDS` have passed. Of an expert's neurons only the best to leave is tried for each other expert.

    Args:
        similarity: symmetric fp32 [F, F] of integers of at most 2^24, from `integer_gram` or co-activation counts.
        expert_size: S, a divisor of F.
        seed: of the neurons that start the experts.

    Returns:
        int64 [E, S], the neurons of each expert in no particular order, on the device of `similarity`.
    """
    num_neurons = len(similarity)
    if expert_size in (1, num_neurons):
        return torch.arange(num_neurons, device=similarity.device).view(-1, expert_size)
    experts = _carve(similarity, expert_size, seed)
    _swap_(experts, similarity)
    return experts


class _RowSums:
    """Exact sums of few rows, through the same memory each time: asked for anew, it fragments the heap by 0.5 GB.

    Args:
        matrix: fp32 [F, F] of integers.
        most: rows at once.
    """

    def __init__(self, matrix: Tensor, most: int):
        self.matrix = matrix
        self.narrow, self.wide = (
            torch.empty(most, matrix.shape[1], dtype=dtype, device=matrix.device)
            for dtype in (matrix.dtype, torch.float64)
        )

    def __call__(self, rows: Tensor) -> Tensor:
        """The sum [F] of the rows with these indices, in fp64."""
        count = len(rows)
        torch.index_select(self.matrix, 0, rows, out=self.narrow[:count])
        return self.wide[:count].copy_(self.narrow[:count]).sum(0)


def _carve(similarity: Tensor, expert_size: int, seed: int) -> Tensor:
    """Start experts [E, S]: each takes the free neurons nearest to a random free one."""
    num_neurons, device = len(similarity), similarity.device
    # Places in a random order of all neurons; drawn on the CPU, so that the device does not matter.
    priority = torch.randperm(num_neurons, generator=torch.Generator().manual_seed(seed)).to(device)
    index = torch.arange(num_neurons, device=device)
    own = similarity.diagonal().double()
    taken = torch.zeros(num_neurons, dtype=torch.bool, device=device)
    experts = []
    sum_rows = _RowSums(similarity, expert_size)
    for _ in range(num_neurons // expert_size):
        center = priority.masked_fill(taken, num_neurons).argmin()
        chosen = center[None]
        for _ in range(2):
            # -|x - c|^2 times the size of `chosen`, up to a constant. Integers: the index breaks ties exactly.
            score = 2 * sum_rows(chosen) - len(chosen) * own
            score = (score * num_neurons - index).masked_fill(taken, -torch.inf)
            chosen = score.topk(expert_size).indices
        taken[chosen] = True
        experts.append(chosen)
    return torch.stack(experts)


def _swap_(experts: Tensor, similarity: Tensor) -> None:
    """Swaps neurons between experts [E, S] in place wherever this raises the similarity inside experts.

    With A_ei = sum_{k in e} G_ki, moving i from expert a to b and j back lowers the summed squared distances by 2 / S
    times (A_bi - A_ai + G_ii) + (A_aj - A_bj + G_jj) - 2 G_ij. That counts the shift of both centroids. Lloyd's rule
    lacks the three terms in G and stops early at high D: on SmolLM2's gate weights it takes 2.9% off the inertia of
    random groups, these swaps 5.1%.
    """
    num_experts, size = experts.shape
    order = experts.view(-1)
    # Column p is the neuron at place p of `order`, so that the members of an expert lie side by side.
    affinity = torch.empty(num_experts, len(order), dtype=torch.float64, device=order.device)
    sum_rows = _RowSums(similarity, size)
    for row, expert in zip(affinity, experts, strict=True):
        row.copy_(sum_rows(expert)[order])
    own = similarity.diagonal().double()
    first_place = torch.arange(0, len(order), size, device=order.device)[:, None]
    for _ in range(MAX_ROUNDS):
        gain_of_leaving, member = _best_moves(affinity, own[order], num_experts)
        place = first_place + member
        neuron = order[place]
        gain = gain_of_leaving + gain_of_leaving.T - 2 * similarity[neuron, neuron.T]
        left, right = _disjoint_pairs(gain.fill_diagonal_(0))
        if not len(left):
            return
        here, there = place[left, right], place[right, left]
        goes, comes = order[here], order[there]
        order[here], order[there] = comes, goes
        affinity[:, here], affinity[:, there] = affinity[:, there], affinity[:, here]
        # These three read and write whole rows; indexing with brackets takes two to ten times as long on a CPU.
        change = similarity.index_select(0, comes) - similarity.index_select(0, goes)
        change = change.index_select(1, order).double()
        affinity.index_add_(0, left, change).index_add_(0, right, change, alpha=-1)


def reassign(affinity: Tensor) -> Tensor:
    """Moves neurons to the experts that they have most affinity to; all experts keep their size.

    Pairs of neurons of two experts change places where this raises the summed affinity of all neurons to their own
    expert, in many disjoint pairs of experts at a time, until no swap does. A neuron that gains nothing stays where it
    is. Of what the best assignment gains (a linear program, 50 times slower at F = 1536) it gained 99.5% on affinities
    with structure and 97.5% on pure noise.

    Args:
        affinity: [F, E] of any floating dtype, finite; expert e now owns the neurons [e S, (e + 1) S). It is rounded to
            integers of at most 2^30, so that the result follows from it bit for bit on every device.

    Returns:
        int64 [F] on the device of `affinity`, a permutation: place p goes to the neuron `order[p]`.

    Raises:
        ValueError: if `affinity` holds NaN or infinity.
    """
    num_neurons, num_experts = affinity.shape
    order = torch.arange(num_neurons, device=affinity.device)
    largest = affinity.abs().max().item()
    if not 0 <= largest < float("inf"):
        raise ValueError(f"affinity must be finite, got a largest value of {largest}; check the activations")
    # Column p is the neuron at place p of `order`.
    columns = (affinity.T.double() * (2.0**30 / max(largest, 1e-290))).round()
    nothing = torch.zeros(num_neurons, dtype=torch.float64, device=affinity.device)
    first_place = torch.arange(0, num_neurons, num_neurons // num_experts, device=affinity.device)[:, None]
    for _ in range(MAX_ROUNDS * num_experts):
        gain_of_leaving, member = _best_moves(columns, nothing, num_experts)
        place = first_place + member
        left, right = _disjoint_pairs((gain_of_leaving + gain_of_leaving.T).fill_diagonal_(0))
        if not len(left):
            break
        here, there = place[left, right], place[right, left]
        order[here], order[there] = order[there], order[here]
        columns[:, here], columns[:, there] = columns[:, there], columns[:, here]
    return order


def _best_moves(affinity: Tensor, own: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """For experts a, b the largest A_bi - A_ai + G_ii over the neurons i of a, and which member i is; both [E, E].

    Args:
        affinity: A [E, F] in the order of places.
        own: G_ii [F] in the order of places.
        num_experts: E.
    """
    num_neurons = affinity.shape[1]
    size = num_neurons // num_experts
    place = torch.arange(num_neurons, device=affinity.device)
    current = affinity.gather(0, (place // size)[None]).squeeze(0)
    # The member rides in the value modulo S: one maximum, several times faster than a maximum with indices on
    # the CPU, and ties go to the first member.
    code = (own - current) * size + (size - 1 - place % size)
    best = torch.add(code, affinity, alpha=size).view(num_experts, num_experts, size).amax(2).T
    return best.div(size, rounding_mode="floor"), size - 1 - best.remainder(size).long()


def _disjoint_pairs(gain: Tensor) -> tuple[Tensor, Tensor]:
    """Pairs of experts with a positive gain, no expert in two pairs: those that are each other's best free partner.

    Args:
        gain: symmetric [E, E] of what the best swap gains; the entries of chosen experts are set to 0.
    """
    chosen = torch.zeros_like(gain, dtype=torch.bool)
    index = torch.arange(len(gain), device=gain.device)
    for _ in range(MATCHING_ROUNDS):
        most, partner = gain.max(1)
        mutual = (partner[partner] == index) & (most > 0)
        chosen[index, partner] |= mutual
        gain.masked_fill_(mutual[:, None] | mutual[None, :], 0)
    left, right = chosen.triu().nonzero(as_tuple=True)
    return left, right
