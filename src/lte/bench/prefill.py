"""Prefill of the whole model: one forward pass over a prompt, without a cache."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from lte.bench.acceleration import path_names
from lte.bench.bytes import ffn_bytes, other_bytes, router_bytes
from lte.bench.dense import COMPILED, EAGER, Projections
from lte.bench.ffn import benchmark_ffns
from lte.bench.routing import RouterValues, Use, measure_use
from lte.bench.rows import Row
from lte.bench.session import Session
from lte.bench.sweep import Sweep, check_forced, model_routing, route_model_, use_fields
from lte.bench.timing import Call, interleaved_times


def benchmark_prefill(session: Session, length: int) -> None:
    """Times a prompt of that many tokens, whole model or FFNs alone as the settings say.

    Raises:
        RuntimeError: if the sparse path is wrong; nothing is then timed.
    """
    parameters = sum(p.numel() for p in session.pair.dense.parameters())
    if not session.settings.whole_model(parameters):
        benchmark_ffns(session, "prefill", length, batch=1)
        return
    own = RouterValues(session.pair.sparse_ffns)
    with torch.no_grad(), own.kept():
        group = _PrefillGroup(session, length)
        sweep = Sweep(session, ("prefill", 1, length), group.row)
        for index, sparsity in enumerate(session.settings.sparsities):
            group.error = check_forced(session, group.ffns, own, sparsity, length, group.sparse)
            if index == 0:
                group.prepare()
            route_model_(session, group.ffns, own, sparsity, length, group.sparse)
            use = measure_use(group.ffns, group.sparse)
            sweep.add(interleaved_times(group.runs, session.device, session.settings.repeats), sparsity, use)


class _PrefillGroup:
    """The functions of one length of a prompt."""

    def __init__(self, session: Session, length: int):
        self.session, self.length = session, length
        pair, ids = session.pair, session.texts(-(-length // session.ids.shape[1]))
        self.ids = ids.flatten()[:length].unsqueeze(0)
        self.ffns = pair.sparse_ffns
        self.stock = [Projections.of(ffn, pair.family.layout) for ffn in pair.dense_ffns]
        self.sparse = self._forward(pair.sparse)
        self.error = 0.0
        self.runs: dict[str, Call] = {}

    def prepare(self) -> None:
        """Compiles the providers."""
        session, pair = self.session, self.session.pair
        self.runs = {EAGER: self._forward(pair.dense), pair.provider: self.sparse}
        if session.settings.compile:
            compiled = torch.compile(self._forward(pair.dense), dynamic=False)
            if session.attempt(f"prefill, {self.length} tokens, {COMPILED}", compiled) is not None:
                self.runs[COMPILED] = compiled

    def _forward(self, model: Any) -> Callable[[], Any]:
        return lambda: model(input_ids=self.ids, use_cache=False, logits_to_keep=1).logits

    def row(self, name: str, samples: list[float], sparsity: float | str | None, use: Use) -> Row:
        """A provider's row."""
        session, dense = self.session, sparsity is None
        ffn = ffn_bytes(self.stock[0], self.length, use.union, not dense and session.int8)
        router = 0 if dense else router_bytes(self.ffns[0])
        return session.row(
            samples,
            other_bytes(session.pair, 1, 0) + len(self.ffns) * (ffn + router),
            benchmark="prefill",
            provider=name,
            scope="model",
            layers=len(self.ffns),
            batch=1,
            tokens=self.length,
            **use_fields(sparsity, use, model_routing(session, self.ffns, self.length)),
            relative_rms=None if dense else self.error,
            path=None if dense else path_names(self.ffns, self.length),
        )
