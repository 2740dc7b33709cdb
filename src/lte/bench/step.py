"""The whole decoding step as a provider: that of the sparse model, and the same with all experts on and no router.

Both read the weights of the sparse model where they lie, so that they take no memory of their own, and the static
caches of the `Decoder`s that they are timed beside.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lte.bench.gate import check_logits
from lte.hf.decoder import NoPlanError, decoder_plan, same_memory
from lte.hf.families import dense_ffns, family_of
from lte.ops.step import engines
from lte.ops.step.plan import DecoderPlan, DecodeStep, LayerCache


def static_caches(cache: Any, context: int) -> list[LayerCache]:
    """The layers of a static cache, as engines take them.

    Raises:
        NoPlanError: for a sliding window shorter than the context, whose layers transformers moves at each step.
    """
    if any(layer.max_cache_len < context for layer in cache.layers):
        raise NoPlanError("its sliding windows are shorter than the context")
    return [LayerCache(keys=layer.keys, values=layer.values) for layer in cache.layers]


def all_on(plan: DecoderPlan, biased: bool = True) -> DecoderPlan:
    """The same step with a dense FFN in every layer, without biases of the down projections unless `biased`."""
    layers = [replace(layer, router=None, router_bias=None, threshold=0.0) for layer in plan.layers]
    if not biased:
        layers = [replace(layer, down_bias=None) for layer in layers]
    return replace(plan, layers=layers)


class WholeStep:
    """A step that can be repeated, of a model with the routing that it has now.

    Args:
        make_plan: gives the plan; called anew by `bind_`.
        decoder: the model's texts, tokens, positions and static cache.
        context: tokens that the cache holds.

    Raises:
        NoPlanError: if no engine computes it.
    """

    def __init__(self, make_plan: Callable[[], DecoderPlan], decoder: Any, context: int):
        self.make_plan, self.decoder = make_plan, decoder
        self.caches = static_caches(decoder.cache, context)
        self.plan = make_plan()
        reason = engines.unfit(self.plan, self.caches)
        if reason is not None:
            raise NoPlanError(reason)
        self.engine = engines.make_engine(self.plan)
        self.step: DecodeStep = self.engine.bind(self.caches)
        self._phases: dict[str, float] | None = None
        self.starts = torch.zeros_like(decoder.positions)

    def bind_(self) -> None:
        """Takes over what the routers hold now: an engine may copy it when it is bound."""
        self._phases = None
        plan = self.make_plan()  # which rounds the routers anew, in place
        if not same_memory(self.plan, plan):
            self.plan, self.engine = plan, engines.make_engine(plan)
        self.step = self.engine.bind(self.caches)

    def __call__(self) -> Tensor:
        """Logits [B, 1, V] of the decoder's token."""
        return self.step(self.decoder.token[:, 0], self.decoder.positions, self.starts)[:, None]

    @torch.no_grad()
    def check(self, what: str) -> float:
        """Compares the logits after the prompt with those of the decoder's model.

        Raises:
            GateError: if they differ.
        """
        self.bind_()
        self.decoder.restart()
        self.decoder.next_token()
        expected = self.decoder.eager()
        self.decoder.restart()
        self.decoder.next_token(whole_step=True)
        return check_logits(self(), expected, what)

    def phase_ms(self) -> dict[str, float] | None:
        """Milliseconds of a step in each phase, all layers together and the mean over blocks; `None` on a CPU."""
        if self.starts.device.type == "cuda" and self._phases is None:
            from lte.ops.step.phases import STAMPS, phase_us

            engine: Any = self.engine
            layers = len(self.plan.layers)
            inputs = (self.decoder.token[:, 0], self.decoder.positions, self.starts)
            found = phase_us(engine.bind(self.caches, TRACE=STAMPS), inputs, layers)
            self._phases = {name: mean * layers / 1e3 for name, (mean, _) in found.items()}
        return self._phases


def whole_steps(model: Any, sparse: Any, dense: Any, context: int) -> Sequence[WholeStep]:
    """The step of a sparse model and the dense one on the same weights, on the caches of two `Decoder`s.

    Raises:
        NoPlanError: for a model that no engine computes.
    """

    def plan() -> DecoderPlan:
        return decoder_plan(model)

    # A dense model of a family without biases lacks what `LteConfig.dropped_bias` has added.
    family = family_of(dense.model.config)
    biased = any(
        ffn.get_submodule(family.layout.down).bias is not None for ffn in dense_ffns(dense.model, family).values()
    )
    return WholeStep(plan, sparse, context), WholeStep(lambda: all_on(plan(), biased), dense, context)
