from __future__ import annotations

import pytest
import torch
from torch import Tensor

import lte
from lte.bench.acceleration import expect_, path_names, use_of_layer
from lte.bench.routing import (
    RouterValues,
    TokenPatterns,
    force_random_,
    force_same_,
    forced_mask,
    measure_use,
    use_of,
)
from lte.nn.sparse_ffn import SparseFfn
from lte.ops import dispatch
from lte.ops.paths import ExpectedUse
from tests.bench.conftest import trained_pair
from tests.tiny_models import HIDDEN, tiny_dense_model, tiny_sparse_model


def masks(ffns: list[SparseFfn], x: Tensor) -> list[Tensor]:
    return [ffn.router(x) > ffn.threshold_logit for ffn in ffns]


def test_a_forced_mask_has_the_wanted_share_in_each_row() -> None:
    mask = forced_mask(5, 40, 0.8, seed=0)
    assert mask.sum(1).tolist() == [8] * 5
    assert not (mask[0] == mask[1]).all()
    assert (mask == forced_mask(5, 40, 0.8, seed=0)).all()
    assert forced_mask(1, 40, 0.0, seed=0).all()
    assert not forced_mask(1, 40, 1.0, seed=0).any()


def test_the_same_experts_for_all_tokens_and_others_in_each_layer() -> None:
    ffns = trained_pair().sparse_ffns
    force_same_(ffns, 0.5)
    found = masks(ffns, torch.randn(6, HIDDEN))
    for mask in found:
        assert (mask == mask[0]).all()
        assert mask[0].sum() == 4
    assert not (found[0][0] == found[1][0]).all()


@pytest.mark.parametrize("tokens", [3, 11])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_different_experts_for_each_token(tokens: int, dtype: torch.dtype) -> None:
    ffns = trained_pair().sparse_ffns
    patterns = TokenPatterns(tokens, HIDDEN, dtype, torch.device("cpu"))
    patterns.force_(ffns, 0.5)
    assert patterns.x.shape == (tokens, HIDDEN)
    for mask in masks(ffns, patterns.x):
        assert mask.sum(1).tolist() == [4] * tokens
        assert not (mask == mask[0]).all()
        # 32 hidden units hold 4 patterns: every fourth token has the same experts.
        assert (mask[patterns.count :] == mask[: -patterns.count or None][: tokens - patterns.count]).all()
    assert len(patterns.x.unique(dim=0)) == tokens


@pytest.mark.parametrize(("scale", "offset"), [(1.0, 0.0), (0.05, 0.0), (3.0, 5.0)])
def test_random_routers_keep_the_wanted_share_on_average(scale: float, offset: float) -> None:
    """Whatever the norm and the mean of the hidden states."""
    ffns = trained_pair().sparse_ffns
    x = scale * torch.randn(8000, HIDDEN) + offset * torch.randn(HIDDEN)

    def run() -> None:
        for ffn in ffns:
            ffn(x[:4000])

    for sparsity in (0.2, 0.5, 0.9):
        force_random_(ffns, sparsity, run)
        found = masks(ffns, x[4000:])
        assert use_of(found).sparsity == pytest.approx(sparsity, abs=0.03)
        # Each expert is off for about that share of the tokens.
        assert torch.stack(found).float().mean(1).sub(1 - sparsity).abs().max() < 0.1
        assert not ffns[0]._forward_pre_hooks
    for sparsity in (0.0, 1.0):
        force_random_(ffns, sparsity, run)
        assert use_of(masks(ffns, x[4000:])).sparsity == sparsity


