"""Many tokens: both paths against the reference, in Triton's interpreter where there is no GPU."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from lte.ops import prefill, prefill_launch
from lte.ops.activations import ACTIVATIONS
from lte.ops.arguments import FfnWeights, Routing
from lte.ops.decode import sparse_ffn_decode
from lte.ops.layout import stack_inputs
from lte.ops.prefill import sparse_ffn_prefill
from lte.ops.prefill_launch import ActivationTiles, GroupedTiles, SkinnyTiles
from lte.ops.reference import sparse_ffn_reference
from tests.ops.conftest import BOUNDS, DEVICE, finer_router, masks, opposed_states, random_ffn, random_router

Check = Callable[..., Tensor]
HALF = (torch.float16, torch.bfloat16)
PATHS = ("masked", "grouped")


@pytest.fixture(params=PATHS)
def path(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def assert_equal(path: str, poisoned: None, relative_rms: Callable[[Tensor, Tensor], float]) -> Check:
    """Compares one path with the reference; returns the output."""

    def check(x: Tensor, weights: FfnWeights, routing: Routing, activation: str = "silu", note: Any = "") -> Tensor:
        actual = sparse_ffn_prefill(x, weights, routing, activation, path)  # type: ignore[arg-type]
        expected = sparse_ffn_reference(x, weights, routing, activation)
        assert actual.dtype == x.dtype
        assert relative_rms(actual, expected) <= BOUNDS[x.dtype], note
        return actual

    return check


def states(tokens: int, hidden: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(tokens, hidden, device=DEVICE).to(dtype)


def stack(weights: FfnWeights, routing: Routing, with_router: bool = True) -> tuple[FfnWeights, Routing]:
    """The same FFN with its inputs in one tensor."""
    inputs = stack_inputs(weights.up, weights.gate, routing.weight if with_router else None)
    inputs.stacked[len(weights.up) * (1 if weights.gate is None else 2) + routing.num_experts :] = torch.nan
    stacked = replace(weights, up=inputs.up, gate=inputs.gate, stacked=inputs.stacked)
    return stacked, replace(routing, weight=inputs.router) if with_router and routing.weight is not None else routing


@pytest.mark.parametrize("activity", ["none", "one", "some", "all", "different"])
@pytest.mark.parametrize("hidden", [64, 100])
@pytest.mark.parametrize("tokens", [1, 2, 7, 33, 70])
def test_equals_the_reference(tokens: int, hidden: int, activity: str, assert_equal: Check) -> None:
    output = assert_equal(states(tokens, hidden), random_ffn(hidden, 5), Routing.forced(masks(tokens, 5)[activity]))
    if activity == "none":
        assert not output.any()


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("activity", ["one", "all", "different"])
def test_equals_the_reference_in_half_precision(activity: str, dtype: torch.dtype, assert_equal: Check) -> None:
    routing = Routing.forced(masks(33, 5)[activity])
    assert_equal(states(33, 100, dtype), random_ffn(100, 5, dtype=dtype), routing)


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
def test_one_product_for_gate_up_and_router(dtype: torch.dtype, gated: bool, assert_equal: Check) -> None:
    x, weights = states(19, 96, dtype), random_ffn(96, 7, 16, dtype=dtype, gated=gated, biases=True)
    routing = random_router(x, 7, 0.6, dtype)
    expected = assert_equal(x, weights, routing)
    for with_router in (True, False):
        stacked, same_routing = stack(weights, routing, with_router)
        torch.testing.assert_close(assert_equal(x, stacked, same_routing), expected)
    forced = Routing.forced(masks(19, 7)["different"])
    assert_equal(x, stack(weights, routing)[0], forced)


def project(x: Tensor, weights: FfnWeights, routing: Routing) -> tuple[Tensor | None, Tensor, Tensor]:
    return prefill.MaskedLaunch(x, weights, routing, "silu").project(x)


@pytest.mark.parametrize("gated", [True, False])
def test_stacked_weights_are_used_only_as_long_as_they_are_the_weights(gated: bool) -> None:
    x = states(3, 64)
    stacked, routing = stack(random_ffn(64, 4, gated=gated), random_router(x, 4, 0.5))
    _, up, logits = project(x, stacked, routing)
    assert up.stride(0) == logits.stride(0) == len(stacked.stacked)  # type: ignore[arg-type]
    for name in ("up", *(["gate"] * gated)):
        copy = replace(stacked, **{name: getattr(stacked, name) + 1})
        gate, up, logits = project(x, copy, routing)
        torch.testing.assert_close(up, x @ copy.up.T)
        assert not gated or torch.allclose(gate, x @ copy.gate.T, atol=1e-5)  # type: ignore[arg-type,union-attr]
    copied_router = replace(routing, weight=routing.weight + 1)  # type: ignore[operator]
    torch.testing.assert_close(project(x, stacked, copied_router)[2], x @ copied_router.weight.T)


SKINNY = (
    SkinnyTiles(block_n=32, stages=3),
    SkinnyTiles(block_k=128, x_first=True),
    SkinnyTiles(block_n=128, per_sm=2),
    SkinnyTiles(block_n=16, block_k=32, per_sm=1, x_first=True),
)


@pytest.fixture
def skinny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products of all shapes go to `skinny_product_kernel`."""
    monkeypatch.setattr(prefill, "skinny_tiles", lambda x, weight: SKINNY[2])


