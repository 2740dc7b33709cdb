"""What a token computes depends on no later token and on no other request of its batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import lte
from lte.eval.answers import generate_greedily
from lte.eval.token_routing import recorded_logits
from lte.hf.stepping import has_engine
from tests.hf.step_models import accelerated
from tests.tiny_models import EXPERT_SIZE, MODEL_TYPES, VOCAB, is_causal, randomise_routers_, tiny_dense_model

CAUSAL = [name for name in MODEL_TYPES if is_causal(name)]
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "chunks": {"grouping": "chunks"},
    "core": {"always_on": 0.25},
    "low rank": {"router_rank": 4},
}


def ids_of(seed: int = 0) -> Tensor:
    return torch.randint(3, VOCAB, (3, 12), generator=torch.Generator().manual_seed(seed))


def sparse(model_type: str, **options: Any) -> Any:
    config = lte.LteConfig(expert_size=EXPERT_SIZE, **{"grouping": "random", **options})
    model = lte.sparsify_(tiny_dense_model(model_type), config, calibration=[{"input_ids": ids_of(7)}])
    randomise_routers_(model)
    for ffn in lte.sparse_ffns(model).values():
        ffn.router.pin_()
    return model


@torch.no_grad()
def read(model: Any, ids: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The logits [B, T, V], and the active experts [B, T, E] of each layer."""
    ffns = list(lte.sparse_ffns(model).values())
    with recorded_logits(ffns):
        logits = model(ids, use_cache=False).logits
        return logits, [(ffn.logits > ffn.threshold_logit).reshape(*ids.shape, -1) for ffn in ffns]  # type: ignore[operator]


def check(model: Any, tolerance: float) -> None:
    ids = ids_of()
    logits, active = read(model, ids)
    for place in (1, 7):
        later, other = ids.clone(), ids.clone()
        later[:, place:] = ids_of(1)[:, place:]
        other[1:] = ids_of(2)[1:]
        for changed, rows, end in ((later, 3, place), (other, 1, 12)):
            found, switched = read(model, changed)
            torch.testing.assert_close(found[:rows, :end], logits[:rows, :end], rtol=tolerance, atol=tolerance)
            assert not torch.equal(found, logits)
            for one, two in zip(active, switched, strict=True):
                assert torch.equal(one[:rows, :end], two[:rows, :end])


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_settings_in_plain_pytorch(model_type: str, name: str) -> None:
    check(sparse(model_type, **SETTINGS[name]), 0.0)


@pytest.mark.parametrize("model_type", CAUSAL)
def test_families_in_plain_pytorch(model_type: str) -> None:
    check(sparse(model_type), 0.0)


@pytest.mark.parametrize("model_type", CAUSAL)
def test_families_on_the_kernels(model_type: str) -> None:
    # Sums may have another order where other tokens need other experts.
    check(lte.accelerate_(sparse(model_type)), 1e-4)


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "gemma2"])
def test_requests_that_are_answered_together_by_whole_steps(model_type: str) -> None:
    model, ids = accelerated(model_type), ids_of()
    alone = generate_greedily(model, ids[:1], 20)
    assert has_engine(model)
    for seed in (0, 2, 3):
        together = torch.cat([ids[:1], ids_of(seed)[1:]])
        assert torch.equal(generate_greedily(model, together, 20)[:1], alone)
