"""A dense model's FFNs: whether they can be converted, their neurons grouped into experts, and the stock FFNs back."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lte.config import CALIBRATED_GROUPINGS, Grouping, LteConfig, check_expert_size
from lte.hf.families import Family, dense_ffns, family_of
from lte.hf.inputs import padding_masks, run_without_logits
from lte.hf.install import (
    check_reachable,
    check_unchunked,
    drop_down_bias_,
    forget_context_,
    num_neurons,
    sparse_ffns,
    wrapped_ffns,
)
from lte.hf.loading import is_ours
from lte.hf.projections import base_of, is_plain_projection, permute_adapters_, projection_name
from lte.nn.all_or_nothing import all_or_nothing, on_failure
from lte.nn.clustering import ChunkProducts, CoactivationCounts, ContributionProducts, UsageCounts, group_neurons
from lte.nn.hooks import before_each_call
from lte.nn.sparse_ffn import FfnLayout
from lte.progress import tracked


def unwrap_ffns_(model: nn.Module, family: Family, stock_config: Any) -> None:
    """Puts stock FFNs in the place of all wrapped ones, around the same projections.

    Args:
        model: with the stock classes already.
        family: its row.
        stock_config: what the stock FFNs are made from.
    """
    forget_context_(model)
    for name, wrapped in wrapped_ffns(model).items():
        if family.layout.spread:
            wrapped.leave_()
            model.set_submodule(name, wrapped.activation_function)  # type: ignore[arg-type]
            continue
        with torch.device("meta"):
            dense = family.new_ffn(stock_config, wrapped.num_neurons)
        drop_down_bias_(wrapped.part(family.layout.down), dense.get_submodule(family.layout.down))
        for part in family.layout.parts:
            setattr(dense, part, wrapped.part(part))
        dense.train(wrapped.training)
        for place, module in list(model.named_modules(remove_duplicate=False)):
            if module is wrapped:
                model.set_submodule(place, dense)


def require_dense(model: nn.Module, *, weightless: bool = False) -> Family:
    """The family of a model whose FFNs can be replaced.

    Args:
        model: any.
        weightless: whether its weights may lie on the meta device.

    Raises:
        ValueError: for an unknown family, a model with nothing to convert or already converted, or quantised weights.
    """
    if sparse_ffns(model):
        raise ValueError("model must be dense, got an LTE model; call lte.densify_(model) first to convert it anew")
    if is_ours(model):
        raise ValueError(
            f"model must be dense, got {type(model).__name__}, which a method changed; call lte.densify_(model) first "
            "or load the dense model"
        )
    family = family_of(getattr(model, "config", model))
    _check_convertible(model, dense_ffns(model, family), family, weightless)
    return family


def group_experts_(
    model: nn.Module, config: LteConfig, calibration: Iterable[Mapping[str, Tensor]] | None = None
) -> None:
    """Permutes the neurons of every FFN of a dense model in place so that the experts of `config` are contiguous.

    Args:
        model: a dense model, from `require_dense`; its function stays.
        config: of which `expert_size`, `grouping` and `seed` count.
        calibration: as for `lte.sparsify_`.

    Raises:
        ValueError: for an `expert_size` that does not divide the neurons, or a missing `calibration`. The model is
            then unchanged.
    """
    family = family_of(model.config)
    ffns = dense_ffns(model, family)
    for ffn in ffns.values():
        check_reachable(config, check_expert_size(num_neurons(ffn, family.layout), config.expert_size))
    seen = _activity(model, ffns, family, config, calibration) if config.needs_text else {}
    orders = _neuron_orders(ffns, seen, family, config)
    with all_or_nothing(model):
        permutations = _Permutations(family.layout)
        on_failure(permutations.undo_)
        for ffn, order in zip(ffns.values(), orders, strict=True):
            permutations.apply_(ffn, order)


class _Permutations:
    """Permutes the neurons of FFNs, and undoes it, wherever it was interrupted."""

    def __init__(self, layout: FfnLayout):
        self.layout = layout
        self.done: list[tuple[nn.Module, Tensor]] = []
        self.current: nn.Module | None = None
        self.numbers: dict[nn.Parameter, Tensor] = {}

    def apply_(self, ffn: nn.Module, order: Tensor) -> None:
        """As `permute_neurons_`."""
        self.numbers = {parameter: parameter.detach().clone() for parameter in ffn.parameters()}
        self.current = ffn
        permute_neurons_(ffn, self.layout, order)
        self.done.append((ffn, order))
        self.current, self.numbers = None, {}

    @torch.no_grad()
    def undo_(self) -> None:
        """Puts the neurons of all FFNs where they were."""
        for ffn, order in self.done:
            if ffn is not self.current:
                permute_neurons_(ffn, self.layout, order.argsort())
        for parameter, numbers in self.numbers.items() if self.current is not None else ():
            parameter.copy_(numbers)


@torch.no_grad()
def permute_neurons_(ffn: nn.Module, layout: FfnLayout, order: Tensor) -> None:
    """Reorders the neurons of an FFN in place: new neuron i is the old neuron `order[i]` (order: [F])."""
    for name in layout.projections:
        linear: Any = ffn.get_submodule(name)
        matrix = layout.matrix(linear)
        index = order.to(matrix.device)
        matrix.copy_(permuted(matrix, layout, name, index))
        if name != layout.down and linear.bias is not None:
            linear.bias.copy_(permuted(linear.bias, layout, name, index))
        rows = _rows(layout, name, index)
        permute_adapters_(linear, index if rows is None else rows, inputs=rows is None)


def permuted(tensor: Tensor, layout: FfnLayout, projection: str, order: Tensor) -> Tensor:
    """A copy of a projection's weight or bias with the neurons of its FFN in another order.

    Args:
        tensor: [out, in] or [out].
        layout: of the FFN.
        projection: the name that the layout gives it.
        order: [F], new neuron i is the old neuron `order[i]`.
    """
    rows = _rows(layout, projection, order)
    if rows is not None:
        return tensor[rows]
    return tensor.clone() if tensor.ndim == 1 else tensor[:, order]


def _rows(layout: FfnLayout, projection: str, order: Tensor) -> Tensor | None:
    """The order of the rows of a projection of which rows are neurons; `None` of the down projection."""
    if projection == layout.down:
        return None
    return torch.cat([order, order + len(order)]) if layout.fused else order


def _neuron_features(ffn: nn.Module, layout: FfnLayout) -> Tensor:
    """The (gate) input weights of the neurons [F, D], which the paper's k-means groups."""
    matrix = layout.matrix(ffn.get_submodule(layout.gate or layout.up))
    return matrix.detach()[: num_neurons(ffn, layout)]


