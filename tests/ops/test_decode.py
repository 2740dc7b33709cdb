"""The decode kernels against the reference, in Triton's interpreter where there is no GPU."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
import triton
from torch import Tensor

from lte.ops import decode, launch
from lte.ops.activations import ACTIVATIONS
from lte.ops.arguments import FfnWeights, Routing
from lte.ops.decode import sparse_ffn_decode
from lte.ops.launch import ManyTokenTiles, OneTokenTiles
from lte.ops.reference import sparse_ffn_reference
from lte.ops.workspace import workspace
from tests.ops.conftest import DEVICE, finer_router, masks, opposed_states, random_ffn, random_router

Check = Callable[..., Tensor]
TOKENS = (1, 2, 7, 16)
HALF = (torch.float16, torch.bfloat16)


def states(tokens: int, hidden: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(tokens, hidden, device=DEVICE).to(dtype)


@pytest.mark.parametrize("activity", ["none", "one", "some", "all", "different"])
@pytest.mark.parametrize("hidden", [64, 100, 768])
@pytest.mark.parametrize("tokens", TOKENS)
def test_equals_the_reference(tokens: int, hidden: int, activity: str, assert_matches: Check) -> None:
    output = assert_matches(states(tokens, hidden), random_ffn(hidden, 5), Routing.forced(masks(tokens, 5)[activity]))
    if activity == "none":
        assert not output.any()


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("activity", ["one", "all", "different"])
@pytest.mark.parametrize("tokens", TOKENS)
def test_equals_the_reference_in_half_precision(
    tokens: int, activity: str, dtype: torch.dtype, assert_matches: Check
) -> None:
    routing = Routing.forced(masks(tokens, 5)[activity])
    assert_matches(states(tokens, 100, dtype), random_ffn(100, 5, dtype=dtype), routing)


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize("tokens", [1, 7])
def test_routers(tokens: int, dtype: torch.dtype, assert_matches: Check) -> None:
    x, weights = states(tokens, 300, dtype), random_ffn(300, 19, 8, dtype=dtype)
    for router_dtype in (torch.float32, dtype):
        routing = random_router(x, 19, 0.6, router_dtype)
        assert_matches(x, weights, routing)
        assert_matches(x, weights, replace(routing, bias=None))


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("tokens", [1, 7, 16])
def test_a_finer_router_counts_as_rounded(tokens: int, dtype: torch.dtype, assert_matches: Check) -> None:
    x = opposed_states(tokens, 100, dtype)
    routing = finer_router(x, 5)
    assert not assert_matches(x, random_ffn(100, 5, dtype=dtype), routing).any()
    unrounded = replace(routing, rounded=None)
    assert assert_matches(x, random_ffn(100, 5, dtype=dtype), unrounded).any()


@pytest.mark.parametrize("tokens", [1, 16])
def test_the_threshold_is_strict(tokens: int, assert_matches: Check) -> None:
    logits = torch.tensor([-1.0, 0.5, 0.5000001, 2.0], device=DEVICE).repeat(tokens, 1)
    x, weights = states(tokens, 64), random_ffn(64, 4)
    output = assert_matches(x, weights, Routing(logits=logits, threshold=0.5))
    mask = torch.tensor([False, False, True, True], device=DEVICE).repeat(tokens, 1)
    torch.testing.assert_close(output, sparse_ffn_decode(x, weights, Routing.forced(mask), "silu"))


def test_a_logit_that_is_not_a_number_switches_off(assert_matches: Check) -> None:
    logits = torch.full((1, 4), torch.nan, device=DEVICE)
    assert not assert_matches(states(1, 64), random_ffn(64, 4), Routing(logits=logits)).any()


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("tokens", [1, 3])
def test_activations_and_biases(tokens: int, gated: bool, activation: str, assert_matches: Check) -> None:
    weights = random_ffn(100, 4, gated=gated, biases=True)
    assert_matches(states(tokens, 100), weights, Routing.forced(masks(tokens, 4)["different"]), activation)


@pytest.mark.parametrize("size", [8, 16, 32, 64])
@pytest.mark.parametrize("tokens", [1, 5])
def test_expert_sizes(tokens: int, size: int, assert_matches: Check) -> None:
    routing = Routing.forced(masks(tokens, 7)["different"])
    assert_matches(states(tokens, 96), random_ffn(96, 7, size), routing)
    assert_matches(states(tokens, 96), random_ffn(96, 1, size), Routing.forced(masks(tokens, 1)["all"]))


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("tokens", [1, 4])
def test_int8_weights_with_a_scale_per_neuron(tokens: int, dtype: torch.dtype, assert_matches: Check) -> None:
    weights = random_ffn(128, 5, dtype=dtype, biases=True, int8=True)
    assert_matches(states(tokens, 128, dtype), weights, Routing.forced(masks(tokens, 5)["different"]))


@pytest.mark.parametrize("tokens", [1, 7])
def test_views_of_a_fused_projection_and_strided_states(tokens: int, assert_matches: Check) -> None:
    plain = random_ffn(65, 4)
    assert plain.gate is not None
    fused = torch.cat([plain.gate, plain.up])
    gate, up = fused.chunk(2)
    x = states(tokens, 131)[:, 1::2]
    assert not x.is_contiguous() or tokens == 1
    assert_matches(x, replace(plain, gate=gate, up=up), random_router(x, 4, 0.5))


@pytest.mark.parametrize("tokens", [2, 7, 16])
def test_each_token_gets_what_it_gets_alone(
    tokens: int, assert_matches: Check, relative_rms: Callable[[Tensor, Tensor], float]
) -> None:
    x, weights = states(tokens, 100), random_ffn(100, 6)
    routing = random_router(x, 6, 0.6)
    together = assert_matches(x, weights, routing)
    for token, output in zip(x.split(1), together.split(1), strict=True):
        assert relative_rms(sparse_ffn_decode(token, weights, routing, "silu"), output) <= 1e-5


@pytest.mark.parametrize("tokens", [1, 9])
def test_experts_that_are_off_are_not_read(tokens: int, assert_matches: Check) -> None:
    mask = masks(tokens, 6)["some"]
    clean = random_ffn(64, 6)
    routing = Routing.forced(mask)
    expected = assert_matches(states(tokens, 64) * 0 + 1, clean, routing)
    off = ~mask[0].repeat_interleave(32)
    for weight in (clean.up, clean.gate, clean.down):
        assert weight is not None
        weight[off] = torch.nan
    assert torch.equal(sparse_ffn_decode(torch.ones(tokens, 64, device=DEVICE), clean, routing, "silu"), expected)


@pytest.mark.parametrize("programs", [1, 2, 50])
@pytest.mark.parametrize("tokens", [1, 3])
def test_more_and_fewer_programs_than_work(
    tokens: int, programs: int, poisoned: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decode, "multiprocessors", lambda device: programs)
    x, weights = states(tokens, 100), random_ffn(100, 5)
    one = OneTokenTiles(block_n=8)
    many = ManyTokenTiles(block_d=32, block_n=32, block_k=64)
    for routing in map(Routing.forced, masks(tokens, 5).values()):
        output = decode.run_decode(x, weights, routing, "silu", one if tokens == 1 else many)
        torch.testing.assert_close(output, sparse_ffn_reference(x, weights, routing, "silu"))


@pytest.fixture
def in_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the interpreter every address that a launch reads lies in a tensor that it was given."""
    if not launch.interpreted():
        return
    builder, run = triton.runtime.interpreter.InterpreterBuilder, decode.DecodeLaunch.run
    load, ranges = builder.create_masked_load, list[tuple[int, int]]()

    def checked_run(self: Any, x: Tensor, buffers: Any, *args: Any, **kwargs: Any) -> None:
        space = buffers.workspace
        given = [*self._given, x, buffers.out, buffers.partial, buffers.h, space.counters, space.masks]
        ranges[:] = [(each.data_ptr(), each.data_ptr() + each.nbytes) for each in given if each is not None]
        run(self, x, buffers, *args, **kwargs)

    def checked_load(self: Any, pointers: Any, mask: Any, *args: Any) -> Any:
        addresses = np.asarray(pointers.data)[np.broadcast_to(np.asarray(mask.data, dtype=bool), pointers.data.shape)]
        inside = np.zeros(addresses.shape, dtype=bool)
        for begin, end in ranges:
            inside |= (addresses >= begin) & (addresses < end)
        assert inside.all()
        return load(self, pointers, mask, *args)

    monkeypatch.setattr(builder, "create_masked_load", checked_load)
    monkeypatch.setattr(decode.DecodeLaunch, "run", checked_run)


