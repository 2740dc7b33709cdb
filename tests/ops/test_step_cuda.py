"""The CUDA kernel of a decoding step without a GPU: its source runs on the CPU, and NVRTC compiles it."""

from __future__ import annotations

import re
import shutil
import struct
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lte.ops.step import compile as compiling
from lte.ops.step import cuda
from lte.ops.step.compile import cached_cubin, compile_cubin, missing
from lte.ops.step.cuda import CudaEngine, FittingStep, Machine, macros, unfit_shapes
from lte.ops.step.plan import DecoderPlan, Quantized
from lte.ops.step.reference import ReferenceEngine, upcast
from tests.ops.step_emulator import Emulator
from tests.ops.step_plans import (
    FAMILIES,
    Shape,
    copied,
    new_caches,
    quantized,
    random_plan,
    several_caches,
    several_inputs,
    step_inputs,
    with_quantized,
)

STEPS = 14
# Shared memory of a block by compute capability, and multiprocessors of a GPU.
GPUS = {
    80: (166912, 108),
    86: (101376, 82),
    89: (101376, 128),
    90: (232448, 132),
    100: (232448, 148),
    120: (101376, 170),
}
# Qwen2.5-1.5B.
QWEN = Shape(layers=1, hidden=1536, heads=12, kv_heads=2, head_size=128, neurons=8960, experts=280, biases=True)

needs_nvrtc = pytest.mark.skipif(missing() is not None, reason=str(missing()))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    return tmp_path_factory.mktemp("kernels")


@pytest.fixture
def emulator(folder: Path, monkeypatch: pytest.MonkeyPatch, poisoned: None) -> Callable[..., Emulator]:
    """Machines of few blocks, among which also short texts are split."""
    monkeypatch.setattr(cuda, "SPLIT_KEYS", 4)
    return lambda blocks=5, threads=64: Emulator(blocks=blocks, threads=threads, shared_bytes=80000, folder=folder)


def assert_steps_match(
    machine: Machine,
    plan: DecoderPlan,
    batch: int,
    bound: float,
    relative_rms: Callable[[Tensor, Tensor], float],
    **extra: int,
) -> None:
    """All logits and caches of a text, of sequences that begin at different places."""
    starts, shift = torch.randint(0, 6, (batch,)).tolist(), int(torch.randint(0, 9, ()))
    caches = new_caches(plan, batch, STEPS + 6, shift)
    exact = upcast(plan)
    expected = [upcast(cache) for cache in copied(caches)]
    assert unfit_shapes(plan, caches, machine) is None
    step, reference = CudaEngine(plan, machine).bind(caches, **extra), ReferenceEngine(exact).bind(expected)
    for index in range(STEPS):
        inputs = step_inputs(plan, batch, index, starts)
        step.logits.fill_(torch.nan)
        assert relative_rms(step(*inputs), reference(*inputs)) <= bound
    for cache, other in zip(caches, expected, strict=True):
        for mine, theirs in ((cache.keys, other.keys), (cache.values, other.values)):
            assert torch.equal(mine.isnan(), theirs.isnan())
            assert relative_rms(mine.nan_to_num(), theirs.nan_to_num()) <= bound


