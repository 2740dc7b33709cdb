"""Static pruning: the experts that matter least on average are removed for good.

The control that contextual routing must beat: the same share of neurons gone, the same training, and no router. The
result is a stock dense model with a smaller FFN.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lte.config import check_fraction
from lte.hf.families import Family, dense_ffns, family_of
from lte.hf.install import num_neurons
from lte.nn.clustering import check_expert_size


@dataclass(frozen=True, kw_only=True)
class StaticPruningConfig:
    """What to remove.

    Attributes:
        target_sparsity: share of the neurons of every layer to remove, rounded to whole experts.
        expert_size: neurons are kept in multiples of this number, as hardware likes them.
    """

    target_sparsity: float = 0.5
    expert_size: int = 32

    def __post_init__(self) -> None:
        check_fraction("target_sparsity", self.target_sparsity)


@torch.no_grad()
def prune_static_(
    model: nn.Module, config: StaticPruningConfig, batches: Iterable[Mapping[str, Tensor]]
) -> nn.Module:
    """Removes the neurons with the smallest mean |h| * ||w_down|| on `batches`, the same number in every layer.

    Args:
        model: a dense model of a supported family; changed in place and returned.
        config: what to remove.
        batches: calibration batches with `input_ids` and optionally `attention_mask`.

    Raises:
        ValueError: for an unsupported family, an `expert_size` that does not divide the neurons, or no batches.
    """
    family = family_of(model.config)
    ffns = dense_ffns(model, family)
    sizes = {num_neurons(ffn, family.layout) for ffn in ffns.values()}
    if len(sizes) != 1:
        raise ValueError(f"model must have FFNs of one width, got widths {sorted(sizes)}")
    neurons = sizes.pop()
    experts = check_expert_size(neurons, config.expert_size)
    kept = config.expert_size * max(1, round(experts * (1 - config.target_sparsity)))
    importance = _importance(model, ffns, family, batches)
    for name, ffn in ffns.items():
        order = importance[name].argsort(descending=True, stable=True)[:kept].sort().values
        _keep_neurons_(ffn, family, order, neurons)
    model.config.intermediate_size = kept  # type: ignore[union-attr]
    return model


def _importance(
    model: nn.Module, ffns: Mapping[str, nn.Module], family: Family, batches: Iterable[Mapping[str, Tensor]]
) -> dict[str, Tensor]:
    """Mean |h| * ||w_down|| of every neuron, [F] by FFN."""
    sums: dict[str, Tensor] = {}

    def add(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            total = args[0].abs().flatten(0, -2).float().sum(0)
            sums[name] = sums.get(name, torch.zeros_like(total)) + total

        return hook

    down = family.layout.down
    hooks = [ffn.get_submodule(down).register_forward_pre_hook(add(name)) for name, ffn in ffns.items()]
    try:
        for batch in batches:
            model(**{key: batch[key] for key in ("input_ids", "attention_mask") if key in batch})
    finally:
        for handle in hooks:
            handle.remove()
    if not sums:
        raise ValueError("batches must hold at least one calibration batch, got none")
    return {name: sums[name] * ffn.get_submodule(down).weight.float().norm(dim=0) for name, ffn in ffns.items()}


def _keep_neurons_(ffn: nn.Module, family: Family, order: Tensor, neurons: int) -> None:
    """Shrinks the projections of one FFN to the neurons in `order`."""
    for name in family.layout.projections:
        linear: Any = ffn.get_submodule(name)
        if name == family.layout.down:
            linear.weight = nn.Parameter(linear.weight[:, order].clone())
            linear.in_features = len(order)
            continue
        index = torch.cat([order, order + neurons]) if family.layout.fused else order
        linear.weight = nn.Parameter(linear.weight[index].clone())
        linear.out_features = len(index)
        if linear.bias is not None:
            linear.bias = nn.Parameter(linear.bias[index].clone())
