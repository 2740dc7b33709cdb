"""MoEfication: experts of a ReLU model, chosen after training (Zhang et al., ACL Findings 2022, arXiv 2110.01786).

Balanced k-means on the input weights makes the experts, as in LTE, which took it from here. An expert's score for a
token is the sum of its positive activations; the K experts of the highest scores compute, unscaled.

- `ground_truth` computes the scores: an oracle that reads the gate (in a plain FFN: up) in full.
- `router` predicts them: D -> E -> E with a tanh and no biases, which starts from the experts' mean normalised input
  weights and the identity, reads the normalised x, and is fitted by binary cross entropy with the scores over their
  largest in the batch, Adam at 0.01; this is the authors' code.

The model must use ReLU to have zeros to skip: `relu_fy_` replaces another activation, after which the dense model must
be fine-tuned. ReLU-LLaMA with MoEfication is this on a gated model after `relu_fy_`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lte.config import check_choice
from lte.hf.convert import require_dense
from lte.hf.install import StockFfn
from lte.hf.loading import own_config_
from lte.methods.method import Batches, Method, register, wraps_ffns
from lte.methods.neuron_ffn import (
    ExpertConfig,
    ExpertFfn,
    group_experts_as_lte_,
    keep_largest,
    needs_grouping_text,
)
from lte.methods.selectors import TwoLayerSelector, count_weights, fit_selectors_
from lte.nn.metering import metered_modules

Selection = Literal["ground_truth", "router"]


@dataclass(frozen=True, kw_only=True)
class MoeficationConfig(ExpertConfig):
    """How experts are chosen.

    Attributes:
        selection: by their true scores, or by those that a router predicts.
        fit_epochs: passes over the calibration text; the authors take 30.
        fit_learning_rate: of Adam.
    """

    name = "moefication"
    selection: Selection = "router"
    fit_epochs: int = 10
    fit_learning_rate: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("selection", self.selection, get_args(Selection))
        for name in ("fit_epochs", "fit_learning_rate"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive, got {name}={getattr(self, name)}")


class GroundTruthFfn(ExpertFfn):
    """Keeps the K experts of the largest sums of positive activations."""

    @property
    def full_matrices(self) -> int:
        """The gate, or up in a plain FFN."""
        return 1

    def scores(self, activated: Tensor) -> Tensor:
        """Sums of positive activations, [..., E] for [..., F]."""
        return self.by_expert(activated.float().clamp_min(0)).sum(-1)

    def expert_multipliers(self, x: Tensor, activated: Tensor, hidden: Tensor) -> Tensor:
        """See `ExpertFfn`."""
        return keep_largest(self.scores(activated), self.num_kept_experts)


class MoeficationFfn(GroundTruthFfn):
    """Keeps the K experts of the largest predicted scores."""

    frozen = ("router",)

    def __init__(self, stock: StockFfn, config: MoeficationConfig):
        super().__init__(stock, config)
        self.router = TwoLayerSelector(stock, self.num_experts, self.num_experts, tanh=True, seed=config.seed)

    @property
    def full_matrices(self) -> int:
        """None."""
        return 0

    @property
    def selector_weights(self) -> int:
        """Those of the router."""
        return count_weights(self.router)

    def logits(self, x: Tensor) -> Tensor:
        """Predictions [..., E] for [..., D]."""
        return self.router(F.normalize(x.float(), dim=-1))

    def expert_multipliers(self, x: Tensor, activated: Tensor, hidden: Tensor) -> Tensor:
        """See `ExpertFfn`."""
        return keep_largest(self.logits(x).detach(), self.num_kept_experts)

    @torch.no_grad()
    def start_router_(self) -> None:
        """Sets the router to the experts' mean normalised input weights and the identity."""
        matrix = self.layout.matrix(self.part(self.layout.gate or self.layout.up))[: self.num_neurons]
        centers = F.normalize(matrix.float(), dim=1).unflatten(0, (self.num_experts, -1)).mean(1)
        self.router.down.copy_(centers)
        self.router.weight.copy_(torch.eye(self.num_experts))


def _build(stock: StockFfn, config: MoeficationConfig) -> ExpertFfn:
    return MoeficationFfn(stock, config) if config.selection == "router" else GroundTruthFfn(stock, config)


def _loss(ffn: MoeficationFfn, x: Tensor, activated: Tensor, hidden: Tensor) -> Tensor:
    scores = ffn.scores(activated)
    return F.binary_cross_entropy_with_logits(ffn.logits(x), scores / scores.max().clamp_min(1e-30))


def fit_routers_(model: Any, config: MoeficationConfig, batches: Batches) -> None:
    """Fits the routers to the experts' scores in the dense model."""
    if config.selection != "router":
        return
    for ffn in metered_modules(model).values():
        assert isinstance(ffn, MoeficationFfn)
        ffn.start_router_()
    fit_selectors_(model, batches, "router", _loss, epochs=config.fit_epochs, learning_rate=config.fit_learning_rate)


def relu_fy_(model: Any) -> nn.Module:
    """Replaces the FFNs' activation function by ReLU in place; fine-tune the model then. Returns the stock model.

    Stock configs name one function for all, so BERT's kind of language-model head gets it too.

    Args:
        model: a dense model of a supported family.

    Raises:
        ValueError: if the model is not dense.
    """
    family = require_dense(model)
    setattr(own_config_(model), family.activation_field, "relu")
    with torch.device("meta"):
        changed = type(model)(model.config)
    for name, module in changed.named_modules():
        if isinstance(module, nn.ReLU):
            model.set_submodule(name, module)
    return model


register(
    Method(
        config=MoeficationConfig,
        about="experts of small positive activations, true or predicted",
        install=wraps_ffns(_build),
        prepare=group_experts_as_lte_,
        fit=fit_routers_,
        needs_calibration=lambda config: config.selection == "router" or needs_grouping_text(config),
    )
)
