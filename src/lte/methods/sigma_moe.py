"""sigma-MoE: sigmoid scores and top-K (Csordas, Irie, Schmidhuber, EMNLP Findings 2023, arXiv 2310.10837).

s = sigmoid(x W_s); the K experts of the largest scores are scaled by them. In training whole experts are dropped at
random per token, without rescaling, and an entropy loss on the batch's mean softmax(x W_s) keeps the selection broad.
Experts are those of LTE. Settings of the paper: expert dropout 0.05, entropy weight 0.001, rows of W_s of equal norm.

One choice, since the paper trains from scratch and a score of 1/2 would halve the converted FFN: experts are scaled by
2 s, and W_s starts near 0, large enough to break ties.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lte.config import check_fraction
from lte.hf.install import StockFfn
from lte.methods.method import Method, register, wraps_ffns
from lte.methods.neuron_ffn import (
    ExpertConfig,
    ExpertFfn,
    group_experts_as_lte_,
    keep_largest,
    needs_grouping_text,
)
from lte.methods.selectors import LinearSelector, count_weights
from lte.nn.global_sums import sum_over_processes

START_NORM = 1e-5


@dataclass(frozen=True, kw_only=True)
class SigmaMoeConfig(ExpertConfig):
    """Settings of the router's training.

    Attributes:
        entropy_weight: of the entropy loss, per layer.
        expert_dropout: chance that a token finds an expert dropped.
    """

    name = "sigma_moe"
    entropy_weight: float = 0.001
    expert_dropout: float = 0.05

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fraction("expert_dropout", self.expert_dropout)
        if self.entropy_weight < 0:
            raise ValueError(f"entropy_weight must not be negative, got entropy_weight={self.entropy_weight}")


class SigmaMoeFfn(ExpertFfn):
    """Keeps the K experts of the largest scores and scales them by 2 s."""

    def __init__(self, stock: StockFfn, config: SigmaMoeConfig):
        super().__init__(stock, config)
        self.config = config
        self.router = LinearSelector(stock, self.num_experts, 1.0, config.seed)
        with torch.no_grad():
            weight = self.router.weight
            weight.copy_(START_NORM * weight / weight.norm(dim=1, keepdim=True))

    @property
    def selector_weights(self) -> int:
        """Those of the router."""
        return count_weights(self.router)

    def expert_multipliers(self, x: Tensor, activated: Tensor, hidden: Tensor) -> Tensor:
        """See `ExpertFfn`."""
        logits = self.router(x)
        scores = torch.sigmoid(logits)
        if self.training:
            self._of_thread.left["routing"] = logits
            scores = scores * (torch.rand_like(scores) >= self.config.expert_dropout)
        return 2 * scores * keep_largest(scores.detach(), self.num_kept_experts)

    def auxiliary_loss(self, token_mask: Tensor) -> Tensor | None:
        """Weight times sum_e p_e log p_e, p the mean of softmax(logits) over the tokens that count."""
        logits, self._of_thread.left["routing"] = self._of_thread.left["routing"], None
        if logits is None:
            return None
        keep = token_mask.flatten().to(logits)
        total = sum_over_processes(keep @ logits.softmax(-1).flatten(0, -2))
        mean = total / sum_over_processes(keep.sum()).clamp_min(1)
        return self.config.entropy_weight * torch.special.xlogy(mean, mean).sum()


register(
    Method(
        config=SigmaMoeConfig,
        about="experts, by sigmoid scores",
        install=wraps_ffns(SigmaMoeFfn),
        prepare=group_experts_as_lte_,
        needs_calibration=needs_grouping_text,
        trained=True,
    )
)
