"""The pairs of models that are compared, of every family that has FFN modules of its own."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from lte.bench.bytes import ffn_bytes, other_bytes
from lte.bench.dense import Projections
from lte.bench.models import model_pair, timed_layers
from tests.methods.methods import made
from tests.tiny_models import HIDDEN, NEURONS, logits_of, num_ffns, num_inputs, row_of, tiny_dense_model

Measure = Callable[[Tensor, Tensor], float]


def test_both_models_compute_the_same(model_type: str, tokens: Tensor, relative_rms: Measure) -> None:
    model = tiny_dense_model(model_type)
    if row_of(model_type).layout.spread:
        with pytest.raises(ValueError, match=f"model must have FFNs that are modules of their own .*'{model_type}'"):
            model_pair(model)
        return
    pair = model_pair(model)
    assert relative_rms(logits_of(pair.sparse, tokens), logits_of(pair.dense, tokens)) <= 1e-5
    assert timed_layers(pair) == num_ffns(model_type)
    layout = pair.family.layout
    projections = Projections.of(pair.dense_ffns[0], layout)
    assert projections.up.shape == (NEURONS, HIDDEN)
    assert projections.down.shape == (HIDDEN, NEURONS)
    assert ffn_bytes(projections, 0) == (num_inputs(model_type) + 1) * NEURONS * HIDDEN * 4
    x = torch.randn(3, HIDDEN)
    hidden = nn.functional.linear(x, projections.up, projections.up_bias)
    if projections.gate is None:
        activation = getattr(pair.dense_ffns[0], layout.activation)
        expected = nn.functional.linear(activation(hidden), projections.down, projections.down_bias)
        assert relative_rms(pair.dense_ffns[0](x.unsqueeze(0))[0], expected) <= 1e-5


def test_a_method_without_kernels_is_refused() -> None:
    with pytest.raises(ValueError, match=r"dense or an LTE model for `lte bench`.*method teal.*: its products are"):
        model_pair(made("teal"))


def test_a_step_of_a_causal_model_reads_its_cache(causal_type: str) -> None:
    if row_of(causal_type).layout.spread:
        return
    pair = model_pair(tiny_dense_model(causal_type))
    heads = getattr(pair.dense.config, "num_key_value_heads", 4)
    size = 2 * 2 * heads * 8 * 4
    assert other_bytes(pair, 1, 32) - other_bytes(pair, 1, 16) == 16 * size
