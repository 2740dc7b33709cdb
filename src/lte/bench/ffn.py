"""FFNs alone, for a few tokens (benchmark `ffn`) or a prompt (`prefill`): the sparse path against dense ones.

A call runs several layers with weights of their own, so that no cache holds them; times are per layer. On a GPU a call
is one CUDA graph.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lte.bench.acceleration import path_names, phase_runs
from lte.bench.bytes import ffn_bytes, router_bytes
from lte.bench.dense import EAGER, INDEXING, IndexedFfns, compiled_runs
from lte.bench.gate import check_ffns, layer_inputs
from lte.bench.models import timed_layers
from lte.bench.routing import TokenPatterns, Use, force_same_, use_of
from lte.bench.rows import Row
from lte.bench.session import Session
from lte.bench.settings import is_own
from lte.bench.sweep import Group, use_fields
from lte.bench.timing import Call, Times, captured, interleaved_times
from lte.nn.sparse_ffn import SparseFfn

PHASE_REPEATS = 10
# Gathering the active rows is the paper's slow baseline for decoding; a prompt needs nearly all rows.
MOST_INDEXED_TOKENS = 64
# From here on arithmetic takes so much longer than reading that it does not matter whether a cache holds the weights.
COMPUTE_BOUND_TOKENS = 1024


def benchmark_ffns(session: Session, benchmark: str, tokens: int, batch: int) -> None:
    """Times FFNs for T tokens at all sparsities and puts the rows into the results.

    Args:
        session: the run.
        benchmark: "ffn" or "prefill".
        tokens: T.
        batch: for the rows.

    Raises:
        RuntimeError: if the sparse path is wrong; nothing is then timed.
    """
    with torch.no_grad():
        group = _FfnGroup(session, benchmark, tokens, batch)
        with group.own.kept():
            for sparsity in session.settings.sparsities:
                group.add(*group.times(sparsity))


class _FfnGroup(Group):
    """The layers and functions of one number of tokens."""

    def __init__(self, session: Session, benchmark: str, tokens: int, batch: int):
        pair = session.pair
        self.count = timed_layers(pair) if tokens < COMPUTE_BOUND_TOKENS else min(2, len(pair.sparse_ffns))
        super().__init__(session, benchmark, batch, tokens, self.count)
        self.act = getattr(self.dense_ffns[0], pair.family.layout.activation)
        hidden = self.stock[0].up.shape[1]
        self.patterns = TokenPatterns(tokens, hidden, pair.dtype, pair.device, session.settings.seed)
        shape = (tokens, 1, hidden) if benchmark == "ffn" else (1, tokens, hidden)
        self.inputs = [self.patterns.x.clone().view(shape) for _ in self.ffns]
        routers = [functools.partial(_mask, ffn) for ffn in self.ffns]
        self.indexed = IndexedFfns(self.stock, routers, self.act) if tokens <= MOST_INDEXED_TOKENS else None

    def times(self, sparsity: float | str) -> tuple[dict[str, list[float]], float | str, Use]:
        """Sets the routing, checks the sparse path, then times all providers in turn."""
        session = self.session
        self._route(sparsity)
        self.error = check_ffns(self.ffns, self.inputs, self.stock, session.activation, not session.int8)
        if is_own(sparsity):
            self.expect(sparsity)
        if not self.runs:
            self._prepare()
        masks = [_mask(ffn, x) for ffn, x in zip(self.ffns, self.inputs, strict=True)]
        runs = dict(self.runs)
        # Anew for each sparsity, as its path may be another.
        self._add(runs, session.pair.provider, self._sparse)
        if self.indexed is not None:
            self._add(runs, INDEXING, self.indexed.run(self.inputs))
        return interleaved_times(runs, session.device, session.settings.repeats), sparsity, use_of(masks)

    def _route(self, sparsity: float | str) -> None:
        settings = self.session.settings
        self.expect(sparsity)
        if is_own(sparsity):
            self._set_inputs(self._text_states())
            # For the check alone: scores near the threshold may fall to either side, by the order of a sum.
            force_same_(self.ffns, 0.5, settings.seed)
            return
        self._set_inputs([self.patterns.x] * self.count)
        if self._routing() == "same":
            force_same_(self.ffns, float(sparsity), settings.seed)
        else:
            self.patterns.force_(self.ffns, float(sparsity), settings.seed)

    def _routing(self) -> str:
        same = self.tokens == 1 or self.ffns[0].router.down is not None
        return "same" if same else self.session.settings.routing

    def _set_inputs(self, states: Sequence[Tensor]) -> None:
        for x, state in zip(self.inputs, states, strict=True):
            x.copy_(state.view(x.shape))

    def _text_states(self) -> list[Tensor]:
        """The hidden states [T, D] that the model has on the text: of T texts' last tokens, or of T tokens in turn."""
        session, decoding = self.session, self.benchmark == "ffn"
        length = session.ids.shape[1]
        texts = session.texts(self.tokens if decoding else -(-self.tokens // length))
        states = layer_inputs(self.ffns, lambda: session.pair.sparse(input_ids=texts, use_cache=False))
        return [(x[:, -1] if decoding else x.flatten(0, -2)[: self.tokens]) for x in states]

    def _prepare(self) -> None:
        """Compiles and captures what does not depend on the sparsity."""
        session = self.session
        self._add(self.runs, EAGER, lambda: [f(x) for f, x in zip(self.dense_ffns, self.inputs, strict=True)])
        if session.settings.compile:
            autotune = session.settings.autotune and self.benchmark == "ffn"
            for name, run in compiled_runs(self.stock, self.inputs, self.act, autotune).items():
                self._add(self.runs, name, run)
                session.say(f"prepared {name} for {self.tokens} tokens")

    def _sparse(self) -> list[Tensor]:
        return [ffn(x) for ffn, x in zip(self.ffns, self.inputs, strict=True)]

    def _add(self, runs: dict[str, Call], name: str, run: Callable[[], object]) -> None:
        def prepare() -> Call:
            run()
            return captured(run, self.session.device)

        found = self.session.attempt(f"{self.benchmark}, {self.tokens} tokens, {name}", prepare)
        if found is not None:
            runs[name] = found

    def row(self, name: str, samples: list[float], sparsity: float | str | None, use: Use, **extra: Any) -> Row:
        """A provider's row, times per layer."""
        session = self.session
        ours = name == session.pair.provider
        size = ffn_bytes(self.stock[0], self.tokens, use.union, ours and session.int8)
        if ours or name == INDEXING:
            size += router_bytes(self.ffns[0])
        if ours:
            extra = {
                "relative_rms": self.error,
                "path": path_names(self.ffns, self.tokens, self.benchmark == "prefill"),
                "phase_ms": self._phases() or None,
            }
        return session.row(
            [sample / self.count for sample in samples],
            size,
            benchmark=self.benchmark,
            provider=name,
            scope="ffn",
            layers=self.count,
            batch=self.batch,
            tokens=self.tokens,
            **use_fields(sparsity, use, self._routing()),
            **extra,
        )

    def _phases(self) -> dict[str, float]:
        """Median milliseconds per layer of each phase of the decode kernel alone; empty where there is no split."""
        session, x = self.session, self.inputs[0].flatten(0, -2)
        if path_names(self.ffns, self.tokens) != "decode":
            return {}
        phases = session.attempt("time split", lambda: phase_runs(x, self.ffns, session.activation)) or {}
        runs: dict[str, Call] = {}
        for name, run in phases.items():
            self._add(runs, name, run)
        times = interleaved_times(runs, session.device, PHASE_REPEATS) if runs else {}
        return {name: Times.of(found).median_ms / self.count for name, found in times.items()}


def _mask(ffn: SparseFfn, x: Tensor) -> Tensor:
    """Which experts are active [T, E]."""
    return (ffn.router(x) > ffn.threshold_logit).flatten(0, -2)
