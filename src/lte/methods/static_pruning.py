"""Static pruning: the neurons that matter least on average are removed for good.

The control that contextual routing must beat: the same share of neurons gone, the same training, and no
router. The result is a stock dense model with a smaller FFN, which trains, saves, and loads anywhere.

Shapes: F neurons, E = F / S experts of S neurons.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from lte.config import MethodConfig, check_choice, check_expert_size
from lte.hf.families import Family, dense_ffns, family_of
from lte.hf.install import num_neurons, sparse_ffns
from lte.hf.loading import own_config_
from lte.hf.projections import is_plain_projection, projection_name
from lte.methods.calibration import run_batches
from lte.methods.method import Method, register
from lte.nn.clustering import group_neurons
from lte.nn.hooks import before_each_call
from lte.nn.sparse_ffn import FfnLayout

Granularity = Literal["neuron", "expert"]
ExpertGrouping = Literal["kmeans", "random", "contiguous"]


@dataclass(frozen=True, kw_only=True)
class StaticPruningConfig(MethodConfig):
    """What to remove.

    Every layer loses the same number of neurons, since a stock config has one FFN width for all layers; there
    is no ranking across layers.

    Attributes:
        target_sparsity: share of the neurons of every layer to remove, rounded to whole experts; one expert
            at least stays.
        expert_size: S; neurons are kept in multiples of it, as LTE does and as hardware likes them.
        granularity: `neuron` removes the neurons of the lowest scores, the stronger baseline; `expert`
            removes whole experts of the grouping that `sparsify_` makes, by the sums of their neurons'
            scores.
        grouping: how neurons are put into experts; only for `granularity="expert"`.
        seed: seed of the grouping, as in `LteConfig`.
    """

    name = "static_pruning"
    expert_size: int = 32
    granularity: Granularity = "neuron"
    grouping: ExpertGrouping = "kmeans"
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("granularity", self.granularity, get_args(Granularity))
        check_choice("grouping", self.grouping, get_args(ExpertGrouping))
        if self.expert_size < 1:
            raise ValueError(f"expert_size must be at least 1, got expert_size={self.expert_size}")

    def kept_neurons(self, neurons: int) -> int:
        """How many of the F `neurons` of a layer stay; 1 - kept / F is the sparsity that counts.

        Raises:
            ValueError: if `expert_size` does not divide F.
        """
        experts = check_expert_size(neurons, self.expert_size)
        return self.expert_size * max(1, round(experts * (1 - self.target_sparsity)))


@torch.no_grad()
def prune_static_(model: nn.Module, config: StaticPruningConfig, batches: Iterable[Mapping[str, Tensor]]) -> nn.Module:
    """Removes the least important neurons of every FFN in place and returns the smaller, stock dense model.

    The score of a neuron is mean |h| * ||w_down||, the mean over the calibration tokens that are no padding.
    The model then computes what the dense one computes with the removed neurons set to zero.

    Args:
        model: a dense model of a supported family.
        config: what to remove.
        batches: calibration batches with `input_ids` and optionally `attention_mask`, [B, T].

    Raises:
        ValueError: for an unknown family, an LTE or quantised model, FFNs of several widths, an `expert_size`
            that does not divide them, or no calibration token. The model is then unchanged.
    """
    family = family_of(getattr(model, "config", model))
    ffns = _prunable_ffns(model, family)
    neurons = num_neurons(next(iter(ffns.values())), family.layout)
    kept = config.kept_neurons(neurons)
    importance = neuron_importance(model, batches)
    picks = [
        _picked_neurons(importance[name], ffn, family.layout, config, config.seed + index)
        for index, (name, ffn) in enumerate(ffns.items())
    ]
    setattr(own_config_(model), family.neurons_field, kept)
    for ffn, index in zip(ffns.values(), picks, strict=True):
        _keep_neurons_(ffn, family.layout, index)
    return model


@torch.no_grad()
def neuron_importance(model: nn.Module, batches: Iterable[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Mean |h| * ||w_down|| of every neuron, fp32 [F] by qualified name of the FFN.

    Args:
        model: a dense model of a supported family; it runs in eval mode, and its modes are restored.
        batches: as for `prune_static_`.

    Raises:
        ValueError: if the batches hold no token that is no padding, or an activation is not finite.
    """
    family = family_of(getattr(model, "config", model))
    ffns = dense_ffns(model, family)
    sums = {name: torch.zeros((), dtype=torch.float64) for name in ffns}
    masks: dict[str, Tensor] = {}

    def add(name: str, args: tuple[Tensor, ...]) -> None:
        rows = args[0].abs().float().flatten(0, -2)
        total = masks[name].float().to(rows.device).flatten() @ rows
        sums[name] = sums[name].to(total.device) + total

    down = family.layout.down
    with before_each_call({name: ffn.get_submodule(down) for name, ffn in ffns.items()}, add):
        tokens = run_batches(model, batches, masks, list(ffns))
    norms = {name: _matrix(ffn, family.layout, down).float().norm(dim=0) for name, ffn in ffns.items()}
    scores = {name: (sums[name] / tokens[name]).float() * norms[name] for name in ffns}
    if not all(score.isfinite().all() for score in scores.values()):
        raise ValueError("activations must be finite, got NaN or infinity; the weights are damaged")
    return scores


