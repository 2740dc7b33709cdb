"""Perplexity on held-out text, in the same pass that counts the sparsity."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from rich.progress import track
from torch import Tensor, nn
from torch.nn import functional as F

from lte.eval.sparsity import SparsityCounter, SparsityMeasurement
from lte.hf.install import sparse_ffns
from lte.train.data import IGNORED, token_mask
from lte.train.router_init import evaluating

# Logits in fp32 at once: 2^26 of them, 256 MiB.
CHUNK_LOGITS = 1 << 26


@dataclass(frozen=True)
class PerplexityResult:
    """Token-weighted language-model quality.

    Attributes:
        nll_per_token: mean negative log likelihood of the labelled tokens, in nats.
        tokens: how many tokens were predicted.
    """

    nll_per_token: float
    tokens: int

    @property
    def perplexity(self) -> float:
        """exp of the mean negative log likelihood."""
        return math.exp(self.nll_per_token)


def evaluate_model(
    model: nn.Module, batches: Iterable[Mapping[str, Tensor]], *, progress: bool = True
) -> tuple[PerplexityResult, SparsityMeasurement | None]:
    """Perplexity of a dense or LTE model, and the routing of an LTE model, from one pass in hard mode.

    Args:
        model: a causal LM; its mode is restored afterwards.
        batches: `input_ids`, `labels` and optionally `attention_mask`, [B, T], on any device.
        progress: whether to show a progress bar.

    Raises:
        ValueError: if no token has a label, or the loss is not finite.
    """
    device = next(model.parameters()).device
    nll, tokens = 0.0, 0
    with ExitStack() as stack:
        counter = None
        if sparse_ffns(model):
            stack.enter_context(evaluating(model, "hard"))
            counter = stack.enter_context(SparsityCounter(model))
        stack.enter_context(torch.no_grad())
        training = model.training
        model.eval()
        for batch in track(batches, "evaluating", disable=not progress, transient=True):
            moved = {key: value.to(device) for key, value in batch.items()}
            features = {key: moved[key] for key in ("input_ids", "attention_mask") if key in moved}
            logits = model(**features, use_cache=False).logits
            loss, count = _negative_log_likelihood(logits, moved["labels"])
            nll, tokens = nll + loss, tokens + count
            if counter is not None:
                counter.update(token_mask(moved))
        model.train(training)
    if not tokens:
        raise ValueError("batches must hold at least one labelled token after the first, got none")
    if not math.isfinite(nll):
        raise ValueError(f"the loss must be finite, got {nll / tokens}; the weights are damaged or overflow this dtype")
    return PerplexityResult(nll / tokens, tokens), None if counter is None else counter.result()


def _negative_log_likelihood(logits: Tensor, labels: Tensor) -> tuple[float, int]:
    targets = labels[:, 1:].flatten()
    flat = logits[:, :-1].flatten(0, 1)
    rows = max(1, CHUNK_LOGITS // logits.shape[-1])
    total = sum(
        F.cross_entropy(flat[i : i + rows].float(), targets[i : i + rows], ignore_index=IGNORED, reduction="sum")
        for i in range(0, len(flat), rows)
    )
    return float(total), int((targets != IGNORED).sum())