@pytest.mark.parametrize("tiles", SKINNY)
@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize("tokens", [1, 17, 32, 33, 48, 64, 128])
def test_skinny_product(
    tokens: int, dtype: torch.dtype, tiles: SkinnyTiles, poisoned: None, relative_rms: Callable[[Tensor, Tensor], float]
) -> None:
    if dtype == torch.float32:
        tiles = replace(tiles, stages=2)  # tables have 16-bit tiles alone: others take twice the shared memory
    seed = random.SystemRandom().randrange(2**31)
    draw = random.Random(seed)
    torch.manual_seed(seed)
    rows, hidden = draw.randint(1, 500), draw.choice([64, 100, 192, draw.randint(1, 300)])
    x, weight = states(tokens, hidden, dtype), states(rows, hidden, dtype) * hidden**-0.5
    actual = prefill.SkinnyProduct(x, weight, tiles)(x, weight)
    assert (actual.shape, actual.dtype) == ((tokens, rows), dtype)
    assert relative_rms(actual, x.double() @ weight.double().T) <= BOUNDS[dtype], f"{seed=} {rows=} {hidden=}"
    assert torch.equal(prefill.SkinnyProduct(x, weight, tiles)(x, weight), actual)


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("dtype", HALF)
def test_masked_path_with_skinny_products(
    dtype: torch.dtype, gated: bool, skinny: None, poisoned: None, relative_rms: Callable[[Tensor, Tensor], float]
) -> None:
    for tokens, hidden in ((17, 96), (33, 100), (64, 300)):
        x, weights = states(tokens, hidden, dtype), random_ffn(hidden, 7, dtype=dtype, gated=gated, biases=True)
        routing = random_router(x, 7, 0.6, dtype)
        expected = sparse_ffn_reference(x, weights, routing, "silu")
        for with_router in (True, False):
            output = sparse_ffn_prefill(x, *stack(weights, routing, with_router), "silu", "masked")
            assert relative_rms(output, expected) <= BOUNDS[dtype]


def test_the_operation_with_skinny_products_is_well_formed(skinny: None) -> None:
    x = states(20, 64, torch.float16)
    weights, routing = stack(random_ffn(64, 4, dtype=x.dtype), random_router(x, 4, 0.5, x.dtype))
    args = (x, weights.flat(), routing.flat(), routing.threshold, "silu", "masked")
    torch.library.opcheck(prefill._prefill_op, args)


