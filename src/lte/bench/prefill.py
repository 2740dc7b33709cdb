"""Prefill of the whole model: one forward pass over a prompt, without a cache."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from lte.bench.dense import COMPILED, EAGER
from lte.bench.ffn import benchmark_ffns
from lte.bench.session import Session
from lte.bench.sweep import ModelGroup


def benchmark_prefill(session: Session, length: int) -> None:
    """Times a prompt of that many tokens, whole model or FFNs alone as the settings say.

    Raises:
        RuntimeError: if the sparse path is wrong; nothing is then timed.
    """
    parameters = sum(p.numel() for p in session.pair.dense.parameters())
    if not session.settings.whole_model(parameters):
        benchmark_ffns(session, "prefill", length, batch=1)
        return
    with torch.no_grad():
        _PrefillGroup(session, length).measure()


class _PrefillGroup(ModelGroup):
    """The functions of one length of a prompt."""

    def __init__(self, session: Session, length: int):
        super().__init__(session, "prefill", 1, length)
        texts = session.texts(-(-length // session.ids.shape[1]))
        self.ids = texts.flatten()[:length].unsqueeze(0)
        self.check_pass = self.text_pass = self._forward(session.pair.sparse)

    def prepare(self) -> None:
        """Compiles the providers."""
        session, pair = self.session, self.session.pair
        self.runs = {EAGER: self._forward(pair.dense), pair.provider: self.text_pass}
        if session.settings.compile:
            compiled = torch.compile(self._forward(pair.dense), dynamic=False)
            if session.attempt(f"prefill, {self.tokens} tokens, {COMPILED}", compiled) is not None:
                self.runs[COMPILED] = compiled

    def _forward(self, model: Any) -> Callable[[], Any]:
        return lambda: model(input_ids=self.ids, use_cache=False, logits_to_keep=1).logits
