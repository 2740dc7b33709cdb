"""Acceleration on a GPU: its memory, and CUDA graphs that read the weights where they are."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import lte
from lte.bench.routing import force_same_
from lte.nn.accelerated import WeightFormat
from tests.hf.accelerated_models import weight_bytes
from tests.tiny_models import logits_of, tiny_sparse_model

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
LAYERS = 16
WIDE = {"hidden_size": 256, "intermediate_size": 2048, "num_hidden_layers": LAYERS}


@pytest.mark.parametrize("weights", ["native", "int8"])
def test_one_layer_at_a_time_is_copied(weights: WeightFormat) -> None:
    model = tiny_sparse_model(**WIDE).cuda()
    layer = 3 * 256 * 2048 * 4
    lte.decelerate_(lte.accelerate_(tiny_sparse_model().cuda(), weights))  # what is allocated once
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    lte.accelerate_(model, weights)
    # Native: gate and up of one layer twice, and the routers' rows; int8: fp32 copies of one projection.
    assert torch.cuda.max_memory_allocated() - before < 2 * layer
    if weights == "int8":
        assert torch.cuda.memory_allocated() < before - 0.7 * LAYERS * layer
        assert weight_bytes(model) < before


def test_cuda_graphs_read_the_weights_where_they_are(relative_rms: Callable[[Tensor, Tensor], float]) -> None:
    torch.compiler.reset()
    model = lte.accelerate_(tiny_sparse_model(**WIDE).cuda().bfloat16())
    # With scores near the threshold, what compilation rounds otherwise would switch experts on and off.
    force_same_(list(lte.sparse_ffns(model).values()), 0.5)
    ids = torch.tensor([[5]], device="cuda")
    step = torch.compile(model, fullgraph=True, mode="reduce-overhead", dynamic=False)
    with torch.no_grad():
        for _ in range(4):
            torch.compiler.cudagraph_mark_step_begin()
            actual = step(ids, use_cache=False).logits.clone()
        assert relative_rms(actual, logits_of(model, ids)) <= 0.05
        # A graph that had copied its inputs would go on computing with the old ones.
        for ffn in lte.sparse_ffns(model).values():
            ffn.down_proj.weight.zero_()
        torch.compiler.cudagraph_mark_step_begin()
        changed = step(ids, use_cache=False).logits.clone()
    assert relative_rms(changed, logits_of(model, ids)) <= 0.05
    assert relative_rms(changed, actual) > 0.1
