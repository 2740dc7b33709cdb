"""The sparsity that a model really has: counted on the logits that its own hard path used.

Shapes: L layers, E experts, K histogram bins; a token counts where the token mask is true.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lte.hf.install import require_sparse_ffns
from lte.train.data import token_mask
from lte.train.router_init import evaluating

HISTOGRAM_BINS = 40
NEAR_THRESHOLD = 0.1


@dataclass(frozen=True)
class SparsityMeasurement:
    """Routing statistics in hard mode.

    Attributes:
        sparsity: share of FFN neurons not computed per token, mean over tokens and layers.
        tokens: how many tokens were counted.
        active_fraction: share of active experts by layer, [L].
        expert_use: share of tokens that activate each expert, [L][E].
        score_histogram: share of the scores in each of K equal bins on [0, 1], [L][K].
        near_threshold: share of scores within 0.1 of tau, by layer, [L].
    """

    sparsity: float
    tokens: int
    active_fraction: list[float]
    expert_use: list[list[float]]
    score_histogram: list[list[float]]
    near_threshold: list[float]

    @property
    def dead_experts(self) -> list[int]:
        """Experts that no counted token activates, by layer."""
        return [sum(use == 0 for use in layer) for layer in self.expert_use]

    @property
    def always_on_experts(self) -> list[int]:
        """Experts that every counted token activates, by layer."""
        return [sum(use == 1 for use in layer) for layer in self.expert_use]

    def to_dict(self) -> dict[str, Any]:
        """All fields, JSON-ready."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> SparsityMeasurement:
        """Reads what `to_dict` wrote."""
        return cls(**data)


class SparsityCounter:
    """Collects routing statistics of an LTE model while something else runs it in hard mode."""

    def __init__(self, model: nn.Module):
        self.ffns = list(require_sparse_ffns(model).values())
        self.tokens = 0
        device = self.ffns[0].router.bias.device
        layers, experts = len(self.ffns), self.ffns[0].num_experts
        self.active = torch.zeros(layers, experts, dtype=torch.float64, device=device)
        self.bins = torch.zeros(layers, HISTOGRAM_BINS, dtype=torch.float64, device=device)
        self.near = torch.zeros(layers, dtype=torch.float64, device=device)

    def __enter__(self) -> SparsityCounter:
        for ffn in self.ffns:
            ffn.record_logits = True
        return self

    def __exit__(self, *error: object) -> None:
        for ffn in self.ffns:
            ffn.record_logits, ffn.logits = False, None

    @torch.no_grad()
    def update(self, mask: Tensor) -> None:
        """Counts the forward pass that just ended over the tokens of `mask` (bool, [B, T])."""
        keep = mask.flatten()
        for layer, ffn in enumerate(self.ffns):
            if ffn.logits is None:
                raise ValueError("model must run in hard mode between two updates, got no recorded logits")
            logits = ffn.logits.flatten(0, -2)[keep]
            scores = torch.sigmoid(logits)
            self.active[layer] += (logits > ffn.threshold_logit).sum(0)
            index = (scores * HISTOGRAM_BINS).long().clamp_max(HISTOGRAM_BINS - 1)
            self.bins[layer] += torch.bincount(index.flatten(), minlength=HISTOGRAM_BINS)
            threshold = torch.sigmoid(torch.tensor(ffn.threshold_logit))
            self.near[layer] += ((scores - threshold).abs() < NEAR_THRESHOLD).sum()
            ffn.logits = None
        self.tokens += int(keep.sum())

    def result(self) -> SparsityMeasurement:
        """The statistics so far.

        Raises:
            ValueError: if no token was counted.
        """
        if not self.tokens:
            raise ValueError("batches must hold at least one counted token, got none")
        use = self.active / self.tokens
        total = self.tokens * use.shape[1]
        return SparsityMeasurement(
            sparsity=1 - use.mean().item(),
            tokens=self.tokens,
            active_fraction=use.mean(1).tolist(),
            expert_use=use.tolist(),
            score_histogram=(self.bins / total).tolist(),
            near_threshold=(self.near / total).tolist(),
        )


def measure_sparsity(model: nn.Module, batches: Iterable[Mapping[str, Tensor]]) -> SparsityMeasurement:
    """Runs an LTE model in hard mode over `batches` and counts its routing; modes are restored afterwards.

    Args:
        model: an LTE model.
        batches: `input_ids`, `labels` and optionally `attention_mask`, [B, T]; see `lte.train.data.token_mask`.
    """
    with evaluating(model, "hard"), SparsityCounter(model) as counter:
        for batch in batches:
            model(**{key: batch[key] for key in ("input_ids", "attention_mask") if key in batch}, use_cache=False)
            counter.update(token_mask(batch))
    return counter.result()
