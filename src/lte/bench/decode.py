"""Whole decoding steps: one token for each of B sequences, with a static key-value cache.

Dense baselines are Hugging Face eager, `torch.compile(mode="reduce-overhead")`, which runs a step as one CUDA graph,
and the same with coordinate descent tuning of its kernels, the class of gpt-fast. The sparse model runs eagerly and
with the last of these settings.
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
from lte.bench.rows import Row
from lte.bench.session import Session
from lte.bench.sweep import ModelGroup, is_dense_name
from lte.bench.timing import interleaved_times

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
    """

    def __init__(self, model: Any, ids: Tensor, prompt: int, context: int):
        self.model, self.ids, self.prompt = model, ids, prompt
        self.steps = min(context, ids.shape[1]) - prompt
        if self.steps < 1:
            raise ValueError(f"context must be longer than the prompt of {prompt} tokens, got context={context}")
        self.cache = StaticCache(config=model.config, max_cache_len=context)
        model(input_ids=ids[:, :prompt].contiguous(), past_key_values=self.cache)
        self.token = ids[:, prompt : prompt + 1].clone()
        self.step = 0

    def next_token(self) -> None:
        """Puts the next token of the texts in place; at the end of the cache it starts after the prompt again."""
        position = self.step % self.steps
        if position == 0:
            layers: Any = self.cache.layers
            for layer in layers:
                layer.cumulative_length.fill_(self.prompt)
                if hasattr(layer, "cumulative_length_int"):  # of sliding windows
                    layer.cumulative_length_int = self.prompt
        self.token.copy_(self.ids[:, self.prompt + position : self.prompt + position + 1])
        self.step += 1

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


def _unlike_others(options: dict[str, Any], tuning: int) -> dict[str, Any]:
    """The same settings for another tuning: dynamo keeps what it compiled as long as they are equal."""
    return {**options, "triton.cudagraph_dynamic_shape_warn_limit": 8 + tuning} if options else options


class _DecodeGroup(ModelGroup):
    """The models and functions of one batch size."""

    def __init__(self, session: Session, batch: int, full: bool):
        context, prompt = session.settings.context_length, session.settings.prompt
        super().__init__(session, "decode", batch, batch, context)
        self.full, self.ids = full, session.texts(batch)
        self.dense = Decoder(session.pair.dense, self.ids, prompt, context)
        self.sparse = Decoder(session.pair.sparse, self.ids, prompt, context)
        self.check_pass = functools.partial(self._eager_steps, 1)
        self.steps = functools.partial(self._eager_steps, USE_STEPS)
        self.text_pass = functools.partial(session.pair.sparse, input_ids=self.ids, use_cache=False, logits_to_keep=1)
        self.tunings_ms: dict[str, list[float]] = {}

    def before(self, provider: str) -> None:
        """Puts the next token of the provider's model in place."""
        (self.dense if is_dense_name(provider) else self.sparse).next_token()

    def _eager_steps(self, count: int) -> None:
        self.sparse.restart()
        for _ in range(min(count, self.sparse.steps)):
            self.sparse.next_token()
            self.sparse.eager()

    def prepare(self) -> None:
        """Compiles the providers; each compiled one is checked against the eager model."""
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
        return super().row(name, samples, sparsity, use, context_length=context, tunings_ms=tunings_ms, **extra)
