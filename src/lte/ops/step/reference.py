"""The whole decoding step in plain PyTorch: the ground truth of the engines.

It rounds where the models of transformers do, so that in 16 bits it is as near to them as another order of sums lets.

Shapes: see `lte.ops.step.plan`; G = HQ / HKV heads of queries share one of keys and values.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from lte.ops.activations import ACTIVATIONS
from lte.ops.arguments import Routing
from lte.ops.reference import active_experts
from lte.ops.step.plan import DecoderLayer, DecoderPlan, LayerCache, Matrix, Quantized, dense, rows_of


@dataclass(frozen=True)
class ReferenceEngine:
    """See `lte.ops.step.plan.Engine`; for any device, dtype and shape."""

    plan: DecoderPlan

    def bind(self, caches: Sequence[LayerCache], tokens: int = 1, *, fewer: bool = False) -> ReferenceStep:
        """A step on these caches."""
        rows_of(caches, tokens, tokens)
        return ReferenceStep(self.plan, caches)


@dataclass
class ReferenceStep:
    """See `lte.ops.step.plan.DecodeStep`."""

    plan: DecoderPlan
    caches: Sequence[LayerCache]
    _active: Tensor | None = field(default=None, init=False, repr=False)

    @torch.no_grad()
    def __call__(self, tokens: Tensor, positions: Tensor, starts: Tensor) -> Tensor:
        """As the protocol says; the logits have memory of their own."""
        plan = self.plan
        x = plan.embedding[tokens]
        if plan.embedding_scale != 1:
            x = x * x.new_tensor(plan.embedding_scale)
        for layer, cache in zip(plan.layers, self.caches, strict=True):
            attended = self._attend(self._norm(x, layer.norm1), layer, cache, positions, starts)
            x = x + (attended if layer.post1 is None else self._norm(attended, layer.post1))
            out = self._ffn(self._norm(x, layer.norm2), layer)
            x = x + (out if layer.post2 is None else self._norm(out, layer.post2))
        logits = functional.linear(self._norm(x, plan.final_norm), dense(plan.head, x.dtype), plan.head_bias)
        return _cap(logits, plan.logit_cap).float()

    def active(self) -> Tensor:
        """As the protocol says."""
        assert self._active is not None
        return self._active

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.plan.eps)
        return (wide * (1 + weight.float())).to(x.dtype) if self.plan.norm_plus_one else weight * wide.to(x.dtype)

    def _rotate(self, heads: Tensor, layer: DecoderLayer, positions: Tensor) -> Tensor:
        """Turns the heads [B, H, HD] of tokens at positions [B] without padding."""
        rope = self.plan.ropes[layer.rope]
        angles = (positions[:, None, None].float() * rope.frequencies).repeat(1, 1, 2)
        cosines, sines = ((wave * rope.factor).to(heads.dtype) for wave in (angles.cos(), angles.sin()))
        size = angles.shape[-1]
        turned, rest = heads[..., :size], heads[..., size:]
        first, second = turned.chunk(2, dim=-1)
        return torch.cat([turned * cosines + torch.cat([-second, first], dim=-1) * sines, rest], dim=-1)

    def _attend(self, x: Tensor, layer: DecoderLayer, cache: LayerCache, positions: Tensor, starts: Tensor) -> Tensor:
        plan, sequences = self.plan, len(cache.keys)
        # Several tokens of one sequence have its cache in common.
        batch = torch.arange(len(x), device=x.device) % sequences

        def heads(weight: Matrix, bias: Tensor | None, norm: Tensor | None) -> Tensor:
            found = functional.linear(x, dense(weight, x.dtype), bias).view(len(x), -1, plan.head_size)
            return found if norm is None else self._norm(found, norm)

        queries = self._rotate(heads(layer.q, layer.q_bias, layer.q_norm), layer, positions - starts)
        keys = self._rotate(heads(layer.k, layer.k_bias, layer.k_norm), layer, positions - starts)
        capacity = cache.keys.shape[2]
        slots = (positions + cache.shift) % capacity
        cache.keys[batch, :, slots] = keys
        cache.values[batch, :, slots] = heads(layer.v, layer.v_bias, None)
        # Which position a slot holds: the last one up to the token's own that belongs there.
        slot = torch.arange(capacity, device=x.device)
        held = positions[:, None] - (slots[:, None] - slot) % capacity
        seen = held >= starts[:, None]
        if layer.window:
            seen &= held > positions[:, None] - layer.window
        seen = seen[:, None, None]
        grouped = queries.unflatten(1, (plan.kv_heads, -1))
        scores = _cap(grouped @ cache.keys.transpose(2, 3) * plan.score_scale, plan.score_cap)
        shares = scores.masked_fill(~seen, -torch.inf).softmax(-1, dtype=torch.float32).to(x.dtype)
        # What nobody sees may be anything, NaN too.
        values = cache.values.masked_fill(~seen.transpose(2, 3), 0)
        return functional.linear((shares @ values).flatten(1), dense(layer.out, x.dtype), layer.out_bias)

    def _ffn(self, x: Tensor, layer: DecoderLayer) -> Tensor:
        activate = ACTIVATIONS[self.plan.activation]
        hidden = functional.linear(x, dense(layer.up, x.dtype), layer.up_bias)
        if layer.gate is None:
            hidden = activate(hidden)
        else:
            hidden = activate(functional.linear(x, dense(layer.gate, x.dtype), layer.gate_bias)) * hidden
        if layer.router is not None:
            routing = Routing(weight=layer.router.to(x.dtype), bias=layer.router_bias, threshold=layer.threshold)
            self._active = mask = active_experts(x, routing)
            hidden = (hidden.unflatten(-1, (mask.shape[-1], -1)) * mask.unsqueeze(-1)).flatten(-2)
        return functional.linear(hidden, dense(layer.down, x.dtype).T, layer.down_bias)


def upcast(value: Any) -> Any:
    """A plan, a cache or what they hold, in fp32 and with no quantised matrices: for the reference in fp32."""
    if isinstance(value, Tensor):
        return value.float()
    if isinstance(value, Quantized):
        return value.dense(torch.float32)
    if is_dataclass(value):
        return replace(value, **{key: upcast(each) for key, each in vars(value).items()})  # type: ignore[type-var]
    return [upcast(each) for each in value] if isinstance(value, list) else value


def _cap(x: Tensor, cap: float) -> Tensor:
    return torch.tanh(x / cap) * cap if cap else x
