"""`generate` of accelerated LTE models by whole decoding steps: one call of an engine for each token.

The prompt is read as ever, into the cache that the caller chose. Where an engine computes the model, the tokens after
it go through the engine, on the memory of a static cache itself; a dynamic cache moves into memory with room for more
tokens. Logits processors, stopping criteria, streamers and sampling are those of transformers. Whatever an engine
does not do, other caches, hooks, attentions as outputs and so on, goes to transformers as a whole.

Shapes: B sequences, L tokens in the cache after the prompt.
"""

from __future__ import annotations

import threading
import warnings
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers.cache_utils import (
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    StaticCache,
    StaticLayer,
    StaticSlidingWindowLayer,
)
from transformers.generation.utils import GenerateDecoderOnlyOutput

from lte.hf.checking import ROOM, CheckedModel, most_tokens, starts_of, with_room
from lte.hf.decoder import NoPlanError, NotNowError, decoder_plan, same_memory, take_frequencies_
from lte.hf.install import sparse_ffns
from lte.hf.lookup import lookup_of
from lte.hf.told import Told, runs_ahead
from lte.nn.accelerated import AcceleratedFfn
from lte.nn.quantized_ffn import QuantizedFfn
from lte.ops.step import engines
from lte.ops.step.plan import DecoderPlan, DecodeStep, Engine, LayerCache

# What transformers hands to a plain decoder.
_INPUTS = {"attention_mask", "position_ids", "past_key_values", "use_cache", "logits_to_keep"}
# What the loop of transformers calls for each token, and what reads the prompt.
_LOOP = ("_prefill", "prepare_inputs_for_generation", "_update_model_kwargs_for_generation")
# What else the loop that checks drafts gets.
_ASSISTED = {"inputs_tensor", "assistant_model", "assistant_tokenizer", "tokenizer"}
# So many tokens that a cache lacks are read one after the other, as an assistant has them between two drafts.
READ_BY_STEPS = 2


@dataclass
class _Kept:
    """The engine of a model, as long as its weights lie where the plan has them."""

    plan: DecoderPlan
    engine: Engine


@dataclass
class _Drafting:
    """An assistant, from the first to the last of its calls for one answer, and its engine once it has one."""

    assistant: Any
    kept: _Kept | None = None


# Not on the models: there copies, pickles and saved folders would meet them.
_KEPT: weakref.WeakKeyDictionary[Any, _Kept] = weakref.WeakKeyDictionary()
_TOLD: weakref.WeakSet[Any] = weakref.WeakSet()
_LOCK = threading.RLock()
_DRAFTING: ContextVar[_Drafting | None] = ContextVar("drafting", default=None)


def forget_engine(model: Any) -> None:
    """Drops what is kept for a model: it would hold the memory of weights that are about to lie elsewhere."""
    with _LOCK:
        _KEPT.pop(model, None)


def has_engine(model: Any) -> bool:
    """Whether the last call of `generate` that could take whole decoding steps took them."""
    return model in _KEPT


@contextmanager
def _drafting(assistant: Any) -> Iterator[None]:
    """Making a plan takes as long as ten tokens, so an assistant's is made once for an answer, at its first call."""
    token = _DRAFTING.set(_Drafting(assistant))
    try:
        yield
    finally:
        _DRAFTING.reset(token)


def engine_of(model: Any, plan: DecoderPlan) -> Engine:
    """The engine of a plan that is not `engines.unfit`: the model's last one if its weights lie where they did."""
    with _LOCK:
        kept = _KEPT.get(model)
        if kept is not None and same_memory(kept.plan, plan):
            take_frequencies_(kept.plan, plan)
            return kept.engine
        forget_engine(model)
        # What is made in inference mode could not be used outside of it.
        with torch.inference_mode(False), torch.no_grad():
            kept = _KEPT[model] = _Kept(plan, engines.make_engine(plan))
        return kept.engine


