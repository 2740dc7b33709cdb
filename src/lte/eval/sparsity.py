"""The sparsity that a model really has: counted on the logits that its own hard path used.

Shapes: L layers, E experts, K histogram bins, N tokens of a batch; a token counts where the token mask is
    true.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from lte.eval.inference import Batch, count_batches
from lte.hf.install import require_sparse_ffns
from lte.nn.sparse_ffn import SparseFfn

HISTOGRAM_BINS = 40
NEAR_THRESHOLD = 0.1
# Scores that one histogram call takes: it counts in fp32, which is exact up to here.
HISTOGRAM_CHUNK = 1 << 24


@dataclass(frozen=True)
class SparsityMeasurement:
    """Routing statistics in hard mode.

    Attributes:
        sparsity: share of FFN neurons not computed per token, mean over tokens and layers.
        tokens: how many tokens were counted, on both sides of an encoder-decoder.
        active_fraction: share of active experts by layer, mean over tokens, [L].
        expert_use: share of tokens that activate each expert, [L][E].
        score_histogram: share of the scores in each of K equal bins on [0, 1], [L][K].
        near_threshold: share of scores within 0.1 of tau, by layer, [L].
        threshold: tau.
    """

    sparsity: float
    tokens: int
    active_fraction: list[float]
    expert_use: list[list[float]]
    score_histogram: list[list[float]]
    near_threshold: list[float]
    threshold: float = 0.5

    @property
    def layer_sparsity(self) -> list[float]:
        """Share of FFN neurons not computed per token, by layer, [L]."""
        return [1 - active for active in self.active_fraction]

    @property
    def dead_experts(self) -> list[int]:
        """How many experts no counted token activates, by layer, [L]."""
        return [sum(use == 0 for use in layer) for layer in self.expert_use]

    @property
    def always_on_experts(self) -> list[int]:
        """How many experts every counted token activates, by layer, [L]."""
        return [sum(use == 1 for use in layer) for layer in self.expert_use]

    def to_dict(self) -> dict[str, Any]:
        """All fields, JSON-ready."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> SparsityMeasurement:
        """Reads what `to_dict` wrote.

        Raises:
            ValueError: if a field is missing or unknown.
        """
        known = {f.name for f in fields(cls)}
        missing = sorted({f.name for f in fields(cls) if f.default is MISSING} - set(data))
        unknown = sorted(set(data) - known)
        if missing or unknown:
            raise ValueError(
                f"a sparsity measurement must hold the fields {', '.join(sorted(known))}, got one "
                f"without {missing} and with unknown {unknown}; measure it again with this version of lte"
            )
        return cls(**data)


class _LayerCounts:
    """Running counts of one layer, on its device; nothing here waits for the device."""

    def __init__(self, ffn: SparseFfn):
        self.ffn = ffn
        self.threshold = float(torch.sigmoid(torch.tensor(ffn.threshold_logit, dtype=torch.float64)))
        self.active = self.bins = self.near = self.tokens = torch.zeros((), dtype=torch.int64)

    def update(self, mask: Tensor) -> None:
        logits = self.ffn.logits
        if logits is None:
            raise ValueError("model must run in hard mode before each update, got no recorded logits")
        self.ffn.logits = None
        # Some blocks flatten [B, T] before their FFN.
        if logits.shape[:-1] not in (mask.shape, mask.flatten().shape):
            raise ValueError(
                f"mask must be [B, T] of the last forward pass, {tuple(logits.shape[:-1])}, got mask="
                f"{tuple(mask.shape)}"
            )
        logits = logits.flatten(0, -2)
        keep = mask.to(logits.device, non_blocking=True).reshape(-1, 1)
        scores = torch.sigmoid(logits)
        near = (scores - self.threshold).abs() < NEAR_THRESHOLD
        self.active = ((logits > self.ffn.threshold_logit) & keep).sum(0) + self._on(self.active, logits)
        self.tokens = keep.sum() + self._on(self.tokens, logits)
        self.near = (near & keep).sum() + self._on(self.near, logits)
        self.bins = _histogram(scores, keep) + self._on(self.bins, logits)

    def _on(self, counts: Tensor, logits: Tensor) -> Tensor:
        """The counts on the logits' device; only the first, a zero, has to move."""
        return counts if counts.device == logits.device else counts.to(logits.device, non_blocking=True)


