"""Deja Vu: low-rank predictors choose the neurons of each token (Liu et al., ICML 2023, arXiv 2310.17157).

A predictor D -> R -> F of two linear layers per FFN says which neurons matter, and the K neurons of the highest
predictions compute. It is fitted by binary cross entropy on calibration text: in a ReLU model to which neurons are not
0, in others to which are among the K largest |h|, the paper being about ReLU models alone. R is the paper's 1000 for D
= 12288, scaled with D. The paper's predictors look ahead, to run beside the sub-layer before; here they read the FFN's
own input. Attention heads are not pruned, and no training follows in the paper; to train the model with frozen
predictors, as LTE's paper did for a comparison, take `recipe="method"`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from lte.config import MethodConfig
from lte.hf.activations import activation_name
from lte.hf.install import StockFfn
from lte.methods.method import Batches, Method, register, wraps_ffns
from lte.methods.neuron_ffn import NeuronFfn, keep_largest
from lte.methods.selectors import TwoLayerSelector, count_weights, fit_selectors_

PAPER_RANK, PAPER_HIDDEN_SIZE = 1000, 12288


@dataclass(frozen=True, kw_only=True)
class DejaVuConfig(MethodConfig):
    """Settings of the predictors.

    Attributes:
        rank: R; `None` scales the paper's with the hidden size.
        fit_epochs: passes over the calibration text.
        fit_learning_rate: of Adam. On a layer of SmolLM2-135M, 10 epochs of 10k tokens at 0.01 found 63% of the larger
            half of the neurons, at 0.001 61%, and the neurons that are large most often are 58%.
        seed: of the predictors' start.
    """

    name = "deja_vu"
    rank: int | None = None
    fit_epochs: int = 10
    fit_learning_rate: float = 0.01
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("rank", "fit_epochs", "fit_learning_rate"):
            if getattr(self, name) is not None and getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive, got {name}={getattr(self, name)}")

    def rank_for(self, hidden_size: int) -> int:
        """R for a hidden size D."""
        return self.rank or max(1, round(hidden_size * PAPER_RANK / PAPER_HIDDEN_SIZE))


class DejaVuFfn(NeuronFfn):
    """Keeps the K neurons of the largest predictions."""

    frozen = ("predictor",)

    def __init__(self, stock: StockFfn, config: DejaVuConfig):
        super().__init__(stock, config)
        rank = config.rank_for(stock.hidden_size)
        self.predictor = TwoLayerSelector(stock, rank, stock.num_neurons, tanh=False, seed=config.seed)

    @property
    def selector_weights(self) -> int:
        """Those of the predictor."""
        return count_weights(self.predictor)

    def multipliers(self, x: Tensor, activated: Tensor, hidden: Tensor) -> Tensor:
        """See `NeuronFfn`."""
        return keep_largest(self.predictor(x).detach(), self.num_kept)

    def labels(self, hidden: Tensor) -> Tensor:
        """Which neurons matter, 0 or 1, [..., F]."""
        if activation_name(self.activation_function) == "relu":
            return (hidden != 0).float()
        return keep_largest(hidden.abs().float(), self.num_kept)


def _loss(ffn: DejaVuFfn, x: Tensor, activated: Tensor, hidden: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(ffn.predictor(x), ffn.labels(hidden))


def fit_predictors_(model: Any, config: DejaVuConfig, batches: Batches) -> None:
    """Fits the predictors to what the dense model does."""
    fit_selectors_(model, batches, "predictor", _loss, epochs=config.fit_epochs, learning_rate=config.fit_learning_rate)


register(
    Method(
        config=DejaVuConfig,
        about="neurons, by a predictor",
        install=wraps_ffns(DejaVuFfn),
        fit=fit_predictors_,
        needs_calibration=lambda config: True,
        fp32_names=("predictor",),
    )
)