def test_skinny_products_are_taken_only_where_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefill_launch, "architecture", lambda device: 90)
    monkeypatch.setattr(prefill_launch, "_SKINNY", {(90, 2): ((16, None), (64, SKINNY[0]), (2**31, None))})

    def tiles(tokens: int, rows: int = 22400, hidden: int = 4096, dtype: torch.dtype = HALF[0]) -> SkinnyTiles | None:
        x = torch.empty(tokens, hidden, dtype=dtype, device="meta")
        return prefill_launch.skinny_tiles(x, torch.empty(rows, hidden, dtype=dtype, device="meta"))

    assert [tokens for tokens in (1, 16, 17, 33, 64, 65, 4096) if tiles(tokens)] == [17, 33, 64]
    assert not tiles(32, rows=1000)
    assert not tiles(32, hidden=100)
    assert not tiles(32, dtype=torch.float32)
    for arch in (80, 100):
        monkeypatch.setattr(prefill_launch, "architecture", lambda device, arch=arch: arch)
        assert not tiles(32)


@pytest.mark.parametrize(("per_sm", "rows", "expected"), [(0, 22400, 128), (2, 22400, 88), (2, 58240, 112), (1, 8, 8)])
def test_rows_of_a_skinny_product_are_shared_equally(per_sm: int, rows: int, expected: int) -> None:
    assert prefill_launch.skinny_rows(SkinnyTiles(block_n=128, per_sm=per_sm), rows, 132) == expected


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
def test_routers(dtype: torch.dtype, assert_equal: Check) -> None:
    x, weights = states(9, 300, dtype), random_ffn(300, 19, 8, dtype=dtype)
    for router_dtype in (torch.float32, dtype):
        routing = random_router(x, 19, 0.6, router_dtype)
        assert_equal(x, weights, routing)
        assert_equal(x, weights, replace(routing, bias=None))


@pytest.mark.parametrize("dtype", HALF)
def test_a_finer_router_counts_as_rounded(dtype: torch.dtype, assert_equal: Check) -> None:
    x = opposed_states(9, 100, dtype)
    routing = finer_router(x, 5)
    assert not assert_equal(x, random_ffn(100, 5, dtype=dtype), routing).any()
    unrounded = replace(routing, rounded=None)
    assert assert_equal(x, random_ffn(100, 5, dtype=dtype), unrounded).any()


def test_the_threshold_is_strict_and_not_a_number_is_off(assert_equal: Check) -> None:
    logits = torch.tensor([0.5, 0.5000001, torch.nan, 2.0], device=DEVICE).repeat(3, 1)
    x, weights = states(3, 64), random_ffn(64, 4)
    output = assert_equal(x, weights, Routing(logits=logits, threshold=0.5))
    mask = torch.tensor([False, True, False, True], device=DEVICE).repeat(3, 1)
    torch.testing.assert_close(output, assert_equal(x, weights, Routing.forced(mask)))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("gated", [True, False])
def test_activations_and_biases(gated: bool, activation: str, assert_equal: Check) -> None:
    weights = random_ffn(100, 4, gated=gated, biases=True)
    assert_equal(states(20, 100), weights, Routing.forced(masks(20, 4)["different"]), activation)


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("size", [8, 16, 32, 64])
def test_expert_sizes(size: int, gated: bool, assert_equal: Check) -> None:
    weights = random_ffn(96, 7, size, gated=gated)
    assert_equal(states(21, 96), weights, Routing.forced(masks(21, 7)["different"]))
    assert_equal(states(21, 96), random_ffn(96, 1, size, gated=gated), Routing.forced(masks(21, 1)["all"]))


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("dtype", HALF)
def test_int8_weights_with_a_scale_per_neuron(dtype: torch.dtype, gated: bool, assert_equal: Check) -> None:
    weights = random_ffn(128, 5, dtype=dtype, biases=True, int8=True, gated=gated)
    assert_equal(states(18, 128, dtype), weights, Routing.forced(masks(18, 5)["different"]))


def test_strided_and_misaligned_states(assert_equal: Check) -> None:
    weights = random_ffn(65, 4)
    for x in (states(9, 131)[:, 1::2], states(9, 66)[:, 1:], states(65, 9).T):
        assert not x.is_contiguous()
        assert_equal(x, weights, random_router(x, 4, 0.5))