@pytest.mark.parametrize("kind", ["gated", "plain", "int8", "bfloat16"])
@pytest.mark.parametrize(("programs", "share", "size"), [(1, 1, 8), (3, 8, 16), (6, 1, 32), (6, 4, 64), (13, 1, 16)])
def test_blocks_that_span_experts(
    programs: int, share: int, size: int, kind: str, poisoned: None, in_bounds: None, monkeypatch: pytest.MonkeyPatch,
    relative_rms: Callable[[Tensor, Tensor], float],
) -> None:  # fmt: skip
    monkeypatch.setattr(decode, "multiprocessors", lambda device: programs)
    dtype = torch.float32 if kind in ("gated", "plain") else torch.bfloat16
    x = states(5, 100, dtype)
    tiles = ManyTokenTiles(block_d=32, block_n=min(32, size), block_k=64, share=share, span=True)
    weights = random_ffn(100, 11, size, dtype=dtype, gated=kind != "plain", biases=True, int8=kind == "int8")
    for routing in map(Routing.forced, masks(5, 11).values()):
        output = decode.run_decode(x, weights, routing, "silu", tiles)
        expected = sparse_ffn_reference(x, weights, routing, "silu")
        assert relative_rms(output, expected) <= (1e-5 if dtype == torch.float32 else 1e-2)


