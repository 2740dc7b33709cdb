"""What a token costs a model of any method, from what `lte.eval.sparsity` counted."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from lte.eval.flops import block_linears, count_linear_weights
from lte.eval.rounding import bytes_per_weight
from lte.eval.sparsity import Measurement
from lte.hf.families import dense_ffns, family_of
from lte.hf.install import num_neurons
from lte.hf.loading import method_settings
from lte.methods import config_of, method_of
from lte.nn.torchao_weights import stored_bytes


@dataclass(frozen=True)
class Cost:
    """What one token costs at batch size 1, by the conventions of `lte.eval.flops`.

    Attributes:
        sparsity: share of FFN neurons not computed or not used per token; of a statically pruned model the share that
            is gone.
        weight_sparsity: share of the weights of all block linears that is not read.
        flops_per_token: 2 per weight read, routers and predictors included; zeros of pruned weights do not count.
        bytes_per_token: 2 per weight read, or what torchao left of them where it rounded the weights
            (`lte.nn.torchao_weights.stored_bytes`), and 4 per weight of a router or predictor. A matrix with zeros
            among its weights takes 2 bytes per non-zero and 1 bit per weight, which says where they are, where that is
            less. 2:4 takes the same: 2 bits for each of the two of four.
    """

    sparsity: float
    weight_sparsity: float
    flops_per_token: float
    bytes_per_token: float


def method_name(model: Any) -> str:
    """The name of the method that made a model, or `dense`."""
    config = config_of(model)
    return "dense" if config is None else config.name


def record_fields(model: Any, measurement: Measurement | None) -> dict[str, Any]:
    """What a result record says of a measured model of any method, by the names in `lte.records`."""
    config = config_of(model)
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

    Raises:
        ValueError: for a measurement of LTE from before version 2, which does not say what was read.
    """
    weights = count_linear_weights(model)
    total = weights.attention + sum(weights.ffn)
    if measurement is None:
        return _stock_cost(model, total)
    if measurement.weights_read is None or measurement.dense_weights is None or measurement.selector_weights is None:
        raise ValueError("measurement must say what was read, got one of an earlier version; measure the model again")
    read = total - measurement.dense_weights + measurement.weights_read
    selector = measurement.selector_weights
    bytes_read = bytes_per_weight(model) * read + 4 * selector
    return Cost(measurement.sparsity, 1 - read / total, 2 * (read + selector), bytes_read)


def _stock_cost(model: Any, total: int) -> Cost:
    """The cost of a stock model, which a method may have left with zeros among its weights, or with fewer neurons."""
    method = method_of(model)
    weights = [linear.weight for linear in block_linears(model)]
    nonzero, stored = sum(weight.numel() for weight in weights), sum(map(stored_bytes, weights))
    if method is not None and method.zeroes_weights:
        sizes = [(weight.numel(), int(weight.count_nonzero())) for weight in weights]
        nonzero = sum(count for _, count in sizes)
        stored = sum(min(2 * size, 2 * count + size / 8) for size, count in sizes)
    family = family_of(model.config)
    neurons = num_neurons(next(iter(dense_ffns(model, family).values())), family.layout)
    dense_neurons = (method_settings(model.config) or {}).get("dense_neurons", neurons)
    gone = sum(count_linear_weights(model).ffn) * (dense_neurons / neurons - 1)
    return Cost(1 - neurons / dense_neurons, 1 - nonzero / (total + gone), 2.0 * nonzero, float(stored))
