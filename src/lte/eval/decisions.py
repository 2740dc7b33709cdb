"""Which experts a model switches on for given tokens, in every way in which it may read them.

All ways read the same tokens and none of their own, so that decisions can be compared one by one: all tokens in one
pass, alone or in a batch, or a prompt and then one token after the other, by modules or by whole decoding steps. Each
layer reads the hidden states that come out of the layers before it, or is given those of another run: then only what
the layer itself computes, attention, norms and router, can make a decision differ.

Shapes: N rows of T tokens, B rows of a batch, L layers, D hidden size, E experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache

from lte.eval.answers import row_inputs
from lte.eval.inference import hard_inference
from lte.eval.token_routing import routed_part
from lte.hf.decoder import NoPlanError, decoder_plan
from lte.hf.inputs import check_next_token
from lte.hf.install import require_sparse_ffns
from lte.hf.stepping import with_room
from lte.nn.sparse_ffn import SparseFfn
from lte.ops.step import engines
from lte.ops.step.plan import DecoderPlan, LayerCache

# Rows of a head that nobody looks at.
_HEAD_ROWS = 64


@dataclass(frozen=True)
class Decisions:
    """What one run decided for the same tokens as others.

    Attributes:
        active: whether an expert is on, bool [N, L, T, E].
        inputs: what each transformer block read, [N, L, T, D] in the model's dtype; `None` where it was not kept.
        scores: router scores, fp32 [N, L, T, E]; `None` where they were not kept.
    """

    active: Tensor
    inputs: Tensor | None = None
    scores: Tensor | None = None


def flips_by_layer(one: Decisions, other: Decisions, first: int = 0) -> list[float]:
    """Share of the decisions that differ, by layer, for the tokens from `first` on."""
    return (one.active[:, :, first:] != other.active[:, :, first:]).double().mean((0, 2, 3)).tolist()


def near_threshold(run: Decisions, threshold: float, distances: Sequence[float]) -> dict[float, list[float]]:
    """Share of the scores nearer to tau than each distance, by layer."""
    assert run.scores is not None
    away = (run.scores.double() - threshold).abs()
    return {distance: (away < distance).double().mean((0, 2, 3)).tolist() for distance in distances}


@dataclass
class _Watch:
    """What the layers of a model read and decide in the call at work.

    Attributes:
        padding: tokens on the left that do not count.
        given: what blocks read in place of their own input, [B, L, T, D]; `None` for their own.
    """

    ffns: list[SparseFfn]
    padding: int = 0
    given: Tensor | None = None
    inputs: dict[int, Tensor] = field(default_factory=dict)

    def before_block(self, layer: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Keeps or replaces what a block reads."""
        x = args[0] if args else kwargs["hidden_states"]
        if self.given is not None:
            x = torch.cat([x[:, : self.padding], self.given[:, layer].to(x)], dim=1)
            args, kwargs = ((x, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": x})
        self.inputs[layer] = x[:, self.padding :]
        return args, kwargs

    def read(self, rows: int, keep: bool) -> Decisions:
        """What the last call of `rows` rows decided."""
        logits = []
        for ffn in self.ffns:
            assert ffn.logits is not None
            # Some blocks flatten [B, T] before their FFN.
            logits.append(ffn.logits.reshape(rows, -1, ffn.num_experts)[:, self.padding :])
        active = [each > ffn.threshold_logit for each, ffn in zip(logits, self.ffns, strict=True)]
        if not keep:
            return Decisions(torch.stack(active, dim=1).cpu())
        inputs = torch.stack([self.inputs[layer] for layer in range(len(self.ffns))], dim=1).cpu()
        scores = torch.stack([each.float().sigmoid() for each in logits], dim=1).cpu()
        return Decisions(torch.stack(active, dim=1).cpu(), inputs, scores)


@contextmanager
def _watched(model: Any) -> Iterator[_Watch]:
    """A model in hard mode that is looked at."""
    ffns = require_sparse_ffns(model)
    watch, handles = _Watch(list(ffns.values())), []
    with ExitStack() as stack:
        stack.enter_context(hard_inference(model))
        for layer, (name, ffn) in enumerate(ffns.items()):
            block: nn.Module = model.get_submodule(name.rpartition(".")[0])
            ffn.record_logits, ffn.logits = True, None

            def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], layer: int = layer) -> Any:
                return watch.before_block(layer, args, kwargs)

            handles.append(block.register_forward_pre_hook(before, with_kwargs=True))
        try:
            yield watch
        finally:
            for handle in handles:
                handle.remove()
            for ffn in watch.ffns:
                ffn.record_logits, ffn.logits = False, None


def check_decoder(model: Any) -> None:
    """Refuses a model whose greedy answers and decisions this cannot compare.

    Raises:
        ValueError: for a dense model, or one with an encoder, or that is one.
    """
    require_sparse_ffns(model)
    check_next_token(model.config)
    if model.config.is_encoder_decoder:
        raise ValueError(f"model must be a decoder, got {type(model).__name__}, which has an encoder")


