"""FFNs that select neurons, or experts of neurons, for every token: what such methods share.

Shapes: D hidden size, F neurons, E experts of S = F / E neurons each.
"""

from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import Tensor

from lte.config import CALIBRATED_GROUPINGS, Grouping, LteConfig, MethodConfig, check_choice, check_expert_size
from lte.hf.convert import group_experts_
from lte.hf.install import StockFfn
from lte.methods.method import Batches
from lte.nn.metering import Reading
from lte.nn.wrapped_ffn import WrappedFfn


class NeuronFfn(WrappedFfn):
    """An FFN that computes (m * h) W_down with a multiplier m per neuron and token, 0 where a neuron is skipped.

    h = act(x W_gate) * (x W_up), or act(x W_up) in a plain FFN. The products are computed densely and masked; what a
    kernel would have to read is what `Reading` counts.

    Args:
        stock: the FFN to build around.
        config: the method's settings, `target_sparsity` among them.
    """

    def __init__(self, stock: StockFfn, config: MethodConfig):
        super().__init__(stock.parts, stock.activation, stock.layout)
        self.target_sparsity = config.target_sparsity

    @property
    def num_kept(self) -> int:
        """How many neurons a method that keeps a fixed number keeps."""
        return kept_count(self.num_neurons, self.target_sparsity)

    @property
    def full_matrices(self) -> int:
        """How many of gate, up and down the selection reads in full."""
        return 0

    @property
    def selector_weights(self) -> int:
        """Weights of the router or predictor."""
        return 0

    def multipliers(self, x: Tensor, activated: Tensor, hidden: Tensor) -> Tensor:
        """m, [..., F], for x [..., D], act(x W_gate) (in a plain FFN act(x W_up)), and h, [..., F] both."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """Maps hidden states [..., D] to [..., D]; a spread FFN maps x W_up [..., F] to m * h [..., F]."""
        if self.block:
            hidden = activated = self.activation_function(x)
            return self._select(self.take_input(), activated, hidden)
        activated, up = self.factors(x)
        hidden = activated if up is None else activated * up
        return self._project_down(self._select(x, activated, hidden))

    def _select(self, x: Tensor, activated: Tensor, hidden: Tensor) -> Tensor:
        if self.observer is not None:
            self.observer(x, activated, hidden)
            return hidden
        multipliers = self.multipliers(x, activated, hidden)
        if self.metering:
            neurons = (multipliers != 0).sum(-1)
            full = self.full_matrices * self.num_neurons
            partly = (self.num_inputs + 1 - self.full_matrices) * neurons
            self.reading = Reading((full + partly) * self.hidden_size, self.selector_weights, neurons)
        return hidden * multipliers.to(hidden.dtype)

    def extra_repr(self) -> str:
        return f"target_sparsity={self.target_sparsity:g}"


def kept_count(count: int, target_sparsity: float) -> int:
    """How many of `count` are kept: the nearest whole number, at least one."""
    return max(1, round(count * (1 - target_sparsity)))


def keep_largest(scores: Tensor, count: int) -> Tensor:
    """1 for the `count` largest scores of each row and 0 for the others, [..., K]; ties fall as `torch.topk` has it."""
    index = scores.topk(count, dim=-1).indices
    return torch.zeros_like(scores).scatter_(-1, index, 1.0)


@dataclass(frozen=True, kw_only=True)
class ExpertConfig(MethodConfig):
    """Settings of a method that switches experts, which are those that `LteConfig` with the same settings makes.

    Attributes:
        expert_size: S.
        grouping: how neurons are put into experts.
        seed: of the grouping, and of what the method draws.
    """

    expert_size: int = 32
    grouping: Grouping = "kmeans"
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("grouping", self.grouping, get_args(Grouping))
        if self.expert_size < 1:
            raise ValueError(f"expert_size must be at least 1, got expert_size={self.expert_size}")


def group_experts_as_lte_(model: Any, config: ExpertConfig, batches: Batches) -> None:
    """The `prepare` of a method with experts: permutes the neurons as `lte.sparsify_` does."""
    experts = LteConfig(expert_size=config.expert_size, grouping=config.grouping, seed=config.seed)
    group_experts_(model, experts, batches or None)


def needs_grouping_text(config: ExpertConfig) -> bool:
    """Whether the grouping compares when neurons are active."""
    return config.grouping in CALIBRATED_GROUPINGS


class ExpertFfn(NeuronFfn):
    """A `NeuronFfn` whose neurons are switched in experts: expert e owns the neurons [e S, (e + 1) S)."""

    def __init__(self, stock: StockFfn, config: ExpertConfig):
        super().__init__(stock, config)
        self.num_experts = check_expert_size(stock.num_neurons, config.expert_size)

    @property
    def num_kept_experts(self) -> int:
        """How many experts are kept."""
        return kept_count(self.num_experts, self.target_sparsity)

    def expert_multipliers(self, x: Tensor, activated: Tensor, hidden: Tensor) -> Tensor:
        """m of each expert, [..., E]; the arguments are those of `multipliers`."""
        raise NotImplementedError

    def multipliers(self, x: Tensor, activated: Tensor, hidden: Tensor) -> Tensor:
        """See `NeuronFfn`."""
        experts = self.expert_multipliers(x, activated, hidden)
        return experts.repeat_interleave(self.num_neurons // self.num_experts, dim=-1)

    def by_expert(self, hidden: Tensor) -> Tensor:
        """h [..., F] as [..., E, S]."""
        return hidden.unflatten(-1, (self.num_experts, -1))