class SteppingMixin:
    """What a model class gains: `generate` by whole decoding steps where an engine computes them."""

    def _sample(
        self,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        synced_gpus: bool = False,
        streamer: Any = None,
        **model_kwargs: Any,
    ) -> Any:
        """As the stock method, which greedy decoding and sampling call."""
        call = (input_ids, logits_processor, stopping_criteria, generation_config)
        if not synced_gpus and _is_plain(self, generation_config, model_kwargs):
            generation = _begin(self, input_ids, stopping_criteria, generation_config, model_kwargs)
            if generation is not None:
                return generation.run(*call, streamer, model_kwargs)
        return super()._sample(*call, synced_gpus=synced_gpus, streamer=streamer, **model_kwargs)  # type: ignore[misc]

    def _assisted_decoding(
        self,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        synced_gpus: bool = False,
        streamer: Any = None,
        **given: Any,
    ) -> Any:
        """As the stock method, which prompt lookup and assistants call: lookup and short passes go by whole steps."""
        stock = super()._assisted_decoding  # type: ignore[misc]
        call = (input_ids, logits_processor, stopping_criteria, generation_config, synced_gpus, streamer)
        model_kwargs = {name: value for name, value in given.items() if name not in _ASSISTED}
        assistant, checked = given.get("assistant_model"), None
        if not synced_gpus and _is_plain(self, generation_config, model_kwargs):
            checked = checked_model(self, input_ids.device)
        if checked is not None and assistant is None:
            lookup = lookup_of(checked, *call[:4], model_kwargs)
            if lookup is not None:
                return lookup.run(input_ids, generation_config, model_kwargs, streamer)
        with _drafting(assistant):
            return stock(*call, **given) if checked is None else stock.__func__(checked, *call, **given)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        forget_engine(self)
        return super()._apply(fn, recurse)  # type: ignore[misc]


def _is_plain(model: Any, generation_config: Any, model_kwargs: dict[str, Any]) -> bool:
    """Whether a call asks for nothing but tokens, scores and logits of a model that can give them by steps."""
    given = {name for name, value in model_kwargs.items() if value is not None}
    asked = ("output_attentions", "output_hidden_states", "compile_config")
    return (
        given <= _INPUTS
        and bool(model_kwargs.get("use_cache"))
        and not any(getattr(generation_config, name, None) for name in asked)
        and _generates_as_stock(model)
        and not torch.is_grad_enabled()
        and any(isinstance(ffn, AcceleratedFfn | QuantizedFfn) for ffn in sparse_ffns(model).values())
    )


def _generates_as_stock(model: Any) -> bool:
    """Whether a class of the user's own, or the user, leaves alone what the loop calls or takes the place of."""
    # What a class of the user's does in the place of `_sample` is behind ours.
    loops = ("_sample", "_assisted_decoding")
    found = [(type(model), name) for name in _LOOP] + [(model.stock_class, name) for name in loops]
    return all(
        hasattr(kind, name) and getattr(kind, name).__module__.startswith("transformers.") and name not in vars(model)
        for kind, name in found
    )


def _begin(
    model: Any, input_ids: Tensor, stopping_criteria: Any, generation_config: Any, model_kwargs: dict[str, Any]
) -> _Generation | None:
    """What runs the call, `None` if that is left to transformers."""
    cache: Any = model_kwargs.get("past_key_values")
    mask = model_kwargs.get("attention_mask")
    steps = (stopping_criteria.max_length or 0) - input_ids.shape[1] - 1
    if steps < 1:
        return None
    drafting = _DRAFTING.get()
    settled = drafting.kept if drafting is not None and drafting.assistant is model else None
    plan = _plan_of(model, input_ids.device) if settled is None else settled.plan
    if plan is None or not _is_known(cache, plan):
        return None
    past, written = int(cache.get_seq_length()), input_ids.shape[1]
    masked = getattr(generation_config, "_mask_length", -1) if mask is None else mask.shape[1]
    # As transformers takes it: the tokens of the cache may be among those that are given, or not.
    length = written if past and masked == written else past + written
    if length <= past:
        return None
    starts = starts_of(input_ids, mask, model_kwargs.get("position_ids"), length)
    if starts is None:
        return None
    # `DynamicCache()` makes its layers when the prompt is read.
    layers = cache.layers or [DynamicLayer()] * len(plan.layers)
    rooms = [_room(layer, plan, index, length + steps) for index, layer in enumerate(layers)]
    if any(room is None for room in rooms):
        return None
    shapes = [(len(input_ids), plan.kv_heads, room, plan.head_size) for room in rooms]
    empty = [torch.empty(shape, dtype=plan.embedding.dtype, device="meta") for shape in shapes]  # type: ignore[arg-type]
    reason = engines.unfit(plan, [LayerCache(keys=tensor, values=tensor) for tensor in empty])
    if reason is not None:
        _tell(model, reason)
        return None
    engine = engine_of(model, plan) if settled is None else settled.engine
    if drafting is not None and drafting.assistant is model:
        drafting.kept = _Kept(plan, engine)
    return _Generation(model, plan, engine, cache, past, length, length + steps, starts)


def checked_model(model: Any, device: torch.device) -> CheckedModel | None:
    """What stands for the model while drafts are checked, `None` if all is left to transformers."""
    plan = _plan_of(model, device)
    if plan is None:
        return None
    most, reason = most_tokens(plan)
    if reason is not None:
        _tell(model, reason)
        return None
    return CheckedModel(model, plan, engine_of(model, plan), most)


