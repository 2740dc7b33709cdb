"""Whole decoding steps: one token for each of B sequences, with a static key-value cache.

Dense baselines are Hugging Face eager, `torch.compile(mode="reduce-overhead")`, which runs a step as one CUDA graph,
and the same with coordinate descent tuning of its kernels, the class of gpt-fast. The sparse model runs eagerly and
with the last of these settings. Where an engine of `lte.ops.step` computes the model, its whole step and the same step
with all experts on and no router are two providers more.
"""

from __future__ import annotations

import contextlib
import functools
import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import StaticCache

from lte.bench.gate import check_logits
from lte.bench.routing import Use
from lte.bench.rows import DENSE_STEP, Row
from lte.bench.session import Session
from lte.bench.step import WholeStep, whole_steps
from lte.bench.sweep import ModelGroup, is_dense_name
from lte.bench.timing import interleaved_times
from lte.hf.decoder import NoPlanError

EAGER, REDUCED, TUNED = "dense eager", "dense compiled", "dense compiled, tuned"
# What mode="reduce-overhead" sets, and the search over block sizes of the generated kernels, from the best of several
# starts.
REDUCE_OVERHEAD = {"triton.cudagraphs": True}
TUNING = {**REDUCE_OVERHEAD, "coordinate_descent_tuning": True, "max_autotune_pointwise": True}
# Each batch size and model is a specialisation of the same code, of which dynamo allows 8 by default.
SPECIALISATIONS = 64
USE_STEPS = 32
# Steps by which the outcomes of several tunings are compared.
COMPARED_STEPS = 10
# Dynamo compiles in the first call; CUDA graphs warm up in the next and are recorded in the one after it.
WARM_STEPS = 4


class Decoder:
    """A model, its static cache after a prompt, and a step that can be repeated.

    Args:
        model: dense or sparse.
        ids: texts [B, L]; the first tokens up to `prompt` are the prompt, the others are fed one by one, again and
            again if there are few.
        prompt: tokens of the prompt, fewer than `context`.
        context: tokens that the cache holds.
        beside: another decoder of the same texts whose cache it shares; `None` makes one.

    Attributes:
        token: the next token of each text, [B, 1].
        positions: where it stands, [B]; set for whole steps alone.
    """

    def __init__(self, model: Any, ids: Tensor, prompt: int, context: int, beside: Decoder | None = None):
        self.model, self.ids, self.prompt = model, ids, prompt
        self.steps = min(context, ids.shape[1]) - prompt
        if self.steps < 1:
            raise ValueError(f"context must be longer than the prompt of {prompt} tokens, got context={context}")
        if beside is None:
            self.cache, self.counted = StaticCache(config=model.config, max_cache_len=context), [prompt]
            model(input_ids=ids[:, :prompt].contiguous(), past_key_values=self.cache, logits_to_keep=1)
        else:
            self.cache, self.counted = beside.cache, beside.counted
        self.token = ids[:, prompt : prompt + 1].clone()
        self.positions = torch.full_like(ids[:, 0], prompt)
        self.step = 0

    def next_token(self, whole_step: bool = False) -> None:
        """Puts the next token of the texts in place; at the end of the cache it starts after the prompt again.

        Args:
            whole_step: whether an engine reads the token, which does not count in the cache.
        """
        position = self.prompt + self.step % self.steps
        if whole_step:
            self.positions.fill_(position)
        else:
            self._count_from(position)
        self.token.copy_(self.ids[:, position : position + 1])
        self.step += 1

    def _count_from(self, position: int) -> None:
        """Lets the model write to a position, and the cache count on from there."""
        if self.counted != [position]:
            layers: Any = self.cache.layers
            for layer in layers:
                layer.cumulative_length.fill_(position)
                if hasattr(layer, "cumulative_length_int"):  # of sliding windows
                    layer.cumulative_length_int = position
        self.counted[0] = position + 1

    def restart(self) -> None:
        """Starts after the prompt with the next call of `next_token`."""
        self.step = 0

    def eager(self) -> Tensor:
        """Logits [B, 1, V] of a step."""
        return self.model(input_ids=self.token, past_key_values=self.cache).logits

    def compiled(self, options: dict[str, Any]) -> Callable[[], Tensor]:
        """A step under `torch.compile`; on a GPU its output is overwritten by the next step."""
        options = options if self.token.is_cuda else {}
        forward = torch.compile(self.model.forward, fullgraph=True, dynamic=False, options=options)

        def run() -> Tensor:
            if self.token.is_cuda:
                torch.compiler.cudagraph_mark_step_begin()
            return forward(input_ids=self.token, past_key_values=self.cache).logits

        return run

    def checked(self, options: dict[str, Any], what: str) -> Callable[[], Tensor]:
        """`compiled` after its first calls, and its first logits compared with the eager ones.

        Raises:
            RuntimeError: if they differ.
        """

        def first_token(run: Callable[[], Tensor]) -> Tensor:
            self.restart()
            self.next_token()
            return run().clone()

        run = self.compiled(options)
        expected = first_token(self.eager)
        for _ in range(WARM_STEPS):
            found = first_token(run)
        check_logits(found, expected, what)
        return run