def test_each_token_gets_what_it_gets_alone(assert_equal: Check, relative_rms: Callable[..., float]) -> None:
    x, weights = states(17, 100), random_ffn(100, 6)
    routing = random_router(x, 6, 0.6)
    together = assert_equal(x, weights, routing)
    for token, output in zip(x.split(1), together.split(1), strict=True):
        assert relative_rms(sparse_ffn_decode(token, weights, routing, "silu"), output) <= 1e-5


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_an_inactive_expert_would_compute_does_not_matter(value: float, assert_equal: Check) -> None:
    mask = masks(20, 6)["some"]
    x, clean = torch.ones(20, 64, device=DEVICE), random_ffn(64, 6, biases=True)
    expected = assert_equal(x, clean, Routing.forced(mask))
    off = ~mask[0].repeat_interleave(32)
    # Not in `down`: zero times infinity in its dense product would be seen.
    for tensor in (clean.up, clean.gate, clean.up_bias, clean.gate_bias):
        assert tensor is not None
        tensor[off] = value
    assert torch.equal(assert_equal(x, clean, Routing.forced(mask)), expected)


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize(("block_t", "block_f"), [(1, 32), (4, 64), (16, 512)])
def test_tiles_of_the_masked_path(block_t: int, block_f: int, skip: bool, poisoned: None) -> None:
    x, weights = states(11, 64), random_ffn(64, 5, biases=True)
    tiles = ActivationTiles(block_t=block_t, block_f=block_f, skip=skip)
    for routing in map(Routing.forced, masks(11, 5).values()):
        output = prefill.run_masked(x, weights, routing, "silu", tiles)
        torch.testing.assert_close(output, sparse_ffn_reference(x, weights, routing, "silu"))


@pytest.mark.parametrize("programs", [1, 3, 200])
def test_more_and_fewer_programs_than_tiles(programs: int, poisoned: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefill, "multiprocessors", lambda device: programs)
    tiles = GroupedTiles(block_t=16, block_k=32, per_sm=1)
    x, weights = states(50, 70), random_ffn(70, 5)
    for routing in map(Routing.forced, masks(50, 5).values()):
        output = prefill.run_grouped(x, weights, routing, "silu", tiles)
        torch.testing.assert_close(output, sparse_ffn_reference(x, weights, routing, "silu"))


@pytest.mark.parametrize("tokens", [127, 128, 300])
def test_lists_of_more_tokens_than_one_program_writes(tokens: int, assert_equal: Check) -> None:
    mask = masks(tokens, 18)["different"]
    mask[:, 3], mask[:, 17] = True, False
    assert_equal(states(tokens, 32), random_ffn(32, 18, 8), Routing.forced(mask))


@pytest.mark.parametrize("core", [1, 3, 5])
@pytest.mark.parametrize("activity", ["none", "all", "different"])
@pytest.mark.parametrize("given", [True, False])
def test_the_core_is_as_logits_say(given: bool, activity: str, core: int, assert_equal: Check) -> None:
    x, weights = states(40, 64), random_ffn(64, 5, biases=True)
    routing = Routing.forced(masks(40, 5)[activity]) if given else random_router(x, 5, 0.4)
    output = assert_equal(x, weights, replace(routing, core=core))
    torch.testing.assert_close(output, assert_equal(x, weights, routing))


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize(("gated", "int8"), [(True, False), (False, False), (True, True)])
def test_the_core_in_other_dtypes(gated: bool, int8: bool, dtype: torch.dtype, assert_equal: Check) -> None:
    x = states(33, 96, dtype)
    weights = random_ffn(96, 7, 16, dtype=dtype, gated=gated, int8=int8)
    routing = replace(random_router(x, 7, 0.6, dtype), core=3)
    assert_equal(x, weights, routing)
    if not int8:
        assert_equal(x, *stack(weights, routing))


def test_experts_of_the_core_are_in_no_list() -> None:
    x, weights = states(40, 64), random_ffn(64, 5)
    routing = replace(Routing.forced(masks(40, 5)["all"]), core=2)
    launch = prefill.GroupedLaunch(x, weights, routing, "silu")
    _, counts = launch.zeros(x)
    launch.list_tokens(counts, launch.router_products(x))
    assert counts.flatten()[:5].tolist() == [0, 0, 40, 40, 40]