def _histogram(scores: Tensor, keep: Tensor) -> Tensor:
    """Counts [K] of the kept scores, int64. `histc` leaves out what lies outside [0, 1], and NaN."""
    kept = torch.where(keep, scores, -1.0)
    rows = max(1, HISTOGRAM_CHUNK // scores.shape[-1])
    chunks = [torch.histc(chunk, HISTOGRAM_BINS, 0.0, 1.0) for chunk in kept.split(rows)]
    return torch.stack(chunks).long().sum(0)


class SparsityCounter:
    """Collects routing statistics of an LTE model while something else runs it in hard mode.

    Used as a context: inside it, call the model, then `update` with the token mask of that call.

    Args:
        model: an LTE model.
    """

    def __init__(self, model: nn.Module):
        self.layers = {name: _LayerCounts(ffn) for name, ffn in require_sparse_ffns(model).items()}
        self.tokens: list[Tensor] = []
        self._recorded = [layer.ffn.record_logits for layer in self.layers.values()]

    def __enter__(self) -> SparsityCounter:
        self._recorded = [layer.ffn.record_logits for layer in self.layers.values()]
        for layer in self.layers.values():
            layer.ffn.record_logits, layer.ffn.logits = True, None
        return self

    def __exit__(self, *error: object) -> None:
        for layer, recorded in zip(self.layers.values(), self._recorded, strict=True):
            layer.ffn.record_logits, layer.ffn.logits = recorded, None

    @torch.no_grad()
    def update(self, mask: Tensor | Mapping[str, Tensor]) -> None:
        """Counts the forward pass that just ended over the tokens of `mask` (bool, [B, T]), one for all or by FFN.

        Raises:
            ValueError: if no forward pass in a routed mode came before, or the mask is not of its shape.
        """
        masks = dict.fromkeys(self.layers, mask) if isinstance(mask, Tensor) else mask
        for name, layer in self.layers.items():
            layer.update(masks[name])
        self.tokens.append(torch.stack([each.sum() for each in {id(m): m for m in masks.values()}.values()]).sum())

    def result(self) -> SparsityMeasurement:
        """The statistics so far.

        Raises:
            ValueError: if no token was counted, or a router score is NaN.
        """
        tokens = int(torch.stack(self.tokens).sum()) if self.tokens else 0
        layers = list(self.layers.values())
        counts = [int(layer.tokens) for layer in layers]
        if not all(counts):
            raise ValueError("batches must hold at least one counted token, got none")
        use = [layer.active.cpu().double() / count for layer, count in zip(layers, counts, strict=True)]
        bins = [layer.bins.cpu().double() for layer in layers]
        totals = [count * len(layer) for layer, count in zip(use, counts, strict=True)]
        if any(int(count.sum()) != total for count, total in zip(bins, totals, strict=True)):
            raise ValueError("router scores must be numbers, got NaN; the model's weights are damaged")
        fractions = [float(layer.mean()) for layer in use]
        near = [int(layer.near) / total for layer, total in zip(layers, totals, strict=True)]
        return SparsityMeasurement(
            sparsity=1 - sum(fractions) / len(fractions),
            tokens=tokens,
            active_fraction=fractions,
            expert_use=[layer.tolist() for layer in use],
            score_histogram=[(count / total).tolist() for count, total in zip(bins, totals, strict=True)],
            near_threshold=near,
            threshold=layers[0].threshold,
        )


def measure_sparsity(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    skip_ignored_labels: bool = True,
    progress: bool = False,
) -> SparsityMeasurement:
    """Runs an LTE model in hard mode over `batches` and counts its routing; modes are restored afterwards.

    Args:
        model: an LTE model.
        batches: `input_ids` and optionally `attention_mask` and `labels`, [B, T], on any device and of any
            length.
        skip_ignored_labels: whether tokens with the label -100 are left out, if the model predicts the next token.
        progress: whether to show a progress bar.

    Raises:
        ValueError: for a dense model, or batches without a counted token.
    """
    with SparsityCounter(model) as counter:
        count_batches(model, counter, batches, skip_ignored_labels=skip_ignored_labels, progress=progress)
        return counter.result()