def assert_several_match(
    machine: Machine,
    plan: DecoderPlan,
    tokens: int,
    bound: float,
    relative_rms: Callable[[Tensor, Tensor], float],
    alone: int = 0,
    *,
    shift: int = 5,
    fewer: bool = False,
    **extra: int,
) -> None:
    """Passes of several tokens of a text against the reference that reads them one after the other.

    The first pass begins an empty cache, the next take up to three tokens back, and later ones follow `alone` steps of
    one token. Of the last passes some tokens are none, in one all of them. With `fewer` one kernel computes a pass.
    """
    start, length = int(torch.randint(0, 4, ())), 8 * tokens + alone
    caches = several_caches(plan, tokens, start + length, shift)
    exact = upcast(plan)
    expected = [upcast(cache) for cache in copied(caches)]
    engine = CudaEngine(plan, machine)
    several = engine.bind(caches, tokens, fewer=fewer, **extra)
    kernels = several._steps if isinstance(several, FittingStep) else [several]
    assert (len(kernels) > 1) == fewer
    reference = ReferenceEngine(exact).bind(expected)
    single = engine.bind(caches) if alone else None
    index = 0
    some = (0, 0, 1), (0, 0, tokens - 1), (0, 0, tokens - 2), (0, 0, tokens)
    for singles, back, none in ((0, 0, 0), (0, min(tokens - 1, 3), 0), (0, 0, 0), (alone, 0, 0), (0, 1, 0), *some):
        for _ in range(singles):
            assert single is not None
            inputs = step_inputs(plan, 1, index, [start])
            assert relative_rms(single(*inputs), reference(*inputs)) <= bound
            index += 1
        index -= back
        inputs, known = several_inputs(plan, tokens, index, start), tokens - none
        inputs[2][known:] = inputs[1][known:] + 1
        several.logits.fill_(torch.nan)
        before = [kernel._masks.clone() for kernel in kernels]
        logits = several(*inputs)
        rows = list[Tensor]()
        for row in range(known):
            rows.append(reference(*(each[row : row + 1] for each in inputs)))
            if plan.layers[-1].router is not None and bound < 1e-4:
                assert torch.equal(several.active()[row], reference.active()[0])
        if plan.layers[-1].router is not None:
            ran = [kernel.batch for kernel, old in zip(kernels, before, strict=True) if (kernel._masks != old).any()]
            assert ran == [next(kernel.batch for kernel in kernels if kernel.batch >= known)]
            assert several.active().shape[0] == tokens
            assert not several.active()[max(known, 1) :].any()
        if rows:
            assert relative_rms(logits[:known], torch.cat(rows)) <= bound, index
        index += known
    for cache, other in zip(caches, expected, strict=True):
        for mine, theirs in ((cache.keys, other.keys), (cache.values, other.values)):
            assert torch.equal(mine.isnan(), theirs.isnan())
            assert relative_rms(mine.nan_to_num(), theirs.nan_to_num()) <= bound


@pytest.mark.parametrize("family", ["qwen2", "mistral", "gemma2", "gemma3", "dense"])
def test_several_tokens_of_one_sequence(
    family: str, emulator: Callable[..., Emulator], relative_rms: Callable[[Tensor, Tensor], float]
) -> None:
    index = list(FAMILIES).index(family)
    torch.manual_seed(index)
    plan, tokens = random_plan(FAMILIES[family], torch.float32), (5, 8, 2)[index % 3]
    extra = {"BULK": index % 2, "EVERY_LANE": int(index % 3 == 0)}
    # Many blocks split what each token sees, few have several tokens each.
    machine = emulator(blocks=(24, 5)[index % 4 > 1], threads=64 if tokens < 5 else 128)
    alone = 12 * (family == "gemma3")
    assert_several_match(machine, plan, tokens, 1e-5, relative_rms, alone, shift=3 * (index % 2), **extra)