@pytest.mark.parametrize("case", range(12))
def test_random_shapes(case: int, assert_equal: Check) -> None:
    seed = random.SystemRandom().randrange(2**31)
    draw = random.Random(seed)
    torch.manual_seed(seed)
    tokens, hidden, experts = draw.randint(1, 70), draw.randint(1, 300), draw.randint(1, 20)
    # Neurons are rounded to 16 bits, no small share of the sums where those of few outputs nearly cancel.
    dtype = draw.choice([torch.float32, *HALF]) if hidden >= 16 else torch.float32
    gated, biases, size = draw.random() < 0.5, draw.random() < 0.5, draw.choice([8, 16, 32])
    x, int8 = states(tokens, hidden, dtype), draw.random() < 0.2
    weights = random_ffn(hidden, experts, size, dtype=dtype, gated=gated, biases=biases, int8=int8)
    routing = Routing.forced(masks(tokens, experts)["different"])
    if experts * tokens > 8 and draw.random() < 0.7:
        routing = random_router(x, experts, draw.random(), dtype)
        if not int8 and draw.random() < 0.5:
            weights, routing = stack(weights, routing)
    routing = replace(routing, core=draw.choice([0, draw.randint(0, experts)]))
    note = f"seed={seed} {tokens=} {hidden=} {experts=} {size=} {dtype=} {gated=} {biases=} {int8=} {routing.core=}"
    assert_equal(x, weights, routing, draw.choice(list(ACTIVATIONS)), note)


def test_the_operation_is_well_formed(path: str) -> None:
    x = states(20, 64)
    for weights in (random_ffn(64, 4), random_ffn(64, 4, gated=False, biases=True)):
        weights, routing = stack(weights, random_router(x, 4, 0.5))
        for core in (0, 2):
            args = (x, weights.flat(), routing.flat(), routing.threshold, "silu", path, core)
            torch.library.opcheck(prefill._prefill_op, args)


def test_compiles_without_a_graph_break(path: str) -> None:
    x = states(20, 64)
    weights, routing = stack(random_ffn(64, 4), random_router(x, 4, 0.5))

    def layer(x: Tensor) -> Tensor:
        return sparse_ffn_prefill(2 * x, weights, routing, "silu", path) + x  # type: ignore[arg-type]

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), layer(x))
    torch.testing.assert_close(compiled(x[:9]), layer(x[:9]))


def wrong(message: str, x: Tensor, weights: FfnWeights, routing: Routing, path: Any = "masked") -> None:
    with pytest.raises(ValueError, match=message):
        sparse_ffn_prefill(x, weights, routing, "silu", path)


def test_wrong_arguments_are_named() -> None:
    x, weights = states(40, 64), random_ffn(64, 4)
    routing = Routing(weight=torch.randn(4, 64, device=DEVICE))
    wrong("path must be one of masked, grouped, got path='maskd' .did you mean masked", x, weights, routing, "maskd")
    wrong(r"with 1 or more tokens, got x=\[0, 64\]", x[:0], weights, routing)
    wrong("x must be float32, float16 or bfloat16, got x=torch.float64", x.double(), weights, routing)
    wrong(r"down must have shape \[128, 64\]", x, replace(weights, down=weights.down.T), routing)
    for core in (-1, 5):
        wrong(
            rf"core must lie in \[0, 4\], the number of experts, got core={core}",
            x,
            weights,
            replace(routing, core=core),
        )


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
def test_a_captured_graph_follows_its_inputs(path: str, relative_rms: Callable[[Tensor, Tensor], float]) -> None:
    x = states(300, 256, torch.bfloat16)
    mask = masks(300, 12)["different"]
    weights, routing = random_ffn(256, 12, dtype=torch.bfloat16), replace(Routing.forced(mask), core=3)
    assert routing.logits is not None
    sparse_ffn_prefill(x, weights, routing, "silu", path)  # type: ignore[arg-type]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = sparse_ffn_prefill(x, weights, routing, "silu", path)  # type: ignore[arg-type]
    for activity in ("none", "all", "different", "one"):
        x.normal_()
        routing.logits.copy_(Routing.forced(masks(300, 12)[activity]).logits)
        graph.replay()
        assert relative_rms(output, sparse_ffn_reference(x, weights, routing, "silu")) <= BOUNDS[x.dtype]