def in_one_pass(
    model: Any, ids: Tensor, batch: int = 1, padding: int = 0, given: Tensor | None = None, keep: bool = False
) -> Decisions:
    """The decisions for rows of tokens that are read in one pass.

    Args:
        model: an LTE model, plain or accelerated.
        ids: [N, T].
        batch: rows of a pass.
        padding: tokens of padding on the left of each row.
        given: what each block reads, [N, L, T, D]; `None`: what the block before it gives.
        keep: whether inputs and scores are kept.
    """
    found = []
    with _watched(model) as watch:
        watch.padding = padding
        for index, rows in enumerate(ids.split(batch)):
            watch.given = None if given is None else given[index * batch :][: len(rows)]
            routed_part(model)(**row_inputs(model, rows, padding), use_cache=False)
            found.append(watch.read(len(rows), keep))
    return _joined(found, 0)


def token_by_token(model: Any, ids: Tensor, prompt: int, given: Tensor | None = None, keep: bool = False) -> Decisions:
    """The decisions where each row is read alone, its first `prompt` tokens in one pass and then one at a time.

    Arguments as for `in_one_pass`.
    """
    found = []
    with _watched(model) as watch:
        for row, tokens in enumerate(ids):
            cache, parts = DynamicCache(), []
            for start, end in [(0, prompt), *((place, place + 1) for place in range(prompt, len(tokens)))]:
                watch.given = None if given is None else given[row : row + 1, :, start:end]
                inputs = row_inputs(model, tokens[None, start:end])
                routed_part(model)(**inputs, past_key_values=cache, use_cache=True)
                parts.append(watch.read(1, keep))
            found.append(_joined(parts, 2))
    return _joined(found, 0)


def _joined(runs: Sequence[Decisions], dim: int) -> Decisions:
    def joined(name: str) -> Any:
        parts = [getattr(run, name) for run in runs]
        return None if parts[0] is None else torch.cat(parts, dim=dim)

    return Decisions(joined("active"), joined("inputs"), joined("scores"))


class NoStepsError(ValueError):
    """Why a model does not decode by whole steps, in words that go on from "as ..."."""


def by_whole_steps(model: Any, ids: Tensor, prompt: int, given: Tensor | None = None) -> Decisions:
    """As `token_by_token`, with whole decoding steps after the prompt; `active` of the prompt is that of its pass.

    An engine tells of its last layer alone, so the tokens are read once for every layer, by a plan of the layers up
    to it; or with `given`, of it alone.

    Args:
        model: an accelerated LTE model.
        ids: [N, T].
        prompt: tokens that are read in one pass.
        given: what each block reads, [N, L, T, D].

    Raises:
        NoStepsError: if no engine computes the model.
    """
    try:
        plan = decoder_plan(model)
    except NoPlanError as error:
        raise NoStepsError(str(error)) from None
    plan = replace(plan, head=plan.embedding[:_HEAD_ROWS], head_bias=None, logit_cap=0.0)
    prompts, caches = _prompts(model, ids, prompt, given)
    reason = engines.unfit(plan, caches[0])
    if reason is not None:
        raise NoStepsError(reason)
    layers = range(len(plan.layers))
    steps = [_steps_of_layer(plan, layer, ids[:, prompt:], caches, prompt, given) for layer in layers]
    return Decisions(torch.cat([prompts.active, torch.stack(steps, dim=1)], dim=2))


def _prompts(model: Any, ids: Tensor, prompt: int, given: Tensor | None) -> tuple[Decisions, list[list[LayerCache]]]:
    """The decisions for the prompts, and the caches that they leave, with room for all tokens, by row and layer."""
    found, caches = [], []
    with _watched(model) as watch:
        for row, tokens in enumerate(ids):
            watch.given = None if given is None else given[row : row + 1, :, :prompt]
            cache = DynamicCache()
            routed_part(model)(**row_inputs(model, tokens[None, :prompt]), past_key_values=cache, use_cache=True)
            found.append(watch.read(1, keep=False))
            layers: list[Any] = cache.layers
            held = [[with_room(each, prompt, len(tokens)) for each in (one.keys, one.values)] for one in layers]
            caches.append([LayerCache(keys=keys, values=values) for keys, values in held])
    return _joined(found, 0), caches


def _steps_of_layer(
    plan: DecoderPlan, layer: int, ids: Tensor, caches: list[list[LayerCache]], prompt: int, given: Tensor | None
) -> Tensor:
    """What whole steps decide in one layer for the tokens [N, T] after the prompts, bool [N, T, E]."""
    device, first, last = plan.embedding.device, 0, layer + 1
    if given is not None:
        # A decoder of one layer, whose embeddings are what the layer shall read.
        table = given[:, layer, prompt:].to(plan.embedding).flatten(0, 1).contiguous()
        plan = replace(plan, embedding=table, embedding_scale=1.0)
        ids, first = torch.arange(len(table)).view(ids.shape), layer
    engine = engines.make_engine(replace(plan, layers=plan.layers[first:last]))
    starts, found = torch.zeros(1, dtype=torch.long, device=device), []
    for tokens, cache in zip(ids.to(device), caches, strict=True):
        step, decided = engine.bind(cache[first:last]), []
        for place in range(len(tokens)):
            step(tokens[place : place + 1].clone(), starts + prompt + place, starts)
            decided.append(step.active()[0].cpu())
        found.append(torch.stack(decided))
    return torch.stack(found)
