"""Random decoders for the tests of the engines of whole decoding steps, and the comparison with the reference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lte.ops.step.plan import DecoderLayer, DecoderPlan, LayerCache, Matrix, Quantized, Rope


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A decoder's shape and features; the defaults are a small Llama."""

    layers: int = 2
    hidden: int = 64
    heads: int = 4
    kv_heads: int = 2
    head_size: int = 16
    neurons: int = 128
    experts: int = 8
    vocabulary: int = 50
    rotary: float = 1.0
    activation: str = "silu"
    gated: bool = True
    biases: bool = False
    head_norms: bool = False
    post_norms: bool = False
    norm_plus_one: bool = False
    windows: tuple[int, ...] = (0,)
    caps: bool = False
    router_dtype: torch.dtype | None = None


# What the families need, between them.
FAMILIES = {
    "llama": Shape(),
    "qwen2": Shape(biases=True, hidden=96, heads=6),
    "qwen3": Shape(head_norms=True, head_size=32, router_dtype=torch.float32),
    "mistral": Shape(windows=(12,)),
    "gemma2": Shape(activation="gelu_tanh", post_norms=True, norm_plus_one=True, windows=(12, 0), caps=True),
    "gemma3": Shape(activation="gelu_tanh", head_norms=True, post_norms=True, norm_plus_one=True, windows=(12, 12, 0)),
    "phi": Shape(rotary=0.5, gated=False, biases=True, activation="gelu"),
    "dense": Shape(experts=0, heads=2, activation="relu"),
}


def random_plan(shape: Shape, dtype: torch.dtype, device: str = "cpu") -> DecoderPlan:
    """Weights scaled by fan_in**-0.5; routers that switch about half of the experts on."""
    s = shape

    def matrix(rows: int, columns: int, fan_in: int | None = None) -> Tensor:
        return (torch.randn(rows, columns) * (fan_in or columns) ** -0.5).to(device, dtype)

    def vector(size: int, use: bool = True, center: float = 0.0) -> Tensor | None:
        return (center + torch.randn(size) / 5).to(device, dtype) if use else None

    def norm(size: int, use: bool = True) -> Any:
        return vector(size, use, 0.0 if s.norm_plus_one else 1.0)

    def layer(i: int) -> DecoderLayer:
        window = s.windows[i % len(s.windows)]
        router = matrix(s.experts, s.hidden).to(s.router_dtype or dtype) if s.experts else None
        return DecoderLayer(
            norm1=norm(s.hidden),
            q=matrix(s.heads * s.head_size, s.hidden),
            k=matrix(s.kv_heads * s.head_size, s.hidden),
            v=matrix(s.kv_heads * s.head_size, s.hidden),
            out=matrix(s.hidden, s.heads * s.head_size),
            norm2=norm(s.hidden),
            up=matrix(s.neurons, s.hidden),
            down=matrix(s.neurons, s.hidden, s.neurons),
            gate=matrix(s.neurons, s.hidden) if s.gated else None,
            router=router,
            router_bias=vector(s.experts, s.experts > 0),
            threshold=0.03,
            q_bias=vector(s.heads * s.head_size, s.biases),
            k_bias=vector(s.kv_heads * s.head_size, s.biases),
            v_bias=vector(s.kv_heads * s.head_size, s.biases),
            out_bias=vector(s.hidden, s.biases),
            up_bias=vector(s.neurons, s.biases),
            gate_bias=vector(s.neurons, s.biases and s.gated),
            down_bias=vector(s.hidden, s.biases),
            q_norm=norm(s.head_size, s.head_norms),
            k_norm=norm(s.head_size, s.head_norms),
            post1=norm(s.hidden, s.post_norms),
            post2=norm(s.hidden, s.post_norms),
            window=window,
            rope=int(window > 0),
        )

    embedding, half = matrix(s.vocabulary, s.hidden, 1), int(s.head_size * s.rotary) // 2
    powers = torch.arange(half) / half
    return DecoderPlan(
        layers=[layer(i) for i in range(s.layers)],
        embedding=embedding,
        final_norm=norm(s.hidden),
        head=matrix(s.vocabulary, s.hidden) if s.biases else embedding * s.hidden**-0.5,
        head_bias=vector(s.vocabulary, s.biases),
        ropes=[Rope(frequencies=(base**-powers).to(device), factor=f) for base, f in ((1e4, 1.0), (1e3, 1.1))],
        heads=s.heads,
        kv_heads=s.kv_heads,
        head_size=s.head_size,
        activation=s.activation,
        eps=1e-5,
        norm_plus_one=s.norm_plus_one,
        embedding_scale=s.hidden**0.5 if s.norm_plus_one else 1.0,
        score_scale=s.head_size**-0.5,
        score_cap=2.0 if s.caps else 0.0,
        logit_cap=1.0 if s.caps else 0.0,
    )