def _picked_neurons(
    scores: Tensor, ffn: nn.Module, layout: FfnLayout, config: StaticPruningConfig, seed: int
) -> Tensor:
    """Indices of the neurons that stay, ascending."""
    kept = config.kept_neurons(len(scores))
    if config.granularity == "neuron":
        return scores.argsort(descending=True, stable=True)[:kept].sort().values
    features = _matrix(ffn, layout, layout.gate or layout.up)[: len(scores)]
    order = group_neurons(
        features,
        num_neurons=len(scores),
        expert_size=config.expert_size,
        method=config.grouping,
        seed=seed,
    ).to(scores.device)
    members = order.unflatten(0, (-1, config.expert_size))
    experts = scores[members].sum(1).argsort(descending=True, stable=True)
    return members[experts[: kept // config.expert_size]].flatten().sort().values


def _prunable_ffns(model: nn.Module, family: Family) -> dict[str, nn.Module]:
    if sparse_ffns(model):
        raise ValueError("model must be dense, got an LTE model; call lte.densify_(model) first")
    ffns = dense_ffns(model, family)
    if not ffns:
        raise ValueError(f"model must contain {family.ffn_class} modules, got none")
    for name, ffn in ffns.items():
        for part in family.layout.projections:
            linear: Any = ffn.get_submodule(part)
            if not is_plain_projection(linear, family.layout) or linear.weight.is_meta:
                raise ValueError(
                    f"{name}.{part} must be a plain floating-point {projection_name(family.layout)} with its weights, "
                    f"got {type(linear).__name__}; load the model without quantisation and merge adapters first"
                )
    sizes = sorted({num_neurons(ffn, family.layout) for ffn in ffns.values()})
    if len(sizes) != 1:
        raise ValueError(f"model must have FFNs of one width, got widths {sizes}")
    return ffns


def _keep_neurons_(ffn: Any, layout: FfnLayout, index: Tensor) -> None:
    """Leaves a stock FFN with the neurons `index` alone, in place."""
    neurons, kept = num_neurons(ffn, layout), len(index)
    for name in layout.projections:
        projection: Any = ffn.get_submodule(name)
        matrix = layout.matrix(projection)
        sizes = ("nx", "nf") if layout.transposed else ("in_features", "out_features")
        if name == layout.down:
            matrix = matrix[:, index]
            setattr(projection, sizes[0], kept)
        else:
            rows = torch.cat([index, index + neurons]) if layout.fused and name == layout.up else index
            matrix = matrix[rows]
            setattr(projection, sizes[1], len(rows))
            if projection.bias is not None:
                projection.bias = nn.Parameter(projection.bias[rows], requires_grad=projection.bias.requires_grad)
        weight = (matrix.T if layout.transposed else matrix).contiguous()
        projection.weight = nn.Parameter(weight, requires_grad=projection.weight.requires_grad)
    if hasattr(ffn, "intermediate_size"):
        ffn.intermediate_size = kept


def _matrix(ffn: nn.Module, layout: FfnLayout, name: str) -> Tensor:
    return layout.matrix(ffn.get_submodule(name)).detach()


register(
    Method(
        config=StaticPruningConfig,
        about="no neurons for a single token: those that matter least on average are gone",
        prepare=prune_static_,
        needs_calibration=lambda config: True,
        trained=True,
        no_kernels="it leaves a stock model of fewer neurons, which is faster as it is",
        removes_neurons=True,
    )
)
