"""Noisy top-K softmax routing with load balancing (Shazeer et al., ICLR 2017, arXiv 1701.06538).

H = x W_g + N(0, 1) softplus(x W_noise) in training and x W_g afterwards; the gates are the softmax over the K largest
H, and 0 elsewhere (Eq. 3-5). Experts are those of LTE. LTE's paper reports that this router collapses: one expert takes
nearly all of the score, and the others compute for nothing.

Two choices, since the paper trains from scratch: the gates are multiplied by K, so that equal gates, with which W_g = 0
starts as in the paper, leave the experts as they were; and the loss is added per layer with the paper's weights of 0.1.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from lte.hf.install import StockFfn
from lte.methods.method import Method, register, wraps_ffns
from lte.methods.neuron_ffn import ExpertConfig, ExpertFfn, group_experts_as_lte_, needs_grouping_text
from lte.methods.selectors import LinearSelector, count_weights
from lte.nn.global_sums import sum_over_processes


@dataclass(frozen=True, kw_only=True)
class NoisyTopkConfig(ExpertConfig):
    """Settings of the router's losses.

    Attributes:
        importance_weight: of CV(importance)^2, the importance of an expert being the sum of its gates.
        load_weight: of CV(load)^2, the load being the expected number of tokens under new noise.
    """

    name = "noisy_topk"
    importance_weight: float = 0.1
    load_weight: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("importance_weight", "load_weight"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {name}={getattr(self, name)}")


class NoisyTopkFfn(ExpertFfn):
    """Keeps K experts and scales them by K times their gates."""

    def __init__(self, stock: StockFfn, config: NoisyTopkConfig):
        super().__init__(stock, config)
        self.config = config
        self.router = LinearSelector(stock, self.num_experts)
        self.noise_router = LinearSelector(stock, self.num_experts)

    @property
    def selector_weights(self) -> int:
        """Those of the router; the noise is for training alone."""
        return count_weights(self.router)

    def expert_multipliers(self, x: Tensor, activated: Tensor, hidden: Tensor) -> Tensor:
        """See `ExpertFfn`."""
        clean = self.router(x)
        noisy, scale = clean, None
        if self.training:
            scale = F.softplus(self.noise_router(x))
            noisy = clean + torch.randn_like(clean) * scale
        gates = topk_softmax(noisy, self.num_kept_experts)
        if scale is not None:
            self._of_thread.left["routing"] = gates, self._chances(clean, noisy, scale)
        return gates * self.num_kept_experts

    def _chances(self, clean: Tensor, noisy: Tensor, scale: Tensor) -> Tensor:
        """How likely each expert is among the top K if its noise alone is drawn anew (Eq. 8-9), [..., E]."""
        kept = self.num_kept_experts
        if kept == self.num_experts:
            return torch.ones_like(clean)
        largest = noisy.topk(kept + 1, dim=-1).values
        # The K-th largest of the others: for an expert that is in, that is the one after the last.
        inside = noisy >= largest[..., kept - 1 : kept]
        bar = torch.where(inside, largest[..., kept:], largest[..., kept - 1 : kept])
        return torch.special.ndtr((clean - bar) / scale)

    def auxiliary_loss(self, token_mask: Tensor) -> Tensor | None:
        """w_importance CV(importance)^2 + w_load CV(load)^2 over the tokens that count (Eq. 6-11)."""
        routing, self._of_thread.left["routing"] = self._of_thread.left["routing"], None
        if routing is None:
            return None
        keep = token_mask.flatten().to(routing[0])
        importance, load = (sum_over_processes(keep @ values.flatten(0, -2)) for values in routing)
        weights = self.config.importance_weight, self.config.load_weight
        return weights[0] * squared_variation(importance) + weights[1] * squared_variation(load)


def topk_softmax(logits: Tensor, count: int) -> Tensor:
    """Softmax over the `count` largest logits of each row [..., E], 0 elsewhere."""
    values, index = logits.topk(count, dim=-1)
    return torch.zeros_like(logits).scatter(-1, index, values.softmax(-1))


def squared_variation(values: Tensor) -> Tensor:
    """CV^2 = variance / mean^2 of values [E]: 0 where all are equal, E - 1 where one has it all."""
    return values.var(unbiased=False) / values.mean().square().clamp_min(1e-10)


register(
    Method(
        config=NoisyTopkConfig,
        about="experts, by a softmax over the largest scores",
        install=wraps_ffns(NoisyTopkFfn),
        prepare=group_experts_as_lte_,
        needs_calibration=needs_grouping_text,
        trained=True,
        fp32_names=("noise_router",),
    )
)
