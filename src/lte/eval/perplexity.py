"""Perplexity on held-out text, in the same pass that counts the sparsity.

Shapes: B sequences, T tokens, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset

from lte.data.batches import Batch, as_batches
from lte.data.rows import IGNORED, routing_masks
from lte.eval.inference import hard_inference, model_device, moved_batches
from lte.eval.sparsity import Measurement, counter_for
from lte.hf.inputs import model_inputs, predicts_next_token

# Logits in fp32 at once: 2^26 of them, 256 MiB.
CHUNK_LOGITS = 1 << 26


@dataclass(frozen=True)
class PerplexityResult:
    """Token-weighted language-model quality.

    Attributes:
        nll_per_token: mean negative log likelihood of the predicted tokens, in nats.
        tokens: how many tokens were predicted.
        words: how many words these tokens spell, or `None` if unknown.
    """

    nll_per_token: float
    tokens: int
    words: int | None = None

    @property
    def perplexity(self) -> float:
        """exp of the mean negative log likelihood per token."""
        return _exp(self.nll_per_token)

    @property
    def perplexity_per_word(self) -> float | None:
        """exp of the negative log likelihood per word, comparable between tokenizers, or `None`."""
        return None if self.words is None else _exp(self.nll_per_token * self.tokens / self.words)


def evaluate_model(
    model: nn.Module,
    data: Dataset[Any] | Iterable[Batch],
    *,
    batch_size: int = 8,
    collator: Any = None,
    device: torch.device | str | None = None,
    autocast_dtype: torch.dtype | None = None,
    progress: bool = True,
    num_words: int | None = None,
) -> tuple[PerplexityResult, Measurement | None]:
    """Quality and sparsity from one and the same pass, an LTE model in hard mode; no sparsity for a stock model.

    A label counts if it is not -100 and if neither it nor the token that it is predicted from is padding, so
    that padding on the left and on the right give the same number. Log-softmax is in fp32. The sparsity counts tokens
    that are no padding and whose own label is not ignored; `lte.eval.cost.measured_cost` makes costs of it.

    Args:
        model: a causal LM; its modes are restored afterwards.
        data: a data set of rows, or batches of `input_ids`, `labels` and optionally `attention_mask`, [B, T].
        batch_size: rows per batch, for a data set.
        collator: makes a batch of rows; `None` pads on the right.
        device: where to run; the model is moved there and stays. `None`: where the model is.
        autocast_dtype: dtype of the matrix products, `None` for the weights' own.
        progress: whether to show a progress bar.
        num_words: words in the text, for the perplexity per word.

    Raises:
        ValueError: if no label counts, `labels` are missing, or the loss is not finite.
    """
    if not predicts_next_token(model):
        raise ValueError(
            f"model must predict the next token to have a perplexity, got {type(model).__name__}; measure_sparsity "
            "takes other heads too"
        )
    if device is not None:
        model.to(device)
    place = model_device(model)
    batches = as_batches(data, model, batch_size, collator)
    losses: list[Tensor] = []
    counts: list[Tensor] = []
    autocast = torch.autocast(place.type, autocast_dtype) if autocast_dtype else nullcontext()
    # The device is waited for once, at the end.
    with counter_for(model) as counter, hard_inference(model):
        for batch in moved_batches(batches, place, progress=progress):
            targets = _targets(batch)
            with autocast:
                logits = model(**model_inputs(model, batch)).logits
            losses.append(_negative_log_likelihood(logits, targets))
            counts.append((targets != IGNORED).sum())
            if counter is not None:
                counter.update(routing_masks(model, counter.layers, batch))
    return _result(losses, counts, num_words), None if counter is None else counter.result()


def _targets(batch: Batch) -> Tensor:
    """The token [B, T] that each position predicts, -100 where that does not count."""
    if "labels" not in batch:
        raise ValueError(f"labels must be in every batch, got the keys {', '.join(batch)}")
    labels = batch["labels"]
    mask = batch.get("attention_mask")
    if mask is not None:
        labels = labels.masked_fill(mask == 0, IGNORED)
    targets = F.pad(labels[:, 1:], (0, 1), value=IGNORED)
    return targets if mask is None else targets.masked_fill(mask == 0, IGNORED)


def _negative_log_likelihood(logits: Tensor, targets: Tensor) -> Tensor:
    """Summed negative log likelihood in nats, in fp32 chunks; a scalar on the logits' device."""
    # The targets are shifted and not the logits: a slice of those would be a copy of gigabytes.
    flat, wanted = logits.flatten(0, 1), targets.to(logits.device).flatten()
    rows = max(1, CHUNK_LOGITS // logits.shape[-1])
    parts = [
        F.cross_entropy(part.float(), target, ignore_index=IGNORED, reduction="sum")
        for part, target in zip(flat.split(rows), wanted.split(rows), strict=True)
    ]
    return torch.stack(parts).sum()


def _result(losses: list[Tensor], counts: list[Tensor], num_words: int | None) -> PerplexityResult:
    if num_words is not None and num_words < 1:
        raise ValueError(f"num_words must be at least 1 or None, got num_words={num_words}")
    tokens = int(torch.stack(counts).sum()) if counts else 0
    if not tokens:
        raise ValueError(
            "labels must hold a token to predict after the first of a row, got none in any batch; labels of "
            "-100 and padding do not count"
        )
    by_batch = torch.stack(losses).cpu().double()
    if not by_batch.isfinite().all():
        index = int((~by_batch.isfinite()).nonzero()[0])
        raise ValueError(
            f"the loss must be finite, got {by_batch[index].item()} in batch {index} of {len(losses)}; "
            "the weights are damaged or overflow their dtype: try float32 or bfloat16"
        )
    return PerplexityResult(by_batch.sum().item() / tokens, tokens, num_words)


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf
