"""LTE: a router per FFN switches experts of neurons for every token (Zheng et al., NeurIPS 2024, arXiv 2402.06126).

Neurons are grouped into experts, and a linear router with a sigmoid scores them; an expert computes where its score is
above a threshold. All experts start active, and `lte.train` trains the routers to switch off what costs the loss
least. After training one shift of all router biases sets the thresholds to the target on calibration text.

The module is `lte.nn.sparse_ffn.SparseFfn`, which the kernels compute; the config is `lte.config.LteConfig`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lte.config import FfnMode, LteConfig
from lte.data.batches import Batch
from lte.data.rows import routing_masks
from lte.hf.acceleration import decelerate_
from lte.hf.convert import group_experts_, unwrap_ffns_
from lte.hf.families import Family
from lte.hf.inputs import run_without_logits
from lte.hf.install import install_sparse_ffns_, require_sparse_ffns
from lte.methods.calibration import eval_mode
from lte.methods.method import Batches, Method, register
from lte.nn.shards import agreed, scale_and_shift_
from lte.nn.sparse_ffn import SparseFfn
from lte.progress import tracked


@contextmanager
def evaluating(model: nn.Module, mode: FfnMode) -> Iterator[None]:
    """Runs a block in eval mode, without gradients, with all FFNs in `mode`; restores both afterwards."""
    ffns = list(require_sparse_ffns(model).values())
    modes = [ffn.mode for ffn in ffns]
    for ffn in ffns:
        ffn.set_mode(mode)
    try:
        with eval_mode(model), torch.no_grad():
            yield
    finally:
        for ffn, previous in zip(ffns, modes, strict=True):
            ffn.set_mode(previous)


def calibrate_thresholds_(
    model: nn.Module,
    batches: Iterable[Batch],
    target_sparsity: float,
    *,
    rounds: int = 4,
    tolerance: float = 5e-4,
) -> float:
    """Shifts all router biases by one number so that the hard-mode sparsity on `batches` meets the target.

    One shift for all layers keeps what training found about which layer needs how much. A shift changes what later
    layers see, so it is found anew from the measured logits `rounds` times or until within `tolerance`.

    Args:
        model: an LTE model.
        batches: `input_ids`, and optionally `attention_mask`, `labels`, and `token_mask` (bool, [B, T]) in place of the
            tokens that count in training; they are read once per round, so pass a list.
        target_sparsity: share of experts that shall be off, mean over tokens and layers.

    Returns:
        The sum of the shifts, in logits; above zero more experts are on than before.
    """
    batches = list(batches)
    ffns = require_sparse_ffns(model)
    total = 0.0
    for number in range(1, rounds + 1):
        seen = tracked(batches, f"Setting thresholds, round {number}")
        found = _quantile_shift(model, ffns, seen, target_sparsity)
        shift, sparsity = agreed(found, next(iter(ffns.values())).router.bias)
        if abs(sparsity - target_sparsity) <= tolerance:
            break
        for ffn in ffns.values():
            scale_and_shift_(ffn.router.bias, 1.0, shift)
        total += shift
    return total


def _quantile_shift(
    model: nn.Module, ffns: dict[str, SparseFfn], batches: Iterable[Batch], target: float
) -> tuple[float, float]:
    """The shift that moves the `target` quantile of all logits to the threshold, and the sparsity before it."""
    shares, sparsity = logit_shares(model, ffns, batches)
    return -logit_quantile(shares, target), sparsity


_EDGES, _BINS = 64.0, 1 << 16


def logit_quantile(shares: Tensor, share: float) -> float:
    """The logit, relative to the threshold, with so large a share of all others below it.

    Args:
        shares: from `logit_shares`.
        share: in [0, 1].
    """
    index = int(torch.searchsorted(shares.cumsum(0), torch.tensor(share, dtype=torch.float64)))
    return (min(index, _BINS - 1) + 1) * 2 * _EDGES / _BINS - _EDGES


def lowest_logit(shares: Tensor) -> float:
    """A logit, relative to the threshold, just below all of them.

    Args:
        shares: from `logit_shares`.
    """
    return int(shares.nonzero()[0]) * 2 * _EDGES / _BINS - _EDGES


def logit_shares(model: nn.Module, ffns: dict[str, SparseFfn], batches: Iterable[Batch]) -> tuple[Tensor, float]:
    """The distribution of the routers' logits in hard mode, in narrow bins around the threshold, and the sparsity.

    Every layer counts the same, however many tokens it sees: an encoder and a decoder see different ones.
    """
    edges, bins = _EDGES, _BINS
    # They stay where the logits are until all batches are through: a GPU is not waited for.
    histograms, below = ({name: torch.zeros((), dtype=torch.float64) for name in ffns} for _ in range(2))
    recorded = [ffn.record_logits for ffn in ffns.values()]
    for ffn in ffns.values():
        ffn.record_logits = True
    try:
        with evaluating(model, "hard"):
            for batch in batches:
                run_without_logits(model, batch)
                masks = routing_masks(model, list(ffns), batch)
                for name, ffn in ffns.items():
                    assert ffn.logits is not None
                    keep = masks[name].to(ffn.logits.device).flatten()
                    logits = (ffn.logits - ffn.threshold_logit).flatten(0, -2)[keep]
                    counts = torch.histc(logits.clamp(-edges, edges).float(), bins, -edges, edges)
                    histograms[name] = counts.double() + histograms[name].to(counts.device)
                    below[name] = (logits <= 0).sum() + below[name].to(counts.device)
    finally:
        for ffn, before in zip(ffns.values(), recorded, strict=True):
            ffn.record_logits, ffn.logits = before, None
    totals = {name: histogram.sum() for name, histogram in histograms.items()}
    shares = torch.stack([(histogram / totals[name]).cpu() for name, histogram in histograms.items()]).mean(0)
    return shares, sum((below[name] / totals[name]).item() for name in ffns) / len(ffns)


def _prepare_(model: nn.Module, config: LteConfig, batches: Batches) -> None:
    config.check_new()
    group_experts_(model, config, batches or None)


def _set_thresholds_(model: nn.Module, config: LteConfig, batches: Batches) -> None:
    calibrate_thresholds_(model, batches, config.target_sparsity)


def _remove_(model: nn.Module, family: Family, stock_config: Any) -> None:
    decelerate_(model)
    unwrap_ffns_(model, family, stock_config)


register(
    Method(
        config=LteConfig,
        about="experts of neurons, by a trained router and a threshold",
        prepare=_prepare_,
        install=install_sparse_ffns_,
        remove=_remove_,
        calibrate=_set_thresholds_,
        needs_calibration=lambda config: config.needs_text,
        fp32_names=("router",),
        trained=True,
        sparse_ffns=True,
    )
)