class CompilingKernel:
    """Stands in for a kernel: like Triton's, it gives back what it compiled, which takes all arguments by position."""

    arg_names: ClassVar[list[str]] = decode.decode_one_kernel.arg_names

    def __init__(self) -> None:
        self.compiled: list[dict[str, Any]] = []
        self.launched: list[list[Any]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Any]:
        def compile_and_launch(*args: Any, **constants: Any) -> Any:
            self.compiled.append({**dict(zip(self.arg_names, args, strict=False)), **constants})
            return {(*grid, 1, 1): lambda *given: self.launched.append(list(given))}

        return compile_and_launch


def test_a_kernel_is_compiled_once_and_then_launched_at_once() -> None:
    weights, routing = random_ffn(64, 4), Routing.forced(masks(1, 4)["some"])
    ffn = decode.DecodeLaunch(states(1, 64), weights, routing, "silu")
    ffn._kernel = kernel = CompilingKernel()
    for x in (states(1, 64), states(1, 64)):
        ffn.run(x, ffn.buffers(x))
    (compiled,), (launched,) = kernel.compiled, kernel.launched
    assert compiled["launch_cooperative_grid"]
    named = dict(zip(kernel.arg_names, launched, strict=True))
    assert named["x"] is x
    assert named["up"] is weights.up
    for name, value in named.items():
        if not isinstance(value, Tensor):
            assert value == compiled[name], name
    misaligned = torch.zeros(65, device=x.device)[1:].view(1, 64)
    ffn.run(misaligned, ffn.buffers(misaligned))
    ffn.run(x, ffn.buffers(x), 0, 0)
    assert len(kernel.compiled) == 3
    assert len(kernel.launched) == 1


def test_the_counters_are_zero_again(poisoned: None) -> None:
    x, weights = states(3, 100), random_ffn(100, 5)
    for _ in range(2):
        decode.run_decode(x, weights, Routing.forced(masks(3, 5)["some"]), "silu")
        counters = workspace(x.device).counters.clone()
        counters[2] = 0
        assert not counters.any()


