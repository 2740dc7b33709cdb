"""KLA: keep the largest activations of each token, an oracle without training.

It shows how much sparsity a model has by itself: nothing that must predict the activations does better on the same
weights. A baseline of LTE's paper (arXiv 2402.06126).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from lte.config import check_choice
from lte.hf.install import StockFfn
from lte.methods.method import Batches, Method, register, wraps_ffns
from lte.methods.neuron_ffn import (
    ExpertConfig,
    ExpertFfn,
    NeuronFfn,
    group_experts_as_lte_,
    keep_largest,
    needs_grouping_text,
)

Granularity = Literal["neuron", "expert"]


@dataclass(frozen=True, kw_only=True)
class KlaConfig(ExpertConfig):
    """What is kept.

    Attributes:
        granularity: `neuron` keeps the neurons of the largest |h|; `expert` the experts of the largest output norms
            ||h_e W_e||, for which alone `expert_size`, `grouping` and `seed` are.
    """

    name = "kla"
    granularity: Granularity = "neuron"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("granularity", self.granularity, get_args(Granularity))


class KlaFfn(NeuronFfn):
    """Keeps the neurons of the largest |h|. To know them takes gate and up in full, which is what it counts."""

    @property
    def full_matrices(self) -> int:
        """All but down."""
        return self.num_inputs

    def multipliers(self, x: Tensor, activated: Tensor, hidden: Tensor) -> Tensor:
        """See `NeuronFfn`."""
        return keep_largest(hidden.abs(), self.num_kept)


class KlaExpertFfn(ExpertFfn):
    """Keeps the experts of the largest output norms. To know them takes the whole FFN, which is what it counts."""

    @property
    def full_matrices(self) -> int:
        """All."""
        return self.num_inputs + 1

    def expert_multipliers(self, x: Tensor, activated: Tensor, hidden: Tensor) -> Tensor:
        """See `ExpertFfn`."""
        down = self.layout.matrix(self.part(self.layout.down)).float()
        blocks = down.unflatten(1, (self.num_experts, -1))
        # ||h_e W_e||^2 = h_e (W_e W_e^T) h_e^T, without the E outputs of width D.
        gram = torch.einsum("des,det->est", blocks, blocks)
        experts = self.by_expert(hidden).float()
        return keep_largest(torch.einsum("...es,est,...et->...e", experts, gram, experts), self.num_kept_experts)


def _build(stock: StockFfn, config: KlaConfig) -> NeuronFfn:
    return KlaFfn(stock, config) if config.granularity == "neuron" else KlaExpertFfn(stock, config)


def _group_experts_(model: nn.Module, config: KlaConfig, batches: Batches) -> None:
    if config.granularity == "expert":
        group_experts_as_lte_(model, config, batches)


register(
    Method(
        config=KlaConfig,
        about="neurons, or experts, of the smallest activations: an oracle",
        install=wraps_ffns(_build),
        prepare=_group_experts_,
        needs_calibration=lambda config: config.granularity == "expert" and needs_grouping_text(config),
    )
)
