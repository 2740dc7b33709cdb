"""Weights that torchao quantised, as whole decoding steps read them.

torchao keeps a linear layer and makes its weight a tensor of a class of its own. What is read here: 8 bits with a scale
for each output, and 4 bits in groups along the input, all weight-only. torchao itself is not imported: who has such a
tensor has loaded it.

Shapes: N outputs, K inputs, g numbers of a group.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.weak import WeakTensorKeyDictionary

from lte.ops.step.plan import Quantized

# What was made of a weight, and of which memory: plans that are made anew must find the same.
_MADE: Any = WeakTensorKeyDictionary()


def is_torchao(weight: Any) -> bool:
    """Whether torchao made a weight what it is."""
    return any(base.__module__.partition(".")[0] == "torchao" for base in type(weight).__mro__)


def stored_bytes(weight: Any) -> float:
    """Bytes of a weight of a linear layer [N, K] as a kernel reads it.

    With 16 bits for a plain one of whatever dtype; of torchao, 8 bits and a scale in fp32 for each group, or 4 bits and
    a scale and a zero in 16 bits, packed or not.
    """
    if not is_torchao(weight):
        return 2.0 * weight.numel()
    group = weight.block_size[-1] if hasattr(weight, "block_size") else weight.shape[-1]
    has_4_bits = type(weight).__name__.startswith("Int4") or str(getattr(weight, "target_dtype", "")) == "torch.int4"
    if getattr(weight, "quant_max", None) is not None:
        has_4_bits = weight.quant_max - weight.quant_min == 15
    return weight.numel() * ((0.5 if has_4_bits else 1.0) + 4 / group)


@torch.inference_mode(False)
@torch.no_grad()
def quantized_matrix(weight: Any, dtype: torch.dtype, *, transposed: bool = False) -> Quantized:
    """A quantised weight [N, K]; what is made of it is kept as long as the weight is, and lies where it lay.

    Args:
        weight: of torchao.
        dtype: of the model's other weights, in which scales of 4 bits are kept.
        transposed: whether to give [K, N], as the down projection of a plan is.

    Raises:
        ValueError: for another kind of quantisation, in words that go on from "holds".
    """
    whole = _memory(weight)
    key = (tuple(each.data_ptr() for each in whole), whole[0].device, dtype, transposed)
    made = _MADE.setdefault(weight, {})
    if key not in made:
        # Of tensors that were moved since, nothing is needed any more.
        for old in [old for old in made if old[:2] != key[:2]]:
            del made[old]
        made[key] = _read(weight, dtype, transposed)
    return made[key]


def _memory(weight: Any) -> list[Tensor]:
    """The plain tensors that a quantised one consists of."""
    found: list[Tensor] = []
    for name in weight.__tensor_flatten__()[0]:
        part = getattr(weight, name)
        found += [part] if type(part) is Tensor else _memory(part)
    return found


def _read(weight: Any, dtype: torch.dtype, transposed: bool) -> Quantized:
    readers: dict[str, Callable[[Any], Quantized]] = {
        "Int8Tensor": _int8,
        "IntxUnpackedToInt8Tensor": _intx,
        "Int4Tensor": _int4,
        "Int4TilePackedTo4dTensor": _int4_tiles,
        "AffineQuantizedTensor": _affine,
    }
    name = type(weight).__name__
    if name not in readers:
        raise ValueError(f"a {name} of torchao, which whole steps do not read")
    if getattr(weight, "act_pre_scale", None) is not None:
        raise ValueError(f"a {name} with scales of its input")
    found = readers[name](weight)
    if found.bits == 4:
        zeros = None if found.zeros is None else found.zeros.to(dtype).contiguous()
        found = replace(found, scales=found.scales.to(dtype).contiguous(), zeros=zeros)
    if not transposed:
        return replace(found, values=found.values.contiguous())
    zeros = None if found.zeros is None else found.zeros.T.contiguous()
    return replace(found, values=found.values.T.contiguous(), scales=found.scales.T.contiguous(), zeros=zeros)


def _int8(weight: Any) -> Quantized:
    if weight.act_quant_kwargs is not None:
        raise ValueError("an Int8Tensor that quantises its input, too")
    return _grouped(weight.qdata, weight.scale, weight.zero_point, bits=8)


def _intx(weight: Any) -> Quantized:
    if weight.activation_quantization is not None:
        raise ValueError("an IntxUnpackedToInt8Tensor that quantises its input, too")
    bits = {"torch.int4": 4, "torch.int8": 8}.get(str(weight.target_dtype))
    if bits is None:
        raise ValueError(f"weights of {weight.target_dtype}, of neither 4 nor 8 bits")
    return _grouped(weight.qdata, weight.scale, weight.zero_point, bits)


def _grouped(values: Tensor, scales: Tensor, zero_points: Tensor | None, bits: int) -> Quantized:
    """W = (values - zero point) scale, all [N, K] or [N, K / g]."""
    scales = scales.float()
    zeros = None
    if zero_points is not None and bool(zero_points.count_nonzero()):
        zeros = -zero_points.float() * scales
    if bits == 8 and (zeros is not None or scales.shape[1] != 1):
        raise ValueError("8-bit weights without one scale for each output, or with zero points")
    return Quantized(values=values, scales=scales, zeros=zeros, bits=bits)


def _int4(weight: Any) -> Quantized:
    # Two neighbours in a byte, the first in its low half: both with a sign. W = values scale + zero point.
    halves = torch.stack([weight.qdata << 4 >> 4, weight.qdata >> 4], dim=-1)
    return Quantized(values=halves.flatten(1), scales=weight.scale.T, zeros=weight.zero_point.T, bits=4)


def _int4_tiles(weight: Any) -> Quantized:
    # Only the kernel of these tiles knows how they lie: it multiplies them by one.
    outputs, inputs = weight.shape
    one = torch.eye(inputs, dtype=weight.dtype, device=weight.device)
    pairs = weight.scale_and_zero[: inputs // weight.block_size[-1], :outputs].float()
    scales, zeros = pairs[..., 0].T, pairs[..., 1].T
    return _rounded(functional.linear(one, weight).T, scales, zeros)


def _rounded(numbers: Tensor, scales: Tensor, zeros: Tensor) -> Quantized:
    """The 4 bits [N, K] of numbers that are rounded to them already: W = values scale + zero, from -8 to 7."""
    groups = numbers.float().unflatten(1, (scales.shape[1], -1))
    divisor = scales.clamp_min(torch.finfo(torch.float32).tiny)
    values = ((groups - zeros[..., None]) / divisor[..., None]).round_().clamp_(-8, 7)
    return Quantized(values=values.flatten(1).to(torch.int8), scales=scales, zeros=zeros, bits=4)


def _affine(weight: Any) -> Quantized:
    """What torchao made before 0.16: one class, whose memory is another object."""
    outputs, inputs = weight.shape
    values, scales, zero_points = weight.tensor_impl.get_plain()
    scales = scales.float().reshape(outputs, -1)
    zero_points = None if zero_points is None else zero_points.reshape(outputs, -1)
    low = weight.quant_min if weight.quant_min is not None else -128
    high = weight.quant_max if weight.quant_max is not None else 127
    bits = {16: 4, 255: 8, 256: 8}.get(high - low + 1)
    if bits is None:
        raise ValueError(f"weights from {low} to {high}, of neither 4 nor 8 bits")
    values = values[:outputs, :inputs]
    middle = (high + low + 1) // 2
    centred = (values.to(torch.int32) - middle).to(torch.int8)
    if str(getattr(weight, "zero_point_domain", "")).endswith("FLOAT"):
        assert zero_points is not None
        return Quantized(values=centred, scales=scales, zeros=zero_points.float(), bits=bits)
    shifted = None if zero_points is None else zero_points.float() - middle
    return _grouped(centred, scales, shifted, bits)
