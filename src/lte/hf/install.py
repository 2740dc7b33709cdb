"""The wrapped FFNs of a model: finding them, and building them around a family's own projections."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from lte.config import LteConfig, check_expert_size
from lte.hf.families import Family, block_name, dense_ffns
from lte.hf.projections import base_of
from lte.nn.router import Router
from lte.nn.router_context import ContextReader, fill_positions
from lte.nn.sparse_ffn import SparseFfn
from lte.nn.wrapped_ffn import FfnLayout, WrappedFfn


@dataclass(frozen=True)
class StockFfn:
    """A stock FFN that a `WrappedFfn` is about to be built around.

    Attributes:
        index: its place in depth order, from 0.
        module: the stock module, or the block that holds a spread FFN.
        layout: what each projection does.
    """

    index: int
    module: nn.Module
    layout: FfnLayout

    @property
    def parts(self) -> Mapping[str, nn.Module] | nn.Module:
        """What `WrappedFfn` takes: the parts by name, or the block."""
        if self.layout.spread:
            return self.module
        return {name: self.module.get_submodule(name) for name in self.layout.parts}

    @property
    def activation(self) -> Callable[[Tensor], Tensor]:
        """The activation function."""
        return attrgetter(self.layout.activation)(self.module)

    @property
    def _up(self) -> Tensor:
        return self.layout.matrix(self.module.get_submodule(self.layout.up))

    @property
    def hidden_size(self) -> int:
        """D."""
        return self._up.shape[1]

    @property
    def num_neurons(self) -> int:
        """F."""
        return num_neurons(self.module, self.layout)

    @property
    def device(self) -> torch.device:
        """Where the weights lie, the meta device included."""
        return self._up.device


def sparse_ffns(model: nn.Module) -> dict[str, SparseFfn]:
    """The sparse FFNs of `model` by qualified name, in depth order; empty for a dense model."""
    return {name: module for name, module in model.named_modules() if isinstance(module, SparseFfn)}


def require_sparse_ffns(model: nn.Module) -> dict[str, SparseFfn]:
    """As `sparse_ffns`, but a model without any is a `ValueError`."""
    found = sparse_ffns(model)
    if not found:
        raise ValueError(
            "model must be an LTE model, got one without sparse FFNs; call lte.sparsify_(model, ...) first"
        )
    return found


def wrapped_ffns(model: nn.Module) -> dict[str, WrappedFfn]:
    """The FFNs of `model` that LTE or another method has wrapped, by qualified name, in depth order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, WrappedFfn)}


def install_wrapped_ffns_(model: nn.Module, family: Family, build: Callable[[StockFfn], WrappedFfn]) -> None:
    """Replaces the stock FFNs of `model` by what `build` makes around the same projections, on any device."""
    check_unchunked(model, family)
    layout = family.layout
    for index, (name, ffn) in enumerate(dense_ffns(model, family).items()):
        wrapped = build(StockFfn(index, ffn, layout))
        place = f"{name}.{layout.activation}" if layout.spread else name
        model.set_submodule(place, wrapped.train(ffn.training))


def check_reachable(config: LteConfig, num_experts: int) -> None:
    """Refuses a target above what is left beside the experts that are always on, of which there are whole ones.

    Args:
        config: of the model.
        num_experts: of an FFN.

    Raises:
        ValueError: says what can be reached.
    """
    always = config.num_always_on(num_experts)
    most = 1 - always / num_experts
    if config.target_sparsity > most + 1e-9:
        raise ValueError(
            f"target_sparsity must be at most {most:g} where {always} of {num_experts} experts are always on, got "
            f"target_sparsity={config.target_sparsity} with always_on={config.always_on}; lower it, or take smaller "
            "experts"
        )