def test_random_routers_keep_the_share_of_the_steps_that_count() -> None:
    """Tokens unlike those of the text, in several calls."""
    ffns = trained_pair().sparse_ffns
    text, later = torch.randn(2000, HIDDEN), 0.3 * torch.randn(5, 400, HIDDEN) + 1

    def steps() -> None:
        for x in later:
            for ffn in ffns:
                ffn(x)

    force_random_(ffns, 0.8, lambda: [ffn(text) for ffn in ffns])
    assert abs(use_of(masks(ffns, later[0])).sparsity - 0.8) > 0.05
    force_random_(ffns, 0.8, lambda: [ffn(text) for ffn in ffns], steps)
    assert use_of(masks(ffns, later.flatten(0, 1))).sparsity == pytest.approx(0.8, abs=0.005)


def test_layers_expect_what_is_forced_where_it_matters(monkeypatch: pytest.MonkeyPatch) -> None:
    pair = trained_pair()
    own = RouterValues(pair.sparse_ffns)
    monkeypatch.setattr(dispatch, "cpu_kernel_wins", lambda dtype, tokens, fraction: fraction < 0.5)
    monkeypatch.setattr(dispatch, "HAS_NUMBA", True)
    assert path_names(pair.sparse_ffns, 1) == "masked"
    expect_(pair.sparse_ffns, 0.75, 1)  # the same path: nothing to compile anew
    assert {use_of_layer(ffn) for ffn in pair.sparse_ffns} == {None}
    expect_(pair.sparse_ffns, 0.25, 1)
    assert {use_of_layer(ffn) for ffn in pair.sparse_ffns} == {ExpectedUse(0.25)}
    assert path_names(pair.sparse_ffns, 1) == "numba"
    assert path_names(pair.sparse_ffns, 17) == "masked"
    own.restore_()
    assert {use_of_layer(ffn) for ffn in pair.sparse_ffns} == {None}


def test_forcing_reaches_the_rows_that_the_kernels_read() -> None:
    pair = trained_pair()
    TokenPatterns(3, HIDDEN, torch.float32, torch.device("cpu")).force_(pair.sparse_ffns, 0.5)
    for ffn in pair.sparse_ffns:
        assert (ffn.router_rows == ffn.router.weight).all()


def test_router_values_come_back() -> None:
    pair = trained_pair()
    before = [p.clone() for ffn in pair.sparse_ffns for p in ffn.router.parameters()]
    with RouterValues(pair.sparse_ffns).kept():
        force_same_(pair.sparse_ffns, 0.5)
    after = [p for ffn in pair.sparse_ffns for p in ffn.router.parameters()]
    assert all((a == b).all() for a, b in zip(before, after, strict=True))
    assert all((ffn.router_rows == ffn.router.weight).all() for ffn in pair.sparse_ffns)


def test_a_low_rank_router_cannot_tell_tokens_apart() -> None:
    model = lte.sparsify_(tiny_dense_model(), lte.LteConfig(expert_size=8, router_rank=2))
    ffns = list(lte.sparse_ffns(model).values())
    with pytest.raises(ValueError, match="routing must be 'same' for a low-rank router, got routing='different'"):
        TokenPatterns(3, HIDDEN, torch.float32, torch.device("cpu")).force_(ffns, 0.5)
    force_same_(ffns, 0.5)
    assert all(mask.sum(1).tolist() == [4] * 5 for mask in masks(ffns, torch.randn(5, HIDDEN)))


def test_use_is_counted_on_the_tokens_of_a_pass(tokens: Tensor) -> None:
    model = tiny_sparse_model()
    ffns = list(lte.sparse_ffns(model).values())
    force_same_(ffns, 0.75)
    use = measure_use(ffns, lambda: model(input_ids=tokens))
    assert (use.active, use.union, use.sparsity) == (0.25, 0.25, 0.75)


def test_use_by_hand() -> None:
    layers = [torch.tensor([[1, 0, 0, 0], [0, 1, 0, 0]]).bool(), torch.tensor([[1, 1, 0, 0], [1, 1, 0, 0]]).bool()]
    use = use_of(layers)
    assert use.active == pytest.approx((0.25 + 0.5) / 2)
    assert use.union == pytest.approx(0.5)
