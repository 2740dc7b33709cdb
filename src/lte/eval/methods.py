"""What a model of any method costs, counted in the pass that measures its quality.

Shapes: L FFNs; a token counts where the token mask is true.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lte.eval.flops import block_linears, bytes_per_token, count_linear_weights, flops_per_token
from lte.eval.inference import Batch, count_batches
from lte.eval.sparsity import SparsityCounter, SparsityMeasurement
from lte.hf.families import dense_ffns, family_of
from lte.hf.install import num_neurons, sparse_ffns
from lte.methods.contract import METHODS, config_of
from lte.methods.metering import MeteredModule, metered_modules


@dataclass(frozen=True)
class MethodMeasurement:
    """What the modules of a method did for the counted tokens.

    Attributes:
        sparsity: share of FFN neurons not computed or not used per token, mean over tokens and layers.
        layer_sparsity: the same by layer, [L].
        tokens: how many tokens were counted, on both sides of an encoder-decoder.
        weights_read: weights that these modules read per token, without routers and predictors.
        dense_weights: how many they would read densely.
        selector_weights: weights of routers and predictors read per token, in fp32.
    """

    sparsity: float
    layer_sparsity: list[float]
    tokens: int
    weights_read: float
    dense_weights: int
    selector_weights: int

    def to_dict(self) -> dict[str, Any]:
        """All fields, JSON-ready."""
        return asdict(self)


@dataclass(frozen=True)
class Cost:
    """What one token costs at batch size 1, by the conventions of `lte.eval.flops`.

    Attributes:
        sparsity: share of FFN neurons not computed or not used per token; of a statically pruned model the share that
            is gone.
        weight_sparsity: share of the weights of all block linears that is not read.
        flops_per_token: 2 per weight read, routers and predictors included; zeros of pruned weights do not count.
        bytes_per_token: 2 per weight read, 4 per weight of a router or predictor. A matrix with zeros among its
            weights takes 2 bytes per non-zero and 1 bit per weight, which says where they are, where that is less.
            2:4 takes the same: 2 bits for each of the two of four.
    """

    sparsity: float
    weight_sparsity: float
    flops_per_token: float
    bytes_per_token: float


class _ModuleCounts:
    """Running sums of one module, on its device; nothing here waits for the device."""

    def __init__(self, module: MeteredModule):
        self.module = module
        self.weights = self.neurons = self.tokens = torch.zeros((), dtype=torch.int64)
        self.selector = 0
        self.has_neurons = False

    def update(self, mask: Tensor) -> None:
        reading, self.module.reading = self.module.reading, None
        if reading is None or reading.weights.numel() != mask.numel():
            got = None if reading is None else tuple(reading.weights.shape)
            raise ValueError(f"mask must be [B, T] of the last forward pass, {got}, got mask={tuple(mask.shape)}")
        keep = mask.to(reading.weights.device, non_blocking=True).flatten()
        self.weights = (reading.weights.flatten() * keep).sum() + self.weights.to(keep.device)
        self.tokens = keep.sum() + self.tokens.to(keep.device)
        self.selector = reading.selector
        if reading.neurons is not None:
            self.neurons = (reading.neurons.flatten() * keep).sum() + self.neurons.to(keep.device)
            self.has_neurons = True


class MethodCounter:
    """Collects what a method's modules read while something else runs the model.

    Used as `lte.eval.sparsity.SparsityCounter`: inside the context call the model, then `update` with its token masks.

    Args:
        model: a model of a method that installs modules.
    """

    def __init__(self, model: nn.Module):
        self.layers = {name: _ModuleCounts(module) for name, module in metered_modules(model).items()}
        if not self.layers:
            raise ValueError(
                f"model must hold modules of a method, got {type(model).__name__}; measured_cost takes stock models"
            )
        self.tokens: list[Tensor] = []

    def __enter__(self) -> MethodCounter:
        for layer in self.layers.values():
            layer.module.metering, layer.module.reading = True, None
        return self

    def __exit__(self, *error: object) -> None:
        for layer in self.layers.values():
            layer.module.metering, layer.module.reading = False, None

    @torch.no_grad()
    def update(self, mask: Tensor | Mapping[str, Tensor]) -> None:
        """Counts the forward pass that just ended over the tokens of `mask` (bool, [B, T]), one for all or by module.

        Raises:
            ValueError: if no forward pass came before, or a mask is not of its shape.
        """
        masks = dict.fromkeys(self.layers, mask) if isinstance(mask, Tensor) else mask
        for name, layer in self.layers.items():
            layer.update(masks[name])
        self.tokens.append(torch.stack([each.sum() for each in {id(m): m for m in masks.values()}.values()]).sum())

    def result(self) -> MethodMeasurement:
        """The counts so far.

        Raises:
            ValueError: if no token was counted.
        """
        layers = list(self.layers.values())
        counts = [int(layer.tokens) for layer in layers]
        if not all(counts):
            raise ValueError("batches must hold at least one counted token, got none")
        pairs = list(zip(layers, counts, strict=True))
        kept = [int(layer.neurons) / count / layer.module.dense_neurons for layer, count in pairs if layer.has_neurons]
        return MethodMeasurement(
            sparsity=1 - sum(kept) / len(kept),
            layer_sparsity=[1 - share for share in kept],
            tokens=int(torch.stack(self.tokens).sum()),
            weights_read=sum(int(layer.weights) / count for layer, count in pairs),
            dense_weights=sum(layer.module.dense_weights for layer in layers),
            selector_weights=sum(layer.selector for layer in layers),
        )


Measurement = SparsityMeasurement | MethodMeasurement
Counter = SparsityCounter | MethodCounter


def new_counter(model: nn.Module) -> Counter | None:
    """What counts while a model of any kind runs; `None` for a stock model, which has nothing to count."""
    if sparse_ffns(model):
        return SparsityCounter(model)
    return MethodCounter(model) if metered_modules(model) else None


def counter_for(model: nn.Module) -> AbstractContextManager[Counter | None]:
    """`new_counter` as a context."""
    return new_counter(model) or nullcontext()


def measure_method(model: nn.Module, batches: Iterable[Batch]) -> MethodMeasurement:
    """Runs a model of a method, with any head, over `batches` and counts; for LTE there is `measure_sparsity`.

    Args:
        model: a model of a method that installs modules.
        batches: `input_ids` and optionally `attention_mask` and `labels`, [B, T], on any device.

    Raises:
        ValueError: for a model without such modules, or batches without a counted token.
    """
    with MethodCounter(model) as counter:
        count_batches(model, counter, batches)
        return counter.result()


def method_name(model: Any) -> str:
    """`lte`, the name of another method, or `dense`."""
    if sparse_ffns(model):
        return "lte"
    config = config_of(model)
    return "dense" if config is None else config.name


def record_fields(model: Any, measurement: Measurement | None) -> dict[str, Any]:
    """What a result record says of a measured model of any method, by the names in `lte.records`."""
    config = model.lte_config if sparse_ffns(model) else config_of(model)
    return {
        "method": method_name(model),
        "method_config": None if config is None else config.to_dict(),
        "target_sparsity": 0.0 if config is None else config.target_sparsity,
        **asdict(measured_cost(model, measurement)),
        "measurement": None if measurement is None else measurement.to_dict(),
    }


def measured_cost(model: Any, measurement: Measurement | None) -> Cost:
    """What a token costs, from what a pass measured.

    Args:
        model: dense, LTE, or of any other method.
        measurement: what `lte.eval.perplexity.evaluate_model` returned for it; `None` for a stock model.
    """
    weights = count_linear_weights(model)
    total = weights.attention + sum(weights.ffn)
    if measurement is None:
        return _stock_cost(model, total)
    if isinstance(measurement, SparsityMeasurement):
        layers = measurement.layer_sparsity
        skipped = sum(share * count for share, count in zip(layers, weights.ffn, strict=True)) / total
        return Cost(measurement.sparsity, skipped, flops_per_token(model, layers), bytes_per_token(model, layers))
    read = total - measurement.dense_weights + measurement.weights_read
    selector = measurement.selector_weights
    return Cost(measurement.sparsity, 1 - read / total, 2 * (read + selector), 2 * read + 4 * selector)


def _stock_cost(model: Any, total: int) -> Cost:
    """The cost of a stock model, which a method may have left with zeros among its weights, or with fewer neurons."""
    config = config_of(model)
    sizes = [(linear.weight.numel(), linear.weight.numel()) for linear in block_linears(model)]
    if config is not None and METHODS[config.name].zeroes_weights:
        sizes = [(linear.weight.numel(), int(linear.weight.count_nonzero())) for linear in block_linears(model)]
    nonzero = sum(count for _, count in sizes)
    stored = sum(min(2 * size, 2 * count + size / 8) for size, count in sizes)
    family = family_of(model.config)
    neurons = num_neurons(next(iter(dense_ffns(model, family).values())), family.layout)
    dense_neurons = (getattr(model.config, "lte_method", None) or {}).get("dense_neurons", neurons)
    gone = sum(count_linear_weights(model).ffn) * (dense_neurons / neurons - 1)
    return Cost(1 - neurons / dense_neurons, 1 - nonzero / (total + gone), 2.0 * nonzero, float(stored))