def install_sparse_ffns_(model: nn.Module, family: Family, config: LteConfig) -> None:
    """Replaces the stock FFNs of `model` by `SparseFfn`s around the same projections, on any device."""

    readers = read_context_(model, family) if config.router_context else []

    def build(stock: StockFfn) -> SparseFfn:
        router = new_router(stock, config, stock.device)
        if config.dropped_bias:
            down = stock.module.get_submodule(stock.layout.down)
            if stock.layout.spread and base_of(down).bias is None:
                raise ValueError(
                    f"dropped_bias must be false for FFNs that are spread over their blocks and have no biases, got "
                    f"dropped_bias=True for {family.model_type}"
                )
            add_down_bias_(down)
        ffn = SparseFfn(stock.parts, stock.activation, stock.layout, router, config.threshold)
        if readers:
            ffn.context_reader = readers[stock.index]
        return ffn

    install_wrapped_ffns_(model, family, build)


def read_context_(model: nn.Module, family: Family) -> list[ContextReader]:
    """Has the attention of a decoder's blocks say cache and positions to what each FFN's router reads the context with.

    Raises:
        ValueError: for a family whose blocks are not told of them.
    """
    names = list(dense_ffns(model, family))
    attentions = []
    for name in names:
        block = model.get_submodule(block_name(name))
        told = inspect.signature(block.forward).parameters
        found = [each for each in block.children() if "past_key_values" in inspect.signature(each.forward).parameters]
        if family.layout.spread or not {"position_ids", "past_key_values"} <= set(told) or len(found) != 1:
            raise ValueError(
                f"router_context must be 0 for {family.model_type}, whose blocks are not told where a token stands; "
                "Llama, Mistral, Qwen, Gemma and Phi-3 models take it"
            )
        attentions += found
    readers = [ContextReader(place, len(names)) for place in range(len(names))]
    for attention, reader in zip(attentions, readers, strict=True):
        attention.register_forward_pre_hook(reader, with_kwargs=True)
    decoder = model.get_submodule(block_name(names[0]).rpartition(".")[0].rpartition(".")[0])
    decoder.register_forward_pre_hook(fill_positions, with_kwargs=True)
    return readers


def forget_context_(model: nn.Module) -> None:
    """Takes back what `read_context_` has done."""
    for module in model.modules():
        for key, hook in list(module._forward_pre_hooks.items()):
            if isinstance(hook, ContextReader) or hook is fill_positions:
                del module._forward_pre_hooks[key]
                module._forward_pre_hooks_with_kwargs.pop(key, None)


def new_router(stock: StockFfn, config: LteConfig, device: torch.device) -> Router:
    """The untrained router of an FFN, in fp32; on the meta device it has no numbers."""
    num_experts = check_expert_size(stock.num_neurons, config.expert_size)
    always_on = config.num_always_on(num_experts)
    factory = {"device": device, "dtype": torch.float32}
    router = Router(stock.hidden_size, num_experts, config.router_rank, always_on, config.router_context, **factory)
    if device.type != "meta" and (config.router_rank or config.router_context):
        router.reset_parameters(torch.Generator(device).manual_seed(config.seed + stock.index))
    return router


def add_down_bias_(down: Any) -> None:
    """Gives a down projection, with adapters or without, a bias of zeros, if it has none."""
    linear = base_of(down)
    if linear.bias is None:
        dtype = linear.weight.dtype if linear.weight.is_floating_point() else torch.float32
        linear.bias = nn.Parameter(torch.zeros(linear.out_features, device=linear.weight.device, dtype=dtype))


def drop_down_bias_(down: Any, stock: Any) -> None:
    """Takes the bias off a down projection whose stock one has none."""
    linear = base_of(down)
    if stock.bias is None and linear.bias is not None:
        linear.bias = None


def check_unchunked(model: nn.Module, family: Family) -> None:
    """Refuses blocks that call a spread FFN chunk by chunk: its routing would be recorded for the last chunk alone.

    Raises:
        ValueError: for a `chunk_size_feed_forward` of such a model.
    """
    chunk = getattr(getattr(model, "config", None), "chunk_size_feed_forward", 0)
    if family.layout.spread and chunk:
        raise ValueError(
            f"chunk_size_feed_forward must be 0 for {family.model_type}, got chunk_size_feed_forward={chunk}"
        )


def num_neurons(ffn: nn.Module, layout: FfnLayout) -> int:
    """F of an FFN, stock or wrapped."""
    if isinstance(ffn, WrappedFfn):
        return ffn.num_neurons
    return layout.matrix(ffn.get_submodule(layout.down)).shape[1]
