"""The CUDA kernel of a decoding step on a GPU, against the reference in fp32."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from lte.ops.step.cuda import CudaEngine, Gpu, unfit
from lte.ops.step.plan import DecoderPlan, LayerCache
from lte.ops.step.reference import ReferenceEngine, upcast
from tests.ops.conftest import BOUNDS
from tests.ops.step_plans import (
    FAMILIES,
    Shape,
    copied,
    new_caches,
    random_plan,
    several_caches,
    several_inputs,
    step_inputs,
    with_quantized,
)
from tests.ops.test_step_cuda import with_forced_experts

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

Rms = Callable[[Tensor, Tensor], float]
# One layer of Qwen2.5-1.5B, SmolLM2-135M, Llama-2-7B, and Gemma 2's heads of 256.
REAL = {
    "qwen": Shape(
        layers=1,
        hidden=1536,
        heads=12,
        kv_heads=2,
        head_size=128,
        neurons=8960,
        experts=280,
        biases=True,
        vocabulary=20000,
    ),
    "smollm": Shape(layers=2, hidden=576, heads=9, kv_heads=3, head_size=64, neurons=1536, experts=48),
    "llama": Shape(layers=1, hidden=4096, heads=32, kv_heads=32, head_size=128, neurons=11008, experts=344),
    "gemma": replace(FAMILIES["gemma2"], hidden=2304, heads=8, kv_heads=4, head_size=256, neurons=9216, experts=0),
}


def assert_steps_match(
    plan: DecoderPlan, batch: int, rms: Rms, steps: int = 12, length: int = 24, at: int = 0, **extra: int
) -> None:
    """Logits of some steps from position `at` on, of sequences that begin at different places."""
    starts = torch.randint(0, 6, (batch,)).tolist()
    caches = new_caches(plan, batch, length, 3)
    if at:  # earlier tokens
        for cache in caches:
            cache.keys.normal_(), cache.values.normal_()
    assert unfit(plan, caches) is None
    step = CudaEngine(plan).bind(caches, **extra)
    reference = ReferenceEngine(upcast(plan)).bind([upcast(cache) for cache in copied(caches)])
    for index in range(at, at + steps):
        inputs = step_inputs(plan, batch, index, starts)
        step.logits.fill_(torch.nan)
        assert rms(step(*inputs), reference(*inputs)) <= BOUNDS[plan.embedding.dtype], index


@pytest.mark.parametrize("family", FAMILIES)
def test_families_in_fp32(family: str, relative_rms: Rms, poisoned: None) -> None:
    batch = 1 + list(FAMILIES).index(family) % 4
    assert_steps_match(random_plan(FAMILIES[family], torch.float32, "cuda"), batch, relative_rms)


@pytest.mark.parametrize("tokens", [2, 5, 8])
@pytest.mark.parametrize("family", ["llama", "gemma2", "phi"])
def test_several_tokens_of_one_sequence(family: str, tokens: int, relative_rms: Rms, poisoned: None) -> None:
    """Against the reference that reads them one after the other; rings of windows go round."""
    plan = random_plan(FAMILIES[family], torch.float32, "cuda")
    caches = several_caches(plan, tokens, 3 + 12 * tokens, 3)
    step, reference = CudaEngine(plan).bind(caches, tokens), ReferenceEngine(plan).bind(copied(caches))
    for index in range(0, 12 * tokens, tokens):
        inputs = several_inputs(plan, tokens, index, 3)
        step.logits.fill_(torch.nan)
        logits = step(*inputs)
        for row in range(tokens):
            expected = reference(*(each[row : row + 1] for each in inputs))
            assert relative_rms(logits[row : row + 1], expected) <= 1e-5, (index, row)


@pytest.mark.parametrize("family", ["llama", "gemma2", "phi"])
def test_passes_of_fewer_tokens_than_there_is_room_for(family: str, relative_rms: Rms, poisoned: None) -> None:
    assert_passes_match(family, relative_rms)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_every_lane_arrives_in_passes(family: str, relative_rms: Rms, poisoned: None) -> None:
    # As they run under racecheck.
    assert_passes_match(family, relative_rms, EVERY_LANE=1)


def assert_passes_match(family: str, relative_rms: Rms, **extra: int) -> None:
    """Passes of 1 to 8 tokens with room for 8, in caches that begin at their start."""
    plan, tokens, index = random_plan(FAMILIES[family], torch.float32, "cuda"), 8, 0
    caches = several_caches(plan, tokens, 64)
    reference = ReferenceEngine(plan).bind(copied(caches))
    step = CudaEngine(plan).bind(caches, tokens, fewer=True, **extra)
    for known in (8, 1, 2, 3, 1, 4, 5, 7, 6):
        inputs = several_inputs(plan, tokens, index, 3)
        inputs[2][known:] = inputs[1][known:] + 1
        step.logits.fill_(torch.nan)
        logits = step(*inputs)
        for row in range(known):
            expected = reference(*(each[row : row + 1] for each in inputs))
            assert relative_rms(logits[row : row + 1], expected) <= 1e-5, (index, row)
        index += known


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_every_lane_arrives(family: str, relative_rms: Rms, poisoned: None) -> None:
    # As it runs under racecheck.
    plan = random_plan(FAMILIES[family], torch.float32, "cuda")
    assert_steps_match(plan, 2, relative_rms, EVERY_LANE=1)


@pytest.mark.parametrize(
    ("name", "dtype", "batch", "bits"),
    [
        ("qwen", torch.bfloat16, 1, 0),
        ("qwen", torch.float16, 3, 0),
        ("smollm", torch.bfloat16, 8, 0),
        ("smollm", torch.float32, 2, 0),
        ("llama", torch.bfloat16, 2, 0),
        ("gemma", torch.bfloat16, 1, 0),
        ("qwen", torch.bfloat16, 1, 8),
        ("qwen", torch.bfloat16, 4, 4),
        ("llama", torch.float16, 1, 4),
    ],
)
def test_real_shapes(name: str, dtype: torch.dtype, batch: int, bits: int, relative_rms: Rms, poisoned: None) -> None:
    plan = random_plan(REAL[name], dtype, "cuda")
    plan = with_forced_experts(plan) if REAL[name].experts else plan
    plan = with_quantized(plan, bits, bits, bits) if bits else plan
    for at in (0, 100, 4000):
        assert_steps_match(plan, batch, relative_rms, steps=3, length=at + 16, at=at)


class Text:
    """A step, its reference, and where they are."""

    def __init__(self, plan: DecoderPlan, batch: int = 1, **extra: int):
        self.plan, self.batch, self.index = plan, batch, 0
        self.caches: list[LayerCache] = new_caches(plan, batch, 40)
        self.step = CudaEngine(plan).bind(self.caches, **extra)
        self.reference = ReferenceEngine(plan).bind(copied(self.caches))

    def check(self, rms: Rms) -> None:
        """One token."""
        inputs = step_inputs(self.plan, self.batch, self.index, [0] * self.batch)
        assert rms(self.step(*inputs), self.reference(*inputs)) <= 1e-5
        self.index += 1


@pytest.fixture(scope="module")
def plan() -> DecoderPlan:
    """One whose kernels compile once."""
    torch.manual_seed(0)
    return random_plan(replace(REAL["smollm"], neurons=512, experts=16), torch.float32, "cuda")


def test_random_delays_change_no_bit(plan: DecoderPlan) -> None:
    texts = [Text(plan, 2), Text(plan, 2, DELAY=20000)]
    for index in range(20):
        inputs = step_inputs(plan, 2, index, [0, 0])
        plain, delayed = (text.step(*inputs) for text in texts)
        assert torch.equal(plain, delayed)
    assert not plain.isnan().any()


def test_batches_grow_and_shrink(plan: DecoderPlan, relative_rms: Rms) -> None:
    texts = [Text(plan, batch) for batch in (1, 2, 1, 5)]
    for _ in range(3):
        for text in texts:
            text.check(relative_rms)


def test_a_graph_replays_it(plan: DecoderPlan, relative_rms: Rms) -> None:
    text = Text(plan)
    text.check(relative_rms)  # before the capture
    inputs = step_inputs(plan, 1, 1, [0])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits = text.step(*inputs)
    for index in range(1, 6):
        for static, new in zip(inputs, step_inputs(plan, 1, index, [0]), strict=True):
            static.copy_(new)
        graph.replay()
        assert relative_rms(logits, text.reference(*inputs)) <= 1e-5
    text.index = 6
    text.check(relative_rms)


def test_one_step_on_two_streams(plan: DecoderPlan, relative_rms: Rms) -> None:
    """Nobody waits in between, so only the step itself keeps its launches in order."""
    text = Text(plan)
    inputs = [step_inputs(plan, 1, index, [0]) for index in range(20)]
    expected = [text.reference(*each) for each in inputs]
    torch.cuda.synchronize()
    streams, found = [torch.cuda.Stream(), torch.cuda.Stream()], []
    for index, each in enumerate(inputs):
        with torch.cuda.stream(streams[index % 2]):
            found.append(text.step(*each).clone())
    torch.cuda.synchronize()
    assert all(relative_rms(mine, theirs) <= 1e-5 for mine, theirs in zip(found, expected, strict=True))


def test_two_models_in_threads_of_their_own(plan: DecoderPlan, relative_rms: Rms) -> None:
    other = random_plan(FAMILIES["qwen3"], torch.float32, "cuda")
    errors: list[BaseException] = []

    def run(text: Text) -> None:
        try:
            with torch.cuda.stream(torch.cuda.Stream()):
                for _ in range(30):
                    text.check(relative_rms)
        except BaseException as error:
            errors.append(error)

    texts = [Text(plan), Text(other)]
    torch.cuda.synchronize()
    threads = [threading.Thread(target=run, args=(text,)) for text in texts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors


def test_a_launch_that_is_too_large_is_refused(plan: DecoderPlan, relative_rms: Rms) -> None:
    gpu = Gpu.of(plan.embedding.device)
    caches = new_caches(plan, 1, 40)
    step = CudaEngine(plan, replace(gpu, blocks=gpu.blocks + 1)).bind(caches)
    with pytest.raises(RuntimeError, match=r"cannot run on cuda:0: .*COOPERATIVE_LAUNCH_TOO_LARGE"):
        step(*step_inputs(plan, 1, 0, [0]))
    torch.cuda.synchronize()
    assert all(cache.keys.isnan().all() for cache in caches)
    # The device is as it was, and a step that stopped between two launches goes on.
    text = Text(plan)
    text.check(relative_rms)
    with pytest.raises(ValueError, match="tokens must be int64"):
        text.step(*(each.int() for each in step_inputs(plan, 1, 1, [0])))
    text.check(relative_rms)


def test_experts_forced_by_the_bias_alone(relative_rms: Rms) -> None:
    """A step reads weights where they lie, biases in fp32 too: a mask written into one counts at once."""
    plan = random_plan(replace(REAL["smollm"], layers=1), torch.float32, "cuda")
    (layer,) = plan.layers
    assert layer.router is not None
    assert layer.router_bias is not None
    layer.router.zero_()
    text = Text(plan)
    for share in (0.0, 0.1, 0.5, 1.0):
        layer.router_bias.copy_(torch.where(torch.rand(48) < share, 1.0, -1.0))
        text.check(relative_rms)