@dataclass
class Activity:
    """What an FFN's neurons did on calibration text.

    Attributes:
        features: that the grouping compares, if it is one of `CALIBRATED_GROUPINGS`.
        usage: which neurons are used most, if some experts are always on.
    """

    features: CoactivationCounts | ContributionProducts | None
    usage: UsageCounts | None

    def update(self, hidden: Tensor, mask: Tensor) -> None:
        """Adds activations [B, T, F], or [B T, F], of the tokens of a mask [B, T]."""
        mask = mask.to(hidden.device)
        counted = _counted_tokens(hidden, mask)
        if isinstance(self.features, ChunkProducts):
            self.features.update_rows(hidden.reshape(*mask.shape, -1), mask)
        elif self.features is not None:
            self.features.update(counted)
        if self.usage is not None:
            self.usage.update(counted)


def _neuron_orders(
    ffns: Mapping[str, nn.Module], seen: Mapping[str, Activity], family: Family, config: LteConfig
) -> list[Tensor]:
    """The neuron order [F] of every FFN, found before any is changed."""
    return [
        neuron_order(_neuron_features(ffn, family.layout), config, config.seed + index, seen.get(name))
        for index, (name, ffn) in enumerate(tracked(ffns.items(), "Grouping neurons"))
    ]


def neuron_order(features: Tensor, config: LteConfig, seed: int, seen: Activity | None = None) -> Tensor:
    """The order of an FFN's neurons in which those of an expert are neighbours, int64 [F] on the CPU.

    The neurons of experts that are always on come first, then those of the others, which are grouped among themselves.

    Args:
        features: what k-means groups, the (gate) input weights [F, D].
        config: of which `expert_size`, `grouping` and `always_on` count.
        seed: of this FFN's groups.
        seen: what the neurons did on calibration text, for configs that need it; its sums are lost.

    Raises:
        ValueError: for groups by chunks of text without a whole one.
    """
    seen = seen or Activity(None, None)
    number, size = len(features), config.expert_size
    leaders = config.num_always_on(number // size) * size
    if isinstance(seen.features, ChunkProducts) and not seen.features.chunks:
        raise ValueError(
            f"calibration must hold rows of at least {seen.features.chunk} tokens for grouping=chunks, got none; give "
            "longer texts, or take grouping=contribution"
        )
    features = features if seen.features is None else seen.features.gram
    first = torch.empty(0, dtype=torch.int64) if seen.usage is None else seen.usage.most_used(leaders)
    rest = torch.ones(number, dtype=torch.bool)
    rest[first] = False
    others = rest.nonzero().flatten()
    if len(first):
        index = others.to(features.device)
        features = features[index] if seen.features is None else _compacted_(features, index)
    # What the neurons did is looked at once.
    order = group_neurons(
        features, num_neurons=len(others), expert_size=size, method=config.grouping, seed=seed, overwrite=True
    )
    return torch.cat([first, others[order]])


def _compacted_(products: Tensor, index: Tensor) -> Tensor:
    """The rows and columns [N, N] of an ascending index out of [F, F], moved together in place: no second [F, F]."""
    count = len(index)
    for rows in torch.arange(count, device=index.device).split(256):
        # What is written lies before what is still to be read.
        products[rows, :count] = products[index[rows]][:, index]
    return products[:count, :count]


def _check_convertible(model: nn.Module, ffns: Mapping[str, nn.Module], family: Family, weightless: bool) -> None:
    if not isinstance(model, PreTrainedModel):
        raise ValueError(
            f"model must be a transformers model itself, got the wrapper {type(model).__name__}; unwrap it first"
        )
    check_unchunked(model, family)
    if not ffns:
        raise ValueError(
            f"model must contain {family.ffn_class} modules, got none; lte converts the FFNs of "
            f"{', '.join(family.models.values())}"
        )
    _check_unshared(model, ffns, family)
    for name, ffn in ffns.items():
        for part in family.layout.projections:
            linear: Any = ffn.get_submodule(part)
            if not is_plain_projection(base_of(linear), family.layout):
                raise ValueError(
                    f"{name}.{part} must be a plain floating-point {projection_name(family.layout)}, got "
                    f"{type(linear).__name__}; "
                    "load the model without quantisation, and merge adapters that are not LoRA first"
                )
            if linear.weight.is_meta and not weightless:
                raise ValueError(f"{name}.{part} must hold its weights, got a meta tensor; load the model first")


def _check_unshared(model: nn.Module, ffns: Mapping[str, nn.Module], family: Family) -> None:
    """Refuses FFNs, or weights of them, that another place of the model uses as well: each FFN routes for itself."""
    own = {ffn: name for name, ffn in ffns.items()}
    for name, module in model.named_modules(remove_duplicate=False):
        if module in own and own[module] != name:
            raise ValueError(
                f"{name} must be an FFN of its own, got that of {own[module]} in both places; give each layer a copy "
                "(copy.deepcopy) before the conversion"
            )
    weights: dict[int, str] = {}
    parts: dict[str, Any] = {
        f"{name}.{part}": base_of(ffn.get_submodule(part))
        for name, ffn in ffns.items()
        for part in family.layout.projections
    }
    for name, linear in parts.items():
        pointer = linear.weight.data_ptr()
        if pointer and weights.setdefault(pointer, name) != name:
            raise ValueError(
                f"{name} must hold weights of its own, got those of {weights[pointer]}; give each layer a copy before "
                "the conversion"
            )
    for name, module in model.named_modules():
        # What lies in a projection, an adapter's base layer say, is not another place.
        elsewhere = not any(f"{name}.".startswith(f"{part}.") for part in parts)
        for parameter in module._parameters.values() if elsewhere else ():
            if parameter is not None and parameter.data_ptr() and parameter.data_ptr() in weights:
                raise ValueError(
                    f"{weights[parameter.data_ptr()]} must hold weights of its own, got those of {name}; give one of "
                    "them a copy before the conversion"
                )


@torch.no_grad()
def _activity(
    model: nn.Module,
    ffns: Mapping[str, nn.Module],
    family: Family,
    config: LteConfig,
    calibration: Iterable[Mapping[str, Tensor]] | None,
) -> dict[str, Activity]:
    """Runs the calibration batches through the dense model and looks at when its neurons are active, by FFN."""
    if calibration is None:
        what = f"always_on={config.always_on}" if config.always_on else f'grouping="{config.grouping}"'
        raise ValueError(f"{what} must get calibration batches, got calibration=None")
    downs: dict[str, Any] = {name: ffn.get_submodule(family.layout.down) for name, ffn in ffns.items()}
    seen = {name: collectors(config, down_norms(family.layout.matrix(down))) for name, down in downs.items()}
    masks: dict[str, Tensor] = {}

    def collect(name: str, args: tuple[Any, ...]) -> None:
        seen[name].update(args[0], masks[name])

    with before_each_call(downs, collect):
        for batch in tracked(calibration, "Comparing when neurons are active"):
            masks.update(padding_masks(model, ffns, batch))
            run_without_logits(model, batch)
    return seen


def down_norms(down: Tensor) -> Tensor:
    """The norm of what each neuron adds to an FFN's output where it is 1, fp32 [F].

    Args:
        down: the weight [D, F] of the down projection, in any dtype.
    """
    return torch.linalg.vector_norm(down.detach(), dim=0, dtype=torch.float32)


def collectors(config: LteConfig, norms: Tensor) -> Activity:
    """What looks at an FFN's neurons for the groups of a config.

    Args:
        config: of which `grouping` and `always_on` count.
        norms: `down_norms` of the FFN, [F].
    """
    features = _collector(config.grouping, norms) if config.grouping in CALIBRATED_GROUPINGS else None
    return Activity(features, UsageCounts(norms) if config.always_on else None)


def _collector(grouping: Grouping, norms: Tensor) -> CoactivationCounts | ContributionProducts:
    if grouping == "coactivation":
        return CoactivationCounts(len(norms))
    kind = ChunkProducts if grouping == "chunks" else ContributionProducts
    return kind(norms)


def _counted_tokens(hidden: Tensor, mask: Tensor) -> Tensor:
    """The rows [N, F] of what goes into a down projection, [..., F], that are no padding, by mask [B, T]."""
    return hidden.flatten(0, -2)[mask.flatten()]
