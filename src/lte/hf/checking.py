"""The passes of speculative decoding by whole decoding steps: several tokens of one sequence in one call of an engine.

`generate` with an assistant or with prompt lookup reads, at each turn, the last token and some proposed ones, and then
takes those back that it does not keep. A pass of up to 8 tokens, also of one, goes to the engine, one of up to 32 in
several calls; longer ones, the prompt say, go module by module, and the cache is then what these left.

Shapes: L tokens in the cache, n tokens of a pass.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer
from transformers.modeling_outputs import CausalLMOutputWithPast

from lte.ops.step import engines
from lte.ops.step.plan import DecoderPlan, DecodeStep, Engine, LayerCache

# Of one call of the engine.
MOST_TOKENS = 8
# Of one pass. On a GPU, modules take as long for a pass of a 1.5B model as the engine for twenty calls. On a CPU they
# are faster than two calls in fp32, and slower than four in bf16.
MOST_CALLS = 4
# Room for further tokens that a cache gets at least: it then grows by doubling.
ROOM = 1024
# Of a call of the model, that a pass may have.
_INPUTS = {"input_ids", "attention_mask", "position_ids", "past_key_values", "use_cache", "logits_to_keep"}


def most_tokens(plan: DecoderPlan) -> tuple[int, str | None]:
    """How many tokens of one sequence an engine takes at once; if none, why."""
    reason = None
    for tokens in range(MOST_TOKENS, 0, -1):
        shape = tokens, plan.kv_heads, ROOM, plan.head_size
        empty = torch.empty(shape, dtype=plan.embedding.dtype, device="meta")
        reason = engines.unfit(plan, [LayerCache(keys=empty, values=empty)] * len(plan.layers))
        if reason is None:
            return tokens, None
    return 0, reason


@dataclass
class CheckedModel:
    """Stands for a model in the loop of transformers that checks drafts: the model itself but for its calls.

    Attributes:
        most: tokens that the engine takes in one call.
        layers: the memory that `take` made.
    """

    model: Any
    plan: DecoderPlan
    engine: Engine
    most: int
    layers: list[LayerCache] = field(default_factory=list)
    _steps: dict[tuple[int, bool], DecodeStep] = field(default_factory=dict)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    @property
    def calls(self) -> int:
        """Of the engine for one pass, at most."""
        embedding = self.plan.embedding
        return 1 if embedding.device.type == "cpu" and embedding.dtype == torch.float32 else MOST_CALLS

    def __call__(self, **inputs: Any) -> Any:
        """A pass: by the engine if it is a short one on a cache that is known, else as the model does it."""
        starts = self._starts(inputs)
        return self.model(**inputs) if starts is None else self._read(inputs, starts)

    def _starts(self, inputs: dict[str, Any]) -> Tensor | None:
        """Where the text begins in the cache [1]; `None` for what the engine does not do."""
        ids = inputs.get("input_ids")
        cache: Any = inputs.get("past_key_values")
        given = {name for name, value in inputs.items() if value is not None and value is not False}
        if ids is None or not given <= _INPUTS or len(ids) > 1 or not 1 <= ids.shape[1] <= self.calls * self.most:
            return None
        if not grows(cache, self.plan) or len(cache.layers) != len(self.plan.layers):
            return None
        if not all(getattr(layer, "is_initialized", False) for layer in cache.layers):
            return None
        length = int(cache.get_seq_length()) + ids.shape[1]
        kept = inputs.get("logits_to_keep")
        if length == ids.shape[1] or (
            kept is not None and (not isinstance(kept, int) or not 0 <= kept <= ids.shape[1])
        ):
            return None
        return starts_of(ids, inputs.get("attention_mask"), inputs.get("position_ids"), length)

    def _read(self, inputs: dict[str, Any], starts: Tensor) -> CausalLMOutputWithPast:
        ids, cache = inputs["input_ids"][0].long(), inputs["past_key_values"]
        tokens, length = len(ids), int(cache.get_seq_length())
        self.take(cache, length, tokens)
        logits = self.logits_of(ids, torch.arange(length, length + tokens, device=ids.device), starts)
        for layer, taken in zip(cache.layers, self.layers, strict=True):
            first, end = length - layer.keys.shape[2] + taken.shift, length + tokens + taken.shift
            layer.keys, layer.values = taken.keys[:, :, first:end], taken.values[:, :, first:end]
            if isinstance(layer, DynamicSlidingWindowLayer):
                layer.cumulative_length += tokens
        kept = inputs.get("logits_to_keep") or tokens
        if tokens <= self.most:
            logits = logits.clone()  # processors write into them
        return CausalLMOutputWithPast(logits=logits[None, -kept:], past_key_values=cache)

    def logits_of(self, ids: Tensor, positions: Tensor, starts: Tensor) -> Tensor:
        """The logits [n, V] of a pass of n tokens [n] at these positions [n] of the memory.

        Starts are [1], or [n] for 2 to `most` tokens, of which the last may be none. The next call may write the
        logits anew.
        """
        if len(ids) <= self.most:
            return self._step(ids, positions, starts.expand(len(ids)), len(starts) > 1)
        parts = (each.split(self.most) for each in (ids, positions, starts.expand(len(ids))))
        return torch.cat([self._step(*part).clone() for part in zip(*parts, strict=True)])

    def _step(self, ids: Tensor, positions: Tensor, starts: Tensor, fewer: bool = False) -> Tensor:
        """The logits [n, V] of one call of the engine; `fewer`: the last tokens may be none."""
        kind = len(ids), fewer
        if kind not in self._steps:
            self._steps[kind] = self.engine.bind(self.layers, len(ids), fewer=fewer)
        return self._steps[kind](ids.contiguous(), positions, starts.contiguous())

    def take(self, cache: Any, length: int, tokens: int, further: int | None = None) -> int:
        """Makes the cache's tokens lie in memory with room for more, where they do already unless modules wrote some.

        No layer is a ring: what was taken back would be missed.

        Args:
            cache: of transformers.
            length: L.
            tokens: that there must be room for.
            further: tokens that may follow at most, where that is known.

        Returns:
            How many tokens there is room for in all.
        """
        made = list[LayerCache]()
        for index, layer in enumerate(cache.layers):
            old, held = self.layers[index] if self.layers else None, layer.keys.shape[2]
            if old is not None and length - held + old.shift >= 0 and length + tokens + old.shift <= old.keys.shape[2]:
                first, end = length - held + old.shift, length + old.shift
                for tensor, there in ((layer.keys, old.keys), (layer.values, old.values)):
                    at = there.data_ptr() + first * there.stride(2) * there.element_size()
                    if at != tensor.data_ptr() or there.stride() != tensor.stride():
                        there[:, :, first:end].copy_(tensor)
                made.append(old)
                continue
            room = max(held, ROOM)
            size = held + max(tokens, room if further is None else min(room, further))
            keys, values = (with_room(tensor, held, size) for tensor in (layer.keys, layer.values))
            # Slots that other tokens had before them hold nothing that is seen.
            made.append(LayerCache(keys=keys, values=values, shift=held - length))
            # The copied ones are given free.
            layer.keys, layer.values = keys[:, :, :held], values[:, :, :held]
        if not self.layers or any(one is not other for one, other in zip(made, self.layers, strict=True)):
            self.layers, self._steps = made, {}
        return min(layer.keys.shape[2] - layer.shift for layer in made)


def grows(cache: Any, plan: DecoderPlan) -> bool:
    """Whether a cache is of transformers' own kinds that grow, with the windows of the plan.

    One that was made without a config makes its layers when the prompt is read, and has none before.
    """
    if type(cache) is not DynamicCache or cache.offloading or len(cache.layers) not in (0, len(plan.layers)):
        return False
    return all(
        type(layer) is DynamicLayer
        or (type(layer) is DynamicSlidingWindowLayer and layer.sliding_window == planned.window)
        for layer, planned in zip(cache.layers, plan.layers, strict=False)
    )


def with_room(tensor: Tensor, held: int, size: int) -> Tensor:
    """A copy of the first `held` tokens of [B, HKV, C, HD] with room for `size`."""
    made = tensor.new_empty(*tensor.shape[:2], size, tensor.shape[3])
    made[:, :, :held] = tensor[:, :, :held]
    return made


def starts_of(input_ids: Tensor, mask: Tensor | None, position_ids: Tensor | None, length: int) -> Tensor | None:
    """The first tokens [B] that are no padding; `None` if there is padding elsewhere, or positions of the caller's."""
    starts = input_ids.new_zeros(len(input_ids), dtype=torch.int64)
    fits = torch.ones((), dtype=torch.bool, device=input_ids.device)
    if mask is not None:
        if mask.shape != (len(input_ids), length):
            return None
        kept = mask.bool()
        starts = (~kept).sum(1)
        fits = (kept.sum(1) > 0).all() & (kept[:, 1:] >= kept[:, :-1]).all()
    if position_ids is not None:
        if position_ids.ndim != 2:
            return None
        fits = fits & (position_ids[:, -1] == length - 1 - starts).all()
    return starts if bool(fits) else None