@pytest.mark.parametrize("family", ["qwen2", "mistral", "gemma2", "gemma3", "dense"])
def test_passes_of_fewer_tokens_than_there_is_room_for(
    family: str,
    emulator: Callable[..., Emulator],
    relative_rms: Callable[[Tensor, Tensor], float],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    index = list(FAMILIES).index(family)
    torch.manual_seed(index)
    plan, tokens = random_plan(FAMILIES[family], torch.float32), (3, 8, 2)[index % 3]
    machine = emulator(blocks=(24, 5)[index % 4 > 1], threads=64 if tokens < 5 else 128)
    used = list[int]()
    load = Emulator.load
    monkeypatch.setattr(Emulator, "load", lambda self, macros: used.append(macros["RINGS"]) or load(self, macros))
    shift = 3 * (family == "dense")
    assert_several_match(machine, plan, tokens, 1e-5, relative_rms, shift=shift, fewer=True, BULK=index % 2)
    # Caches of windows begin anew at their end, and those in which a text lies behind other tokens may.
    assert {*used} == {int(shift > 0 or any(layer.window for layer in plan.layers))}


def test_a_wrong_pass_launches_nothing(emulator: Callable[..., Emulator]) -> None:
    plan = random_plan(Shape(layers=1), torch.float32)
    caches = several_caches(plan, 4, 8)
    step, inputs = CudaEngine(plan, emulator()).bind(caches, 4, fewer=True), several_inputs(plan, 4, 0, 0)
    before = copied(caches)
    with pytest.raises(ValueError, match=r"positions must be int64 \[4\] .* got positions=.* \[3\]"):
        step(inputs[0], inputs[1][:3], inputs[2])
    for cache, other in zip(caches, before, strict=True):
        assert torch.equal(cache.keys.nan_to_num(), other.keys.nan_to_num())
    # Neither do inputs with gaps between them.
    gaps = [torch.stack((each, each + 1), 1)[:, 0] for each in inputs]
    assert torch.equal(step(*gaps).clone(), step(*inputs))


@pytest.mark.parametrize("bits", [0, 4])
def test_several_tokens_in_16_bits(
    bits: int, emulator: Callable[..., Emulator], relative_rms: Callable[[Tensor, Tensor], float]
) -> None:
    torch.manual_seed(bits)
    plan = with_forced_experts(random_plan(Shape(hidden=96, heads=6, biases=True, head_norms=True), torch.float16))
    plan = with_quantized(plan, bits, bits, bits) if bits else plan
    assert_several_match(emulator(), plan, 3, 1e-3, relative_rms)


@pytest.mark.parametrize("blocks", [2, 24])
def test_a_sequence_without_a_token_neither_stops_nor_changes_the_others(
    blocks: int, emulator: Callable[..., Emulator]
) -> None:
    """One that begins after its position: no call means it, but a GPU must not wait for ever."""
    plan = random_plan(Shape(layers=2), torch.float32)
    caches = new_caches(plan, 2, 8)
    step, before = CudaEngine(plan, emulator(blocks=blocks)).bind(caches), copied(caches)
    tokens, positions = torch.tensor([3, 4]), torch.tensor([0, 5])
    logits = step(tokens, positions, torch.tensor([0, 6]))[0].clone()
    for cache, other in zip(caches, before, strict=True):
        assert torch.equal(cache.keys[1].isnan(), other.keys[1].isnan())
    assert torch.isfinite(logits).all()
    again = step(tokens, torch.tensor([0, 5]), torch.tensor([0, 5]))
    torch.testing.assert_close(again[0], logits, rtol=1e-5, atol=1e-5)


def test_several_tokens_are_those_of_one_sequence(emulator: Callable[..., Emulator]) -> None:
    plan = random_plan(Shape(layers=1), torch.float32)
    for engine in (CudaEngine(plan, emulator()), ReferenceEngine(plan)):
        with pytest.raises(ValueError, match=r"tokens must be 1, or up to .* got tokens=2 of 3 sequences"):
            engine.bind(new_caches(plan, 3, 8), 2)
    with pytest.raises(ValueError, match="tokens must be 1, or up to 8 of a single sequence, got tokens=9"):
        CudaEngine(plan, emulator()).bind(new_caches(plan, 1, 20), 9)


@pytest.mark.parametrize("family", FAMILIES)
def test_fp32_matches_the_reference(
    family: str, emulator: Callable[..., Emulator], relative_rms: Callable[[Tensor, Tensor], float]
) -> None:
    index = list(FAMILIES).index(family)
    torch.manual_seed(index)
    plan, machine = random_plan(FAMILIES[family], torch.float32), emulator(blocks=9 - index)
    # Every other one fetches as GPUs before compute capability 9.0 do.
    # And in every third all lanes arrive, as under racecheck.
    extra = {"BULK": index % 2, "EVERY_LANE": int(index % 3 == 0)}
    assert_steps_match(machine, plan, 1 + index % 4, 1e-5, relative_rms, **extra)


def test_caches_larger_than_the_weights_are_fetched_by_more_warps(
    emulator: Callable[..., Emulator], relative_rms: Callable[[Tensor, Tensor], float], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    plan, machine, used = random_plan(Shape(), torch.float32), emulator(), []
    load = Emulator.load
    monkeypatch.setattr(Emulator, "load", lambda self, macros: used.append(macros["FETCHERS"]) or load(self, macros))
    for length, warps in ((24, cuda.FETCHERS), (4000, cuda.MANY_FETCHERS)):
        caches = new_caches(plan, 2, length, 0)
        step, reference = CudaEngine(plan, machine).bind(caches), ReferenceEngine(plan).bind(copied(caches))
        for index in range(20):
            inputs = step_inputs(plan, 2, index, [0, 3])
            assert relative_rms(step(*inputs), reference(*inputs)) <= 1e-5
        assert used.pop() == warps


def test_it_says_which_experts_the_last_layer_switched_on(emulator: Callable[..., Emulator]) -> None:
    torch.manual_seed(0)
    plan = random_plan(Shape(), torch.float32)
    caches = new_caches(plan, 3, 6)
    step, reference = CudaEngine(plan, emulator()).bind(caches), ReferenceEngine(plan).bind(copied(caches))
    found = []
    for index in range(4):
        inputs = step_inputs(plan, 3, index, [0, 0, 1])
        step(*inputs), reference(*inputs)
        assert torch.equal(step.active(), reference.active())
        found.append(step.active())
    assert 0 < torch.stack(found).float().mean() < 1


@pytest.mark.parametrize("number", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("name", ["down", "out"])
def test_what_is_no_finite_number_reaches_the_logits(
    name: str, number: float, emulator: Callable[..., Emulator]
) -> None:
    plan, machine = random_plan(Shape(experts=0), torch.float32), emulator()
    getattr(plan.layers[0], name)[3, 5] = number
    step = CudaEngine(plan, machine).bind(new_caches(plan, 1, 4, 0))
    assert step(*step_inputs(plan, 1, 0, [0])).isnan().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_16_bits_match_the_reference(
    dtype: torch.dtype, emulator: Callable[..., Emulator], relative_rms: Callable[[Tensor, Tensor], float]
) -> None:
    plan = with_forced_experts(random_plan(Shape(biases=True, head_norms=True), dtype))
    assert_steps_match(emulator(), plan, 4, {torch.float16: 1e-3, torch.bfloat16: 1e-2}[dtype], relative_rms)


# Bits of attention, FFN and head, the numbers of a group, and a shape: with two slabs, groups of more and of fewer
# neurons than an expert, rows whose pairs are no 16 bytes.
QUANTIZED = {
    "bytes": (8, 8, 8, 32, Shape(biases=True, hidden=96, heads=6)),
    "int8 FFN": (0, 8, 0, 32, Shape(layers=1, hidden=1056)),
    "groups of 32": (4, 4, 4, 32, Shape(hidden=96, heads=6, gated=False, biases=True)),
    "groups of 64": (8, 4, 4, 64, Shape(experts=16, neurons=256)),
    "two slabs": (4, 4, 8, 128, Shape(layers=1, hidden=1152, heads=8, kv_heads=2, experts=4, neurons=256)),
}


@pytest.mark.parametrize("name", QUANTIZED)
def test_quantized_fp32_matches_the_reference(
    name: str, emulator: Callable[..., Emulator], relative_rms: Callable[[Tensor, Tensor], float]
) -> None:
    index, (*bits, group, shape) = list(QUANTIZED).index(name), QUANTIZED[name]
    plan = with_quantized(random_plan(shape, torch.float32), *bits, group)
    assert_steps_match(emulator(blocks=7 - index), plan, 1 + index % 3, 1e-5, relative_rms)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_quantized_16_bits_match_the_reference(
    bits: int, dtype: torch.dtype, emulator: Callable[..., Emulator], relative_rms: Callable[[Tensor, Tensor], float]
) -> None:
    plan = with_forced_experts(random_plan(Shape(hidden=96, heads=6, biases=True, head_norms=True), dtype))
    plan = with_quantized(plan, bits, bits, bits)
    assert_steps_match(emulator(), plan, 3, {torch.float16: 1e-3, torch.bfloat16: 1e-2}[dtype], relative_rms)


def test_what_does_not_fit_of_quantized_weights_is_told(emulator: Callable[..., Emulator]) -> None:
    plan = random_plan(Shape(), torch.bfloat16)
    caches, machine = new_caches(plan, 1, STEPS), emulator()

    def told(changed: DecoderPlan) -> str | None:
        return unfit_shapes(changed, caches, machine)

    def first(**changes: Any) -> DecoderPlan:
        return replace(plan, layers=[replace(layer, **changes) for layer in plan.layers])

    q, down = plan.layers[0].q, plan.layers[0].down
    assert told(with_quantized(plan, 8, 4, 0)) is None
    assert "some matrices of attention" in str(told(first(q=quantized(q, 8))))
    assert "groups of 4-bit weights have [16]" in str(told(with_quantized(plan, 4, 0, 0, 16)))
    assert "the scales of down" in str(
        told(
            replace(
                with_quantized(plan, 0, 8, 0),
                layers=[replace(layer, down=quantized(down, 8)) for layer in with_quantized(plan, 0, 8, 0).layers],
            )
        )
    )


def test_quantized_refuses_scales_that_do_not_fit() -> None:
    values = torch.zeros(4, 64, dtype=torch.int8)
    with pytest.raises(ValueError, match="bits must be 4 or 8, got bits=3"):
        Quantized(values=values, scales=torch.ones(4, 1), bits=3)
    with pytest.raises(ValueError, match=r"scales must be .* got scales=\(3, 1\)"):
        Quantized(values=values, scales=torch.ones(3, 1))
    with pytest.raises(ValueError, match="zeros must be of 4 bits"):
        Quantized(values=values, scales=torch.ones(4, 1), zeros=torch.ones(4, 1))


def with_forced_experts(plan: DecoderPlan) -> DecoderPlan:
    """Experts that rounding cannot switch: half of them, others in each layer."""
    layers = []
    for layer in plan.layers:
        assert layer.router is not None
        bias = torch.where(torch.randperm(len(layer.router)) % 2 == 0, 100.0, -100.0)
        layers.append(replace(layer, router_bias=bias.to(layer.router)))
    return replace(plan, layers=layers)


@pytest.mark.parametrize("mask", ["none", "one", "all"])
def test_any_number_of_experts(
    mask: str, emulator: Callable[..., Emulator], relative_rms: Callable[[Tensor, Tensor], float]
) -> None:
    plan = random_plan(FAMILIES["llama"], torch.float32)
    bias = torch.full((8,), 100.0 if mask == "all" else -100.0)
    bias[5] = 100.0 if mask == "one" else bias[5]
    plan = replace(plan, layers=[replace(layer, router_bias=bias) for layer in plan.layers])
    assert_steps_match(emulator(), plan, 1, 1e-5, relative_rms)


def test_batches_shrink_and_take_turns(
    emulator: Callable[..., Emulator], relative_rms: Callable[[Tensor, Tensor], float]
) -> None:
    plan, machine = random_plan(FAMILIES["llama"], torch.float32), emulator()
    engine = CudaEngine(plan, machine)
    caches = [new_caches(plan, batch, STEPS) for batch in (3, 1, 3)]
    steps = [engine.bind(each) for each in caches]
    references = [ReferenceEngine(plan).bind(copied(each)) for each in caches]
    for index in range(4):
        for batch, step, reference in zip((3, 1, 3), steps, references, strict=True):
            inputs = step_inputs(plan, batch, index, [0] * batch)
            assert relative_rms(step(*inputs), reference(*inputs)) <= 1e-5
    # A cache that was used goes on in a new step, as the next generation's does.
    again = engine.bind(caches[1])
    inputs = step_inputs(plan, 1, 4, [0])
    assert relative_rms(again(*inputs), references[1](*inputs)) <= 1e-5


def test_a_router_in_fp32_counts_as_rounded_and_is_read_anew(
    emulator: Callable[..., Emulator],
) -> None:
    plan = random_plan(Shape(layers=1, router_dtype=torch.float32), torch.bfloat16)
    (layer,) = plan.layers
    assert layer.router is not None
    layer.router.copy_(torch.randn_like(layer.router) * 0.1)
    caches = new_caches(plan, 1, STEPS)
    engine, inputs = CudaEngine(plan, emulator()), step_inputs(plan, 1, 0, [0])
    before = engine.bind(caches)(*inputs).clone()
    rounded = replace(plan, layers=[replace(layer, router=layer.router.bfloat16())])
    assert torch.equal(CudaEngine(rounded, emulator()).bind(caches)(*inputs), before)
    layer.router.zero_()
    assert layer.router_bias is not None
    layer.router_bias.fill_(-1)
    dense = replace(plan, layers=[replace(layer, router=None, router_bias=None)])
    after = engine.bind(caches)(*inputs).clone()
    assert not torch.equal(after, before)
    assert not torch.equal(after, CudaEngine(dense, emulator()).bind(caches)(*inputs))


def test_frequencies_are_read_anew(
    emulator: Callable[..., Emulator], relative_rms: Callable[[Tensor, Tensor], float]
) -> None:
    plan = random_plan(Shape(layers=1), torch.float32)
    engine = CudaEngine(plan, emulator())
    for rope in plan.ropes:
        rope.frequencies.mul_(-3)
    ours, theirs = (new_caches(plan, 1, STEPS) for _ in range(2))
    step, reference = engine.bind(ours), ReferenceEngine(plan).bind(theirs)
    for index in range(3):
        inputs = step_inputs(plan, 1, index, [0])
        assert relative_rms(step(*inputs), reference(*inputs)) <= 1e-5


def test_what_does_not_fit_is_named() -> None:
    machine = Machine(blocks=5, shared_bytes=101376)
    plan = random_plan(Shape(), torch.float32)
    caches = new_caches(plan, 2, 8)
    assert unfit_shapes(plan, caches, machine) is None

    def reason(**changes: Any) -> str | None:
        return unfit_shapes(replace(plan, **changes), caches, machine)

    first, second = plan.layers
    assert reason(activation="tanh") == "the activation is tanh"
    assert reason(head_size=24) == "the head size is 24"
    assert reason(kv_heads=3) == "4 heads of queries share 3 of keys"
    assert reason(layers=[first, replace(second, gate=None)]) == "the layers differ in shape or kind"
    assert reason(layers=[first]) == "not all layers have a cache"
    assert reason(layers=[first, replace(second, up=second.up.half())]) == (
        "up of layer 1 is torch.float16, not torch.float32"
    )
    assert reason(head=plan.head.T.contiguous().T) == "head does not lie in one piece that begins at 16 bytes"
    assert unfit_shapes(plan, new_caches(plan, 9, 8), machine) == "the batch is 9, above 8"
    half = [replace(cache, keys=cache.keys.half()) for cache in caches]
    assert "the cache is" in str(unfit_shapes(plan, half, machine))
    odd = random_plan(Shape(hidden=48), torch.float32)
    assert unfit_shapes(odd, new_caches(odd, 1, 8), machine) == "the hidden size 48 is no multiple of 32"
    wide = random_plan(Shape(hidden=4096, layers=1), torch.float32)
    assert "bytes of shared memory, above 101376" in str(unfit_shapes(wide, new_caches(wide, 8, 8), machine))
    assert "not on an NVIDIA GPU" in str(cuda.unfit(plan, caches))


def test_wrong_inputs_are_refused(emulator: Callable[..., Emulator]) -> None:
    plan = random_plan(FAMILIES["llama"], torch.float32)
    caches = new_caches(plan, 1, STEPS)
    step = CudaEngine(plan, emulator()).bind(caches)
    tokens, positions, starts = step_inputs(plan, 1, 0, [0])
    with pytest.raises(ValueError, match=r"positions must be int64 \[1\] on cpu, got positions=torch.int32 \[1\]"):
        step(tokens, positions.int(), starts)
    with pytest.raises(ValueError, match=r"tokens must be int64 \[1\] on cpu, got tokens=torch.int64 \[2\]"):
        step(tokens.repeat(2), positions, starts)
    turned = [replace(cache, keys=cache.keys.transpose(2, 3)) for cache in caches]
    with pytest.raises(ValueError, match="keys must lie in one piece on cpu"):
        CudaEngine(plan, emulator()).bind(turned)


@pytest.fixture(scope="module")
def qwen() -> DecoderPlan:
    return random_plan(QWEN, torch.bfloat16, "meta")


def constants(plan: DecoderPlan, arch: int, batch: int = 1) -> dict[str, int]:
    """The kernel's for a GPU of this compute capability."""
    shared_bytes, blocks = GPUS[arch]
    return macros(plan, batch, Machine(blocks=blocks, shared_bytes=shared_bytes))


def compiled(values: dict[str, int], arch: int) -> str:
    """What the compiler says."""
    cubin, said = compile_cubin(values, arch, ("--ptxas-options=-v",))
    assert cubin[:4] == b"\x7fELF"
    return said


@needs_nvrtc
def test_the_kernel_compiles_for_all_architectures(qwen: DecoderPlan) -> None:
    cases = [(90, 8, 0), (90, 1, 4), (80, 1, 8), *((arch, 1, 0) for arch in GPUS)]
    values = [
        constants(qwen, arch, batch) | {f"{part}_BITS": bits for part in ("ATTENTION", "FFN", "HEAD")}
        for arch, batch, bits in cases
    ]
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        said = list(pool.map(compiled, values, [arch for arch, *_ in cases]))
    for case, text in zip(cases, said, strict=True):
        stores, loads = map(int, re.findall(r"(\d+) bytes spill", text))
        # For several tokens and 4 bits a few of 672 bytes of registers.
        assert max(stores, loads) <= (0 if case[1:] in {(1, 0), (1, 8)} else 64), (case, text)


@needs_nvrtc
def test_a_compiler_that_says_nothing_writes_into_nothing_of_pythons(qwen: DecoderPlan) -> None:
    _, said = compile_cubin(constants(qwen, 90), 90)
    # Python has one object for each single byte; the log of a silent compiler is a single zero.
    assert said == ""
    assert [struct.pack("<B", byte)[0] for byte in range(256)] == list(range(256))


@needs_nvrtc
def test_machine_code_is_kept(qwen: DecoderPlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def compile_once(values: Any, arch: int) -> tuple[bytes, str]:
        calls.append(arch)
        return b"code", ""

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(compiling, "compile_cubin", compile_once)
    values = constants(qwen, 90)
    assert [cached_cubin(values, 90), cached_cubin(values, 90)] == [b"code"] * 2
    assert calls == [90]
    cached_cubin({**values, "D": 64}, 90)
    cached_cubin(values, 80)
    assert calls == [90, 90, 80]
    kept = compiling.cubin_path(values, 90)
    for damage in (b"", kept.read_bytes()[:-1], kept.read_bytes() + b"x"):
        kept.write_bytes(damage)
        assert cached_cubin(values, 90) == b"code"
    assert len(calls) == 6
    assert cached_cubin(values, 90) == b"code"
    assert len(calls) == 6
    # Where nothing can be kept it is compiled each time.
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert [cached_cubin(values, 90), cached_cubin(values, 90)] == [b"code"] * 2
    assert len(calls) == 8


@needs_nvrtc
def test_what_does_not_compile_says_why(qwen: DecoderPlan) -> None:
    with pytest.raises(RuntimeError, match=r"(?s)does not compile for sm_90: .*shared memory is too small"):
        compile_cubin({**constants(qwen, 90), "SHARED_BYTES": 20000}, 90)


@needs_nvrtc
def test_what_fits_by_the_estimate_compiles() -> None:
    """The least shared memory that `unfit` lets pass is enough."""
    narrow, wide = Shape(hidden=256, experts=64), Shape(heads=8, kv_heads=1, head_size=256, experts=0)
    for batch, shape, dtype in ((1, narrow, torch.bfloat16), (8, wide, torch.float32)):
        values = constants(random_plan(shape, dtype), 90, batch)
        compile_cubin({**values, "SHARED_BYTES": cuda._needed_bytes(values, dtype.itemsize)}, 90)