def _plan_of(model: Any, device: torch.device) -> DecoderPlan | None:
    """What an engine is to compute for tokens on a device, `None` if that is left to transformers."""
    try:
        plan = decoder_plan(model)
    except NotNowError:
        return None
    except NoPlanError as error:
        _tell(model, str(error))
        return None
    return plan if plan.embedding.device == device else None


def _tell(model: Any, reason: str) -> None:
    if model not in _TOLD:
        _TOLD.add(model)
        warnings.warn(
            "generate runs the model module by module and not by whole decoding steps, which are faster, as " + reason,
            RuntimeWarning,
            stacklevel=2,
        )


def _is_known(cache: Any, plan: DecoderPlan) -> bool:
    """Whether a cache is of transformers' own kinds and lies on the device."""
    kinds = (DynamicLayer, DynamicSlidingWindowLayer, StaticLayer, StaticSlidingWindowLayer)
    return (
        type(cache) in (DynamicCache, StaticCache)
        and not cache.offloading
        and len(cache.layers) in (0, len(plan.layers))
        and all(type(layer) in kinds and not getattr(layer, "record_past", False) for layer in cache.layers)
    )


def _is_static(layer: Any) -> bool:
    return isinstance(layer, StaticLayer)


def _room(layer: Any, plan: DecoderPlan, index: int, longest: int) -> int | None:
    """How many tokens a layer of a cache has or gets room for; `None` if that is too few."""
    window = plan.layers[index].window
    sliding = isinstance(layer, DynamicSlidingWindowLayer | StaticSlidingWindowLayer)
    needed = min(window, longest) if sliding else longest
    if _is_static(layer):
        return layer.max_cache_len if layer.max_cache_len >= needed else None
    return None if sliding and layer.sliding_window != window else needed


@dataclass
class _Generation:
    """One call of `generate`.

    Attributes:
        past: tokens that the cache holds before the call.
        length: L.
        longest: tokens that the cache will hold at most.
    """

    model: Any
    plan: DecoderPlan
    engine: Engine
    cache: Any
    past: int
    length: int
    longest: int
    starts: Tensor

    def run(
        self,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        streamer: Any,
        model_kwargs: dict[str, Any],
    ) -> Any:
        """As `_sample` of transformers."""
        logits, caches = self._read(input_ids, generation_config, model_kwargs)
        returned, scores, raw_logits = generation_config.return_dict_in_generate, list[Tensor](), list[Tensor]()
        ends = any(hasattr(criteria, "eos_token_id") for criteria in stopping_criteria)
        pad: Any = generation_config._pad_token_tensor
        pad = None if pad is None else pad.to(input_ids.device)
        unfinished = input_ids.new_ones(len(input_ids))
        told, ahead = Told(len(input_ids) + 1, input_ids), runs_ahead(input_ids.device)
        try:
            while True:
                # Processors write into them, and the next step, too.
                raw = logits.to(dtype=torch.float32, copy=True)
                found = logits_processor(input_ids, raw)
                if returned and generation_config.output_scores:
                    scores.append(found)
                if returned and generation_config.output_logits:
                    raw_logits.append(raw)
                if generation_config.do_sample:
                    tokens = torch.multinomial(functional.softmax(found, dim=-1), num_samples=1).squeeze(1)
                else:
                    tokens = found.argmax(-1)
                if ends:
                    tokens = tokens * unfinished + pad * (1 - unfinished)
                input_ids = torch.cat([input_ids, tokens[:, None]], dim=-1)
                unfinished = unfinished & ~stopping_criteria(
                    input_ids, tuple(scores) if returned and generation_config.output_scores else None
                )
                told.tell(torch.cat([tokens, unfinished.any()[None]]))
                launched = ahead and input_ids.shape[1] < stopping_criteria.max_length
                if launched:
                    logits = caches.step(tokens)
                on_host, goes_on = told.wait().tensor_split([len(input_ids)])
                if streamer is not None:
                    streamer.put(on_host)
                if not goes_on:
                    break
                if not launched:
                    logits = caches.step(tokens)
                caches.count()
        finally:
            caches.give_back()
        if streamer is not None:
            streamer.end()
        if not returned:
            return input_ids
        return GenerateDecoderOnlyOutput(
            sequences=input_ids,  # type: ignore[arg-type]
            scores=tuple(scores) if generation_config.output_scores else None,  # type: ignore[arg-type]
            logits=tuple(raw_logits) if generation_config.output_logits else None,  # type: ignore[arg-type]
            past_key_values=self.cache,
        )

    def _read(self, input_ids: Tensor, generation_config: Any, model_kwargs: dict[str, Any]) -> tuple[Tensor, _Caches]:
        """The logits after the prompt, and the caches that hold it: by modules, or a token or two by steps."""
        missing = self.length - self.past
        if self.past and missing <= READ_BY_STEPS:
            caches = _Caches(self, self.past)
            for tokens in input_ids[:, -missing:].unbind(1):
                logits = caches.step(tokens.contiguous())
                caches.count()
            return logits, caches
        # An assistant has read the tokens before its last ones in an earlier call.
        first = not generation_config.is_assistant
        found = self.model._prefill(input_ids, generation_config, model_kwargs, is_first_iteration=first)
        return found.logits[:, -1], _Caches(self, self.length)