def quantized(matrix: Matrix, bits: int, group: int = 32, transposed: bool = False) -> Matrix:
    """A matrix rounded to 8 bits with a scale for each output, to 4 bits with zeros, or as it is for 0 bits."""
    assert isinstance(matrix, Tensor)
    if bits == 0:
        return matrix
    weight = matrix.float().T if transposed else matrix.float()
    groups = weight.unflatten(1, (-1, weight.shape[1] if bits == 8 else group))
    low, high = groups.aminmax(dim=-1)
    # Both ends are values, the lowest of all among them.
    scales, middle = (high - low) / (2**bits - 1), 2 ** (bits - 1)
    zeros = low + middle * scales
    if bits == 8:
        scales, zeros = torch.maximum(high / (middle - 1), -low / middle), torch.zeros_like(low)
    else:
        scales, zeros = scales.to(matrix.dtype), zeros.to(matrix.dtype)
    values = ((groups - zeros.float()[..., None]) / scales.float()[..., None]).round().clamp(-middle, middle - 1)
    parts = [values.flatten(1).to(torch.int8), scales, zeros]
    values, scales, zeros = (part.T.contiguous() if transposed else part for part in parts)
    return Quantized(values=values, scales=scales, zeros=None if bits == 8 else zeros, bits=bits)


def with_quantized(plan: DecoderPlan, attention: int, ffn: int, head: int, group: int = 32) -> DecoderPlan:
    """The plan with matrices of so many bits, 0 for as they are."""

    def rounded(layer: DecoderLayer) -> DecoderLayer:
        matrices = {name: quantized(getattr(layer, name), attention, group) for name in ("q", "k", "v", "out")}
        matrices |= {
            name: quantized(getattr(layer, name), ffn, group)
            for name in ("gate", "up")
            if getattr(layer, name) is not None
        }
        return replace(layer, **matrices, down=quantized(layer.down, ffn, group, transposed=True))

    return replace(plan, layers=[rounded(layer) for layer in plan.layers], head=quantized(plan.head, head, group))


def new_caches(plan: DecoderPlan, batch: int, length: int, shift: int = 0) -> list[LayerCache]:
    """Caches full of NaN for texts of `length` tokens; layers with a window keep only so many."""

    def cache(layer: DecoderLayer) -> LayerCache:
        slots = min(layer.window or length, length)
        keys = plan.embedding.new_full((batch, plan.kv_heads, slots, plan.head_size), torch.nan)
        return LayerCache(keys=keys, values=keys.clone(), shift=shift % slots)

    return [cache(layer) for layer in plan.layers]


def copied(caches: Sequence[LayerCache]) -> list[LayerCache]:
    """Caches of the same content."""
    return [replace(cache, keys=cache.keys.clone(), values=cache.values.clone()) for cache in caches]


def step_inputs(plan: DecoderPlan, batch: int, index: int, starts: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, positions and starts of the step `index` of sequences that begin at `starts`."""
    device = plan.embedding.device
    tokens = torch.randint(0, len(plan.embedding), (batch,)).to(device)
    first = torch.tensor(starts, device=device)
    return tokens, first + index, first


def several_caches(plan: DecoderPlan, tokens: int, length: int, shift: int = 0) -> list[LayerCache]:
    """As `new_caches` for one sequence, with rings for passes of so many tokens."""
    layers = [replace(layer, window=layer.window and layer.window + tokens - 1) for layer in plan.layers]
    return new_caches(replace(plan, layers=layers), 1, length, shift)


def several_inputs(plan: DecoderPlan, tokens: int, index: int, start: int) -> tuple[Tensor, Tensor, Tensor]:
    """The tokens from the step `index` on of a sequence that begins at `start`, their positions and starts."""
    device = plan.embedding.device
    found = torch.randint(0, len(plan.embedding), (tokens,)).to(device)
    starts = torch.full((tokens,), start, device=device)
    return found, starts + index + torch.arange(tokens, device=device), starts