@pytest.mark.parametrize("case", range(12))
def test_random_shapes(case: int, assert_matches: Check) -> None:
    seed = random.SystemRandom().randrange(2**31)
    draw = random.Random(seed)
    torch.manual_seed(seed)
    tokens, hidden, experts = draw.randint(1, 16), draw.randint(1, 300), draw.randint(1, 20)
    dtype = draw.choice([torch.float32, *HALF])
    gated, biases, size = draw.random() < 0.5, draw.random() < 0.5, draw.choice([8, 16, 32])
    x = states(tokens, hidden, dtype)
    weights = random_ffn(hidden, experts, size, dtype=dtype, gated=gated, biases=biases, int8=draw.random() < 0.2)
    routing = Routing.forced(masks(tokens, experts)["different"])
    if experts * tokens > 8 and draw.random() < 0.7:
        routing = random_router(x, experts, draw.random())
    note = f"seed={seed} {tokens=} {hidden=} {experts=} {size=} {dtype=} {gated=} {biases=}"
    assert_matches(x, weights, routing, draw.choice(list(ACTIVATIONS)), note)


def test_the_operation_is_well_formed() -> None:
    x = states(2, 64)
    for weights in (random_ffn(64, 4), random_ffn(64, 4, gated=False, biases=True)):
        routing = random_router(x, 4, 0.5)
        args = (x, weights.flat(), routing.flat(), routing.threshold, "silu")
        torch.library.opcheck(decode._decode_op, args)


def test_compiles_without_a_graph_break() -> None:
    x, weights = states(1, 64), random_ffn(64, 4)
    weight = torch.randn(4, 64, device=DEVICE)

    def layer(x: Tensor) -> Tensor:
        return sparse_ffn_decode(2 * x, weights, Routing(weight=weight), "silu") + x

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), layer(x))


def wrong(message: str, x: Tensor, weights: FfnWeights, routing: Routing, activation: str = "silu") -> None:
    with pytest.raises(ValueError, match=message):
        sparse_ffn_decode(x, weights, routing, activation)


def test_wrong_arguments_are_named() -> None:
    x, weights = states(2, 64), random_ffn(64, 4)
    routing = Routing(weight=torch.randn(4, 64, device=DEVICE))
    wrong(r"1 to 16 tokens, got x=\[17, 64\]", states(17, 64), weights, routing)
    wrong(r"x must have shape \[tokens, hidden\]", states(1, 64)[0], weights, routing)
    wrong("x must be float32, float16 or bfloat16, got x=torch.float64", x.double(), weights, routing)
    wrong("up must be torch.float16, the dtype of x, got up=torch.float32", x.half(), weights, routing)
    wrong(r"down must have shape \[128, 64\], got down=\[64, 128\]", x, replace(weights, down=weights.down.T), routing)
    transposed = torch.randn(64, 128, device=DEVICE).T
    wrong("down must be contiguous", x, replace(weights, down=transposed), routing)
    wrong(r"bias must have shape \[4\]", x, weights, replace(routing, bias=torch.zeros(5, device=DEVICE)))
    wrong(r"logits must have shape \[2, 4\]", x, weights, Routing(logits=torch.zeros(3, 4, device=DEVICE)))
    wrong("neurons / experts must be one of 8, 16, 32, 64, got 128 / 1", x, weights, Routing.forced(x[:, :1] > 9))
    wrong("neurons / experts must be one of", x, random_ffn(64, 4, 24), routing)
    wrong("activation must be one of .*did you mean silu", x, weights, routing, "silo")
    wrong("routing must hold weight or logits", x, weights, Routing())
    scale = torch.ones(128, device=DEVICE)
    wrong("up must be torch.int8, as it has a scale", x, replace(weights, up_scale=scale), routing)


def test_a_tensor_on_another_device_is_named() -> None:
    x, weights = states(2, 64), random_ffn(64, 4)
    meta = replace(weights, gate=torch.empty(128, 64, device="meta"))
    with pytest.raises(ValueError, match=r"gate must be on the device of x .*, got gate=meta"):
        decode.check_arguments(x, meta, Routing.forced(masks(2, 4)["all"]), "silu")


def test_a_cpu_without_the_interpreter_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "interpreted", lambda: False)
    with pytest.raises(ValueError, match="x must be on a CUDA device, got x=cpu"):
        launch.check_device(torch.zeros(1, 64))
