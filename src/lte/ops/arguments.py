"""What the sparse FFN's functions take, and the checks on it.

Shapes: T tokens, D hidden size, F neurons, E experts of S = F / E neurons each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from lte.config import check_choice
from lte.ops.activations import ACTIVATIONS

MAX_TOKENS = 16
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
EXPERT_SIZES = (8, 16, 32, 64)


@dataclass(frozen=True, kw_only=True)
class FfnWeights:
    """The projections of an FFN, expert e owning the neurons [e S, (e + 1) S).

    Weights have the dtype of the hidden states, or are int8 with fp32 scales: one per neuron for
    gate and up, one per output for down.

    Attributes:
        up: [F, D].
        down: the down projection transposed, [F, D], so that an expert is S contiguous rows.
        gate: [F, D], `None` for a plain FFN act(x W_up) W_down.
        up_bias: [F].
        gate_bias: [F].
        down_bias: [D].
        up_scale: [F], for an int8 `up`.
        gate_scale: [F], for an int8 `gate`.
        down_scale: [D], for an int8 `down`: of the output, not of a neuron.
        stacked: the tensor whose first rows are gate, up and the router's weight, in this order, if they are views
            of one (`lte.ops.layout.stack_inputs`), so that one product of many tokens gives all of them.
    """

    up: Tensor
    down: Tensor
    gate: Tensor | None = None
    up_bias: Tensor | None = None
    gate_bias: Tensor | None = None
    down_bias: Tensor | None = None
    up_scale: Tensor | None = None
    gate_scale: Tensor | None = None
    down_scale: Tensor | None = None
    stacked: Tensor | None = None

    def flat(self) -> list[Tensor | None]:
        """The fields in order, as `lte::sparse_ffn_decode` takes them."""
        return [getattr(self, field.name) for field in fields(self)]

    @staticmethod
    def from_flat(tensors: list[Tensor | None]) -> FfnWeights:
        """The inverse of `flat`."""
        return FfnWeights(**dict(zip((field.name for field in fields(FfnWeights)), tensors, strict=True)))  # type: ignore[arg-type]


@dataclass(frozen=True, kw_only=True)
class Routing:
    """Which experts are active for which token: those whose logit is greater than the threshold.

    Logits are x W^T + b in fp32, the product rounded to the dtype of W, or given: those of a low-rank router, say.
    The rounding makes a 16-bit router decide alike wherever its product comes from.

    Attributes:
        weight: W, [E, D], in any floating dtype.
        bias: b, [E].
        logits: [T, E] fp32, in place of `weight` and `bias`.
        threshold: threshold of the logit.
        rounded: [E, D], where W counts as rounded to this dtype: memory that a path which needs it so writes it into,
            anew at each call, so that no edit of W is missed. Other paths round what they read; for them it may be
            empty.
        core: how many experts, the first ones, nearly all tokens are expected to need, as they are always on. Logits
            decide on these, too: times depend on it, results do not.
    """

    weight: Tensor | None = None
    bias: Tensor | None = None
    logits: Tensor | None = None
    threshold: float = 0.0
    rounded: Tensor | None = None
    core: int = 0

    @property
    def dtype(self) -> torch.dtype:
        """In which W and its products count."""
        weight = self.weight if self.rounded is None else self.rounded
        return torch.float32 if weight is None else weight.dtype

    def rounded_weight(self) -> Tensor | None:
        """W as it counts.

        Operations write into `rounded` without saying so to PyTorch: nobody reads what was there before.
        """
        return self.weight if self.rounded is None or self.weight is None else self.rounded.copy_(self.weight)

    def flat(self) -> list[Tensor | None]:
        """The tensors, as operations take them."""
        return [self.weight, self.bias, self.logits, self.rounded]

    @staticmethod
    def from_flat(tensors: Sequence[Tensor | None], threshold: float, core: int = 0) -> Routing:
        """The inverse of `flat`."""
        weight, bias, logits, rounded = tensors
        return Routing(weight=weight, bias=bias, logits=logits, threshold=threshold, rounded=rounded, core=core)

    @staticmethod
    def forced(mask: Tensor) -> Routing:
        """The routing by a boolean mask [T, E]."""
        infinity = torch.full(mask.shape, torch.inf, device=mask.device)
        return Routing(logits=torch.where(mask, infinity, -infinity))

    @property
    def num_experts(self) -> int:
        """E."""
        source = self.weight if self.logits is None else self.logits.T
        if source is None:
            raise ValueError("routing must hold weight or logits, got weight=None and logits=None")
        return source.shape[0]


def _check_tensor(name: str, tensor: Tensor | None, shape: tuple[int, ...], like: Tensor) -> None:
    if tensor is None:
        return
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} must have shape {list(shape)}, got {name}={list(tensor.shape)}")
    if tensor.device != like.device:
        raise ValueError(f"{name} must be on the device of x ({like.device}), got {name}={tensor.device}")
    if not tensor.is_contiguous():
        raise ValueError(f"{name} must be contiguous, got {name}={tensor.stride()}; call .contiguous() once")


def _check_weight(name: str, weight: Tensor, scale: Tensor | None, x: Tensor) -> None:
    dtype = x.dtype if scale is None else torch.int8
    if weight.dtype != dtype:
        kind = f"{dtype}, the dtype of x" if scale is None else f"{dtype}, as it has a scale"
        raise ValueError(f"{name} must be {kind}, got {name}={weight.dtype}")
    if scale is not None and scale.dtype != torch.float32:
        raise ValueError(f"{name}_scale must be torch.float32, got {name}_scale={scale.dtype}")


def check_arguments(
    x: Tensor, weights: FfnWeights, routing: Routing, activation: str, max_tokens: int | None = MAX_TOKENS
) -> None:
    """Raises a `ValueError` unless the arguments fit together; x is [T, D], T up to `max_tokens`."""
    check_choice("activation", activation, ACTIVATIONS)
    if x.dim() != 2 or x.shape[0] < 1 or (max_tokens is not None and x.shape[0] > max_tokens):
        number = "1 or more" if max_tokens is None else f"1 to {max_tokens}"
        raise ValueError(f"x must have shape [tokens, hidden] with {number} tokens, got x={list(x.shape)}")
    if x.dtype not in DTYPES:
        raise ValueError(f"x must be float32, float16 or bfloat16, got x={x.dtype}")
    neurons, (tokens, hidden), experts = weights.up.shape[0], x.shape, routing.num_experts
    if not 0 <= routing.core <= experts:
        raise ValueError(f"core must lie in [0, {experts}], the number of experts, got core={routing.core}")
    if experts * (neurons // max(experts, 1)) != neurons or neurons // max(experts, 1) not in EXPERT_SIZES:
        raise ValueError(
            f"neurons / experts must be one of {', '.join(map(str, EXPERT_SIZES))}, got {neurons} / {experts}"
        )
    for name in ("up", "down", "gate"):
        weight, scale = getattr(weights, name), getattr(weights, f"{name}_scale")
        bias_size = hidden if name == "down" else neurons
        _check_tensor(name, weight, (neurons, hidden), x)
        _check_tensor(f"{name}_bias", getattr(weights, f"{name}_bias"), (bias_size,), x)
        _check_tensor(f"{name}_scale", scale, (bias_size,), x)
        if weight is not None:
            _check_weight(name, weight, scale, x)
    _check_tensor("weight", routing.weight, (experts, hidden), x)
    if routing.rounded is not None and routing.rounded.numel():
        _check_tensor("rounded", routing.rounded, (experts, hidden), x)
    _check_tensor("bias", routing.bias, (experts,), x)
    _check_tensor("logits", routing.logits, (tokens, experts), x)
