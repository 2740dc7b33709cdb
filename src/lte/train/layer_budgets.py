"""Targets of single layers by how the loss rises with the sparsity of each: greedy, as in TEAL (arXiv 2408.14690).

Shapes: L layers, S measured shares.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lte.config import IGNORED
from lte.data.batches import Batch
from lte.data.rows import routing_masks
from lte.hf.inputs import model_inputs
from lte.hf.install import require_sparse_ffns
from lte.methods.lte import evaluating
from lte.nn.shards import assign_, scale_and_shift_, whole
from lte.nn.sparse_ffn import SparseFfn
from lte.train.dropped_start import run_densely
from lte.train.objective import head_divergence
from lte.train.sparsity_controller import target_logit

SHARES = (0.2, 0.4, 0.6, 0.8, 0.95)
"""Of the experts of one layer that are switched off, while all others run densely."""

BUDGET_TOKENS = 8192
"""Training tokens on which it is measured: L x S passes over them, 15 s for 24 layers of a 0.5B model on an H200."""

STEP = 0.01
"""By how much the sparsity of one layer rises in a step of the search."""


@torch.no_grad()
def loss_rises(model: nn.Module, batches: Iterable[Batch], shares: Sequence[float] = SHARES) -> Tensor:
    """How far the model's output moves if a layer alone is sparse: KL(all experts on || sparse) in nats, fp64 [L, S].

    The divergence from the model itself rises as its loss does, and varies less from text to text: 8192 tokens are
    enough. A layer's experts of lowest logits are switched off, for each token as many as its router says.

    Args:
        model: an LTE model with fitted or trained routers.
        batches: as for `lte.train.router_init.fit_routers_`; they are read row by row, as logits are large.
        shares: of a layer's routed experts that are off.
    """
    rows = [row for batch in batches for row in _rows(batch)]
    ffns = require_sparse_ffns(model)
    thresholds = _thresholds(model, ffns, rows, shares)
    rises = torch.zeros(len(ffns), len(shares), dtype=torch.float64)
    with evaluating(model, "dense"):
        for row in rows:
            inputs = model_inputs(model, row)
            dense = model(**inputs).logits
            labels = row.get("labels", row["input_ids"])
            for layer, (name, ffn) in enumerate(ffns.items()):
                ffn.set_mode("hard")
                for place, logit in enumerate(thresholds[name]):
                    with _threshold_at(ffn, logit):
                        sparse = model(**inputs).logits
                    rises[layer, place] += head_divergence(sparse, labels, dense).item()
                ffn.set_mode("dense")
    return rises / len(rows)


@contextmanager
def _threshold_at(ffn: SparseFfn, logit: Tensor) -> Iterator[None]:
    """Puts the threshold of one FFN elsewhere in a block, by its router's bias, which comes back bit for bit."""
    bias = ffn.router.bias
    before = whole(bias).detach().clone()
    scale_and_shift_(bias, 1.0, (ffn.threshold_logit - logit).to(bias.device))
    try:
        yield
    finally:
        assign_(bias, before)


def _rows(batch: Batch) -> Iterator[Batch]:
    count = len(batch["input_ids"])
    for index in range(count):
        row = {name: value[index : index + 1] for name, value in batch.items() if len(value) == count}
        if "labels" not in row or bool((row["labels"] != IGNORED).any()):
            yield row


def _thresholds(
    model: nn.Module, ffns: dict[str, SparseFfn], rows: Sequence[Batch], shares: Sequence[float]
) -> dict[str, list[Tensor]]:
    """The logits of each layer below which these shares of its routed experts lie, mean over rows."""
    found: dict[str, list[list[Tensor]]] = {name: [] for name in ffns}
    for row in rows:
        logits, _ = run_densely(model, ffns, row, hidden=False)
        masks = routing_masks(model, list(ffns), row)
        for name, ffn in ffns.items():
            routed = logits[name][..., ffn.router.always_on :]
            found[name].append([target_logit([routed], [masks[name]], share) for share in shares])
    return {name: list(torch.tensor(by_row).nanmean(0)) for name, by_row in found.items()}


def budgets(rises: Tensor, target: float, shares: Sequence[float] = SHARES, routed: float = 1.0) -> list[float]:
    """The sparsity of each layer: from 0, the layer whose loss rises least takes the next step, until the mean is met.

    Rises are taken as linear between the shares that were measured, and as falling nowhere.

    Args:
        rises: [L, S] from `loss_rises`.
        target: mean sparsity over layers.
        shares: at which the rises were measured.
        routed: share of the experts that are routed; the others are always on.
    """
    layers = len(rises)
    places = [0.0, *(share * routed for share in shares)]
    curves = torch.cat([torch.zeros(layers, 1, dtype=rises.dtype), rises], 1).cummax(1).values.tolist()
    most = max(places[-1], target)
    steps = max(1, math.ceil(target * layers / STEP))
    step = target * layers / steps
    found = [0.0] * layers
    for _ in range(steps):
        open_layers = [layer for layer in range(layers) if found[layer] + step <= most + 1e-9]
        best = min(
            # Where all are full, the emptiest one: targets above what was measured are the same for all.
            open_layers or [found.index(min(found))],
            key=lambda layer: (
                _at(curves[layer], places, found[layer] + step) - _at(curves[layer], places, found[layer])
            ),
        )
        found[best] += step
    return found


def _at(curve: Sequence[float], places: Sequence[float], share: float) -> float:
    """A curve at a share, by the straight line between its neighbours; beyond the last place by the last line."""
    right = next((index for index in range(1, len(places) - 1) if places[index] >= share), len(places) - 1)
    slope = (curve[right] - curve[right - 1]) / (places[right] - places[right - 1])
    return curve[right - 1] + slope * (share - places[right - 1])
