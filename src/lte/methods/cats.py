"""CATS: skip the neurons whose gate is small (Lee et al., COLM 2024, arXiv 2404.08763).

The gate projection is computed in full, and a neuron is kept where |act(x W_gate)| is above a threshold of its layer,
which is the quantile of that magnitude at the target sparsity on calibration text. Up and down are skipped: half of the
neurons is a third of the bytes of a gated FFN. Settings of the paper: targets of 50, 70 and 90%, thresholds from a
sample of the training text. The paper is about gated FFNs; in a plain FFN the rule is the same on act(x W_up), and down
alone is skipped. The paper fine-tunes with LoRA on request: train with `recipe="method"`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lte.config import MethodConfig
from lte.hf.install import StockFfn
from lte.methods.calibration import MagnitudeHistogram, observe_
from lte.methods.method import Batches, Method, register, wraps_ffns
from lte.methods.neuron_ffn import NeuronFfn


@dataclass(frozen=True, kw_only=True)
class CatsConfig(MethodConfig):
    """`target_sparsity` is the share of neurons that is skipped on the calibration text, the same in every layer."""

    name = "cats"


class CatsFfn(NeuronFfn):
    """Skips neurons with |act(x W_gate)| <= `threshold`, a scalar buffer."""

    threshold: Tensor

    def __init__(self, stock: StockFfn, config: CatsConfig):
        super().__init__(stock, config)
        self.register_buffer("threshold", torch.zeros((), device=stock.device, dtype=torch.float32))

    @property
    def full_matrices(self) -> int:
        """The gate, or up in a plain FFN."""
        return 1

    def multipliers(self, x: Tensor, activated: Tensor, hidden: Tensor) -> Tensor:
        """See `NeuronFfn`."""
        return activated.abs() > self.threshold


def fit_thresholds_(model: Any, config: CatsConfig, batches: Batches) -> None:
    """Sets every layer's threshold to the quantile of |act(x W_gate)| at the target sparsity, in the dense model."""
    histograms: dict[NeuronFfn, MagnitudeHistogram] = {}

    def see(name: str, ffn: Any, values: tuple[Tensor, ...]) -> None:
        histograms.setdefault(ffn, MagnitudeHistogram()).update(values[1])

    observe_(model, batches, see)
    for ffn, histogram in histograms.items():
        ffn.threshold.fill_(histogram.quantile(config.target_sparsity))  # type: ignore[operator]


register(
    Method(
        config=CatsConfig,
        about="neurons whose gate activation is small for the token",
        install=wraps_ffns(CatsFfn),
        fit=fit_thresholds_,
        needs_calibration=lambda config: True,
        fp32_names=("threshold",),
    )
)