def benchmark_decode(session: Session, batch: int, full: bool) -> None:
    """Times a decoding step of B sequences at all sparsities and puts the rows into the results.

    Args:
        session: the run.
        batch: B.
        full: all providers; else the fastest kind of each model alone, since compilation takes most of the time.

    Raises:
        RuntimeError: if the sparse model's FFNs or its compiled logits are wrong.
    """
    from torch._dynamo import config  # slow to load

    with torch.no_grad(), config.patch(recompile_limit=SPECIALISATIONS):
        _DecodeGroup(session, batch, full).measure()


def _fills_the_device(cache: StaticCache, device: torch.device) -> bool:
    """Whether there is no room for a second cache beside the first, and for what models need to run."""
    if device.type != "cuda":
        return False
    layers: Any = cache.layers
    size = sum(layer.keys.nbytes + layer.values.nbytes for layer in layers)
    return 2 * size > torch.cuda.mem_get_info(device)[0]


def _unlike_others(options: dict[str, Any], tuning: int) -> dict[str, Any]:
    """The same settings for another tuning: dynamo keeps what it compiled as long as they are equal."""
    return {**options, "triton.cudagraph_dynamic_shape_warn_limit": 8 + tuning} if options else options


class _DecodeGroup(ModelGroup):
    """The models and functions of one batch size."""

    def __init__(self, session: Session, batch: int, full: bool):
        context, prompt = session.settings.context_length, session.settings.prompt
        super().__init__(session, "decode", batch, batch, context)
        self.full, self.ids = full, session.texts(batch)
        self.sparse = Decoder(session.pair.sparse, self.ids, prompt, context)
        shared = self.sparse if _fills_the_device(self.sparse.cache, session.device) else None
        self.dense = Decoder(session.pair.dense, self.ids, prompt, context, shared)
        self.check_pass = functools.partial(self._eager_steps, 1)
        self.steps = functools.partial(self._eager_steps, USE_STEPS)
        self.text_pass = functools.partial(session.pair.sparse, input_ids=self.ids, use_cache=False, logits_to_keep=1)
        self.tunings_ms: dict[str, list[float]] = {}
        self.whole_steps: dict[str, WholeStep] = {}
        if session.settings.whole_step:
            self.whole_steps = session.attempt(f"decode, batch {batch}, whole steps", self._whole_steps) or {}

    def before(self, provider: str) -> None:
        """Puts the next token of the provider's model in place."""
        decoder = self.dense if is_dense_name(provider) else self.sparse
        decoder.next_token(provider in self.whole_steps)

    def _whole_steps(self) -> dict[str, WholeStep]:
        """The whole steps by the names of the providers; none, and a note, where no engine computes the model."""
        session, context = self.session, self.session.settings.context_length
        try:
            sparse, dense = whole_steps(session.pair.sparse, self.sparse, self.dense, context)
        except NoPlanError as error:
            note = f"batch {self.batch}: whole steps are not timed, as {error}"
            session.results.note(whole_step=[*session.results.header.get("whole_step", []), note])
            session.say(note)
            return {}
        found = {f"{session.pair.provider} whole step": sparse}
        # With all experts on, int8 weights are no baseline: the dense model holds others.
        return found if session.int8 else {DENSE_STEP: dense, **found}

    def _check(self, sparsity: float | str) -> None:
        super()._check(sparsity)
        for name, step in [*self.whole_steps.items()]:
            check = functools.partial(step.check, f"the logits of {name}")
            if self.session.attempt(f"decode, batch {self.batch}, {name}", check) is None:
                del self.whole_steps[name]
                self.runs.pop(name, None)

    def _route(self, sparsity: float | str) -> None:
        super()._route(sparsity)
        for step in self.whole_steps.values():
            step.bind_()

    def _eager_steps(self, count: int) -> None:
        self.sparse.restart()
        for _ in range(min(count, self.sparse.steps)):
            self.sparse.next_token()
            self.sparse.eager()

    def prepare(self) -> None:
        """Compiles the providers; each compiled one is checked against the eager model."""
        self._prepare_models()
        self.runs |= self.whole_steps

    def _prepare_models(self) -> None:
        full, name, compile_models = self.full, self.session.pair.provider, self.session.settings.compile
        if full or not compile_models:
            self.runs[EAGER] = self.dense.eager
            self.runs[f"{name} eager"] = self.sparse.eager
        if not compile_models:
            return
        # A CPU has no CUDA graphs and nothing to tune: one compiled provider each.
        tuned = self.session.device.type == "cuda" and self.session.settings.tunings > 0
        options = TUNING if self.session.settings.tunings else REDUCE_OVERHEAD
        self._compile(TUNED if tuned else REDUCED, self.dense, options)
        self._compile(f"{name} compiled, tuned" if tuned else f"{name} compiled", self.sparse, options)
        if tuned and full:
            self._compile(REDUCED, self.dense, REDUCE_OVERHEAD)

    def _compile(self, name: str, decoder: Decoder, options: dict[str, Any]) -> None:
        def prepare(tuning: int) -> Callable[[], Tensor]:
            from torch._inductor.utils import fresh_cache  # slow to load

            # In the same cache a further search would only be remembered.
            with fresh_cache() if tuning else contextlib.nullcontext():
                return decoder.checked(_unlike_others(options, tuning), f"the logits of {name}")

        times: list[tuple[float, int, Callable[[], Tensor]]] = []
        for tuning in range(self.session.settings.tunings if options is TUNING else 1):
            what = f"decode, batch {self.batch}, {name}"
            run = self.session.attempt(what, functools.partial(prepare, tuning))
            if run is not None:
                steps = interleaved_times({name: run}, self.session.device, COMPARED_STEPS, self.before)[name]
                times.append((statistics.median(steps), tuning, run))
                self.session.say(f"compiled {name} for batch {self.batch}: {times[-1][0]:.3f} ms")
        if times:
            self.runs[name] = min(times)[2]
            self.tunings_ms[name] = [time for time, _, _ in times]

    def row(self, name: str, samples: list[float], sparsity: float | str | None, use: Use, **extra: Any) -> Row:
        """A provider's row."""
        context, tunings_ms = self.session.settings.context_length, self.tunings_ms.get(name)
        step = self.whole_steps.get(name)
        if step is not None:
            extra |= {"phase_ms": self.session.attempt(f"the phases of {name}", step.phase_ms)}
        row = super().row(name, samples, sparsity, use, context_length=context, tunings_ms=tunings_ms, **extra)
        return row if step is None else row | {"path": "whole step"}
