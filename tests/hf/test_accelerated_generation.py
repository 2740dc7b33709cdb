"""An accelerated model generates and compiles as the plain one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import StaticCache

import lte
from lte.ops.step import engines
from tests.hf.accelerated_models import TOLERANCE
from tests.tiny_models import logits_of, randomise_routers_, tiny_sparse_model

Measure = Callable[[Tensor, Tensor], float]


class TestGeneration:
    @pytest.mark.parametrize("cache", [None, "static"])
    def test_padded_batches(
        self, cache: str | None, causal_type: str, calls: list[int], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(engines, "unfit", lambda plan, caches: "this test is about the FFNs' own kernels")
        model, settings = tiny_sparse_model(causal_type), {"max_new_tokens": 12, "do_sample": False}
        ids = torch.randint(3, 99, (3, 6))
        mask = torch.ones_like(ids)
        mask[0, :4] = mask[1, :1] = 0
        arguments = {"input_ids": ids * mask, "attention_mask": mask, "cache_implementation": cache, **settings}
        expected = model.generate(**arguments)
        assert not calls
        assert torch.equal(lte.accelerate_(model).generate(**arguments), expected)
        assert {18, 3} <= set(calls)

    @pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
    @pytest.mark.parametrize("weights", ["native", "int8"])
    def test_compiled_with_a_static_cache(self, backend: str, weights: Any, relative_rms: Measure) -> None:
        torch.compiler.reset()
        model = lte.accelerate_(tiny_sparse_model(), weights)
        step = torch.compile(model, fullgraph=True, backend=backend, dynamic=False)
        eager, compiled = (StaticCache(config=model.config, max_cache_len=16) for _ in range(2))
        for token in range(3, 6):
            ids = torch.tensor([[token]])
            with torch.no_grad():
                expected = model(ids, past_key_values=eager).logits
                actual = step(ids, past_key_values=compiled).logits
            assert relative_rms(actual, expected) <= TOLERANCE
        if weights == "native":
            model.load_state_dict(randomise_routers_(tiny_sparse_model(), seed=5).state_dict())
            with torch.no_grad():
                ids, cache = torch.tensor([[7]]), StaticCache(config=model.config, max_cache_len=16)
                actual = step(ids, past_key_values=cache).logits
            assert relative_rms(actual, logits_of(model, ids)) <= TOLERANCE