class _Caches:
    """The layers of a generation's cache as the engine takes them, and what they hold.

    Attributes:
        length: tokens that they hold.
    """

    def __init__(self, generation: _Generation, length: int):
        self.generation, self.length = generation, length
        self.layers: list[LayerCache] = []
        grows = any(type(layer) is DynamicLayer for layer in generation.cache.layers)
        self.room = min(generation.longest, self.length + max(self.length, ROOM)) if grows else generation.longest
        self.run: DecodeStep | None = None
        self.positions = torch.full_like(generation.starts, self.length)

    def step(self, tokens: Tensor) -> Tensor:
        """The logits [B, V] after one more token [B] of each sequence, which is in the cache once it is counted."""
        if not self.layers:
            self._take()
        if self.length >= self.room:
            self._grow()
        if self.run is None:
            self.run = self.generation.engine.bind(self.layers)
        return self.run(tokens, self.positions, self.generation.starts)

    def count(self) -> None:
        """Says that the token of the last step stays."""
        self.positions += 1
        self.length += 1

    def _take(self) -> None:
        """Makes the caches of the model's, whose dynamic layers are copied."""
        generation = self.generation
        layers: list[Any] = generation.cache.layers
        for layer, planned in zip(layers, generation.plan.layers, strict=True):
            if _is_static(layer):
                # A sliding layer that is full holds its last tokens in order.
                full = self.length > layer.max_cache_len
                shift = -self.length % layer.max_cache_len if full else 0
                self.layers.append(LayerCache(keys=layer.keys, values=layer.values, shift=shift))
                continue
            held = layer.keys.shape[2]
            ring = isinstance(layer, DynamicSlidingWindowLayer)
            size = min(planned.window, generation.longest) if ring else self.room
            taken = LayerCache(
                keys=with_room(layer.keys, held, size),
                values=with_room(layer.values, held, size),
                shift=-(self.length - held) % size,
            )
            self.layers.append(taken)
            # The copied ones are given free.
            layer.keys, layer.values = taken.keys[:, :, :held], taken.values[:, :, :held]

    def _grow(self) -> None:
        """Doubles the copies of dynamic layers without a window."""
        generation = self.generation
        self.room = min(generation.longest, 2 * self.room)
        layers: list[Any] = generation.cache.layers
        for index, layer in enumerate(layers):
            if type(layer) is DynamicLayer:
                taken = self.layers[index]
                keys, values = (with_room(tensor, self.length, self.room) for tensor in (taken.keys, taken.values))
                self.layers[index] = replace(taken, keys=keys, values=values)
                layer.keys, layer.values = keys[:, :, : self.length], values[:, :, : self.length]
        self.run = None

    def give_back(self) -> None:
        """Leaves the cache as transformers would: the caller may hold it, or get it."""
        layers: list[Any] = self.generation.cache.layers
        for layer, taken, planned in zip(layers, self.layers, self.generation.plan.layers, strict=False):
            size = taken.keys.shape[2]
            if _is_static(layer):
                first = (self.length + taken.shift) % size
                if self.length > size and first:
                    for tensor in (layer.keys, layer.values):
                        tensor.copy_(tensor.roll(-first, dims=2))
                layer.cumulative_length.fill_(min(self.length, size))
                if isinstance(layer, StaticSlidingWindowLayer):
                    layer.cumulative_length_int = self.length
            elif isinstance(layer, DynamicSlidingWindowLayer):
                held = min(self.length, planned.window - 1)
                last = torch.arange(self.length - held, self.length, device=taken.keys.device)
                slots = (last + taken.shift) % size
                layer.keys, layer.values = taken.keys[:, :, slots], taken.values[:, :, slots]
                layer.cumulative_length = self.length
            else:
                layer.keys, layer.values = (tensor[:, :, : self.length] for tensor in (taken.keys, taken.values))
