"""What other experts, and choices that know the activations, would leave off together: an upper estimate.

A neuron's contribution to a token is |h| ||w_down||, squared, as a share of the sum over the token's neurons, so that
every token counts the same and the contributions of all neurons are 1. It is taken in the hidden states of the model in
hard mode, with all neurons of the layer itself on. Sums of squares leave out that neurons cancel each other.

Every choice switches on as many experts for a token as the model's own router does, so that the share per token is the
same; it takes those that contribute most. The neurons that matter for a token are as many as those experts have.

Shapes: N rows of T tokens, F neurons, E experts of S neurons.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lte.eval.inference import hard_inference, model_device
from lte.eval.token_routing import recorded_logits, routed_part
from lte.hf.install import require_sparse_ffns
from lte.hf.projections import base_of
from lte.nn.balanced_kmeans import integer_gram, partition
from lte.nn.hooks import watched_activations
from lte.nn.sparse_ffn import SparseFfn
from lte.nn.unions import off_in_a_row

CHUNK = 8
"""Tokens of a chunk by whose activity neurons are grouped."""
TOKENS = (2, 4, 8, 16)
ROWS_AT_A_TIME = 4


@dataclass(frozen=True)
class LayerActivity:
    """What the neurons and the router of an FFN did.

    Attributes:
        shares: contributions of the neurons, fp32 [N, T, F].
        active: the experts that the router switched on, bool [N, T, E].
    """

    shares: Tensor
    active: Tensor


def largest(values: Tensor, counts: Tensor) -> Tensor:
    """The largest values of each row, as many as wanted, as a mask; none that is 0. Of equal ones at the end all.

    Args:
        values: [..., M], at least 0.
        counts: whole numbers [...].
    """
    ordered = values.sort(-1, descending=True).values
    least = ordered.gather(-1, (counts.unsqueeze(-1) - 1).clamp_min(0))
    return (values >= least) & (values > 0) & (counts.unsqueeze(-1) > 0)


def expert_sums(shares: Tensor, experts: Tensor) -> Tensor:
    """The contributions of experts [..., E], for those of neurons [..., F] and the neurons of each expert [E, S]."""
    return shares[..., experts.flatten()].unflatten(-1, experts.shape).sum(-1)


def regrouped(shares: Tensor, counts: Tensor, expert_size: int, seed: int) -> Tensor:
    """Experts of neurons that matter for the same chunks of consecutive tokens: balanced k-means.

    A neuron's profile holds for each chunk for how many of its tokens the neuron matters.

    Args:
        shares: [N, T, F].
        counts: how many neurons matter for each token, [N, T].
        expert_size: S.
        seed: of the neurons that start the experts.

    Returns:
        int64 [E, S].
    """
    matter = largest(shares, counts)
    whole = matter.shape[1] // CHUNK * CHUNK
    profiles = matter[:, :whole].unflatten(1, (whole // CHUNK, CHUNK)).sum(2).flatten(0, 1)
    return partition(integer_gram(profiles.T.float()), expert_size, seed)


def shared_sparsity(values: Tensor, tokens: int, kept: float) -> float:
    """How sparse chunks can be whose tokens all read the same experts, where these keep as much as is wanted.

    Experts are taken in the order of what they contribute to their chunk, over all chunks at once: some chunks read
    more of them than others.

    Args:
        values: contributions of experts, [N, T, E].
        tokens: of a chunk.
        kept: share of all contributions that is to be kept.

    Returns:
        The share of experts that a chunk does without, mean over chunks.
    """
    whole = values.shape[1] // tokens * tokens
    sums = values[:, :whole].unflatten(1, (whole // tokens, tokens)).sum(2).double().flatten()
    reached = sums.sort(descending=True).values.cumsum(0) / sums.sum()
    # By rounding the whole may be less than all that is kept.
    return 1 - min(len(sums), int((reached < kept).sum()) + 1) / len(sums) if kept > 0 else 1.0


def layer_oracle(seen: LayerActivity, seed: int) -> dict[str, dict[str, Any]]:
    """The choices of one layer, measured on the second half of the rows; the first decides the new experts.

    Returns:
        By choice: `routers`, the model's own; `ideal`, its experts chosen by what they contribute; `regrouped`, the
        experts of `regrouped` chosen in the same way; `neurons`, experts of one neuron. Each has `kept`, the share of
        the contributions that its choice keeps, and `sparsity`, the union sparsity by number of consecutive tokens. The
        middle two also have `shared`: see `shared_sparsity`, as much being kept as by the routers; that of 1 token is
        what choices of its own would reach, with the same hindsight.
    """
    experts, neurons = seen.active.shape[-1], seen.shares.shape[-1]
    half, size = len(seen.shares) // 2, neurons // experts
    counts = seen.active.sum(-1)
    own = torch.arange(neurons, device=seen.shares.device).view(experts, size)
    new = regrouped(seen.shares[:half], counts[:half] * size, size, seed)
    shares, active, counts = seen.shares[half:], seen.active[half:], counts[half:]
    values = {name: expert_sums(shares, members) for name, members in (("ideal", own), ("regrouped", new))}
    found = {"routers": _choice(values["ideal"], active)}
    kept = found["routers"]["kept"]
    for name, sums in values.items():
        shared = {str(n): shared_sparsity(sums, n, kept) for n in (1, *_fitting(active))}
        found[name] = {**_choice(sums, largest(sums, counts)), "shared": shared}
    found["neurons"] = _choice(shares, largest(shares, counts * size))
    return found


def _fitting(active: Tensor) -> list[int]:
    return [n for n in TOKENS if n <= active.shape[1]]


def _choice(values: Tensor, active: Tensor) -> dict[str, Any]:
    kept = (values * active).sum(-1).double().mean().item()
    return {"kept": kept, "sparsity": {str(n): off_in_a_row(active, n).mean().item() for n in _fitting(active)}}


def record_activity(model: Any, ids: Tensor, layers: Sequence[int]) -> list[LayerActivity]:
    """What the neurons and routers of some layers do, on the devices where they lie.

    Args:
        model: an LTE decoder in plain PyTorch.
        ids: [N, T].
        layers: which FFNs, counted from 0.
    """
    every = list(require_sparse_ffns(model).values())
    ffns: dict[int, SparseFfn] = {layer: every[layer] for layer in layers}
    norms = {n: ffn.layout.numbers(base_of(ffn.part(ffn.layout.down))).norm(dim=0) for n, ffn in ffns.items()}
    shares: dict[int, list[Tensor]] = {layer: [] for layer in layers}
    active: dict[int, list[Tensor]] = {layer: [] for layer in layers}

    def look(layer: int, x: Tensor, hidden: Tensor) -> None:
        squares = (hidden.float() * norms[layer].to(hidden.device)).square_()
        shares[layer].append(squares / squares.sum(-1, keepdim=True).clamp_min(1e-30))

    part = routed_part(model)
    with recorded_logits(list(ffns.values())), hard_inference(model), watched_activations(ffns, look):
        for rows in ids.split(ROWS_AT_A_TIME):
            part(input_ids=rows.to(model_device(part)), use_cache=False)
            for layer, ffn in ffns.items():
                assert ffn.logits is not None
                # Some blocks flatten [B, T] before their FFN.
                active[layer].append((ffn.logits > ffn.threshold_logit).reshape(*rows.shape, -1))
                shares[layer][-1] = shares[layer][-1].reshape(*rows.shape, -1)
    return [LayerActivity(torch.cat(shares[layer]), torch.cat(active[layer])) for layer in layers]


def measure_oracle(
    model: Any, ids: Tensor, layers: int, seed: int = 0, say: Callable[[str], Any] = lambda text: None
) -> dict[str, Any]:
    """The choices of `layer_oracle` for some layers, spread over the depth.

    Args:
        model: an LTE decoder in plain PyTorch.
        ids: [N, T], N at least 2 and T at least `CHUNK`.
        layers: how many.
        seed: of the grouping.
        say: is told what is measured next.

    Returns:
        JSON-ready: `tokens`, how many the numbers are of; `layers`, which; `chunk`; `mean`, the choices with the mean
        over these layers of each number; `by_layer`, those of each.
    """
    total = len(require_sparse_ffns(model))
    chosen = sorted({(2 * index + 1) * total // (2 * layers) for index in range(layers)})
    say(f"what the neurons of {len(chosen)} layers contribute")
    found: list[dict[str, dict[str, Any]]] = []
    for seen in record_activity(model, ids, chosen):
        say(f"another grouping of layer {chosen[len(found)]}")
        found.append(layer_oracle(seen, seed))
    tokens = (len(ids) - len(ids) // 2) * ids.shape[1]
    return {"tokens": tokens, "layers": chosen, "chunk": CHUNK, "mean": _mean(found), "by_layer": found}


def _mean(values: Sequence[Any]) -> Any:
    """The mean of numbers, or of each number in dictionaries of the same keys."""
    if not isinstance(values[0], dict):
        return sum(values) / len(values)
    return {name: _mean([each[name] for each in values]) for name in values[0]}
