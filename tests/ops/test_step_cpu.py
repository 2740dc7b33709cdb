"""The decoding step on the CPU against the reference, on random decoders with every feature."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

from lte.ops.activations import ACTIVATIONS
from lte.ops.step import cpu
from lte.ops.step.cpu import CpuEngine, CpuStep, unfit
from lte.ops.step.plan import DecoderLayer, DecoderPlan, LayerCache, Rope
from lte.ops.step.reference import ReferenceEngine
from tests.ops.conftest import BOUNDS

pytest.importorskip("numba")
VOCABULARY = 40


@pytest.fixture(autouse=True)
def without_gradients(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Scratch and logits start as NaN."""
    allocate = CpuStep._allocate

    def poisoned(self: CpuStep, threads: int) -> None:
        allocate(self, threads)
        self._scratch.fill_(torch.nan)
        self._logits.fill_(torch.nan)

    monkeypatch.setattr(CpuStep, "_allocate", poisoned)
    with torch.no_grad():
        yield


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def random_plan(seed: int, dtype: torch.dtype = torch.float32, **changes: Any) -> DecoderPlan:
    """A decoder of two or three layers, each feature on or off by chance."""
    chance = random.Random(seed)
    torch.manual_seed(seed)

    def maybe(tensor: Tensor) -> Tensor | None:
        return tensor if chance.random() < 0.5 else None

    def matrix(rows: int, columns: int) -> Tensor:
        return (torch.randn(rows, columns) * columns**-0.5).to(dtype)

    def vector(size: int) -> Tensor:
        return (torch.randn(size) / 3).to(dtype)

    kv_heads, group, size = chance.choice([1, 2, 3]), chance.choice([1, 2, 4]), chance.choice([8, 20, 32])
    hidden, experts, neurons = chance.choice([36, 64, 200]), chance.choice([1, 3, 6]), chance.choice([8, 32])
    plus_one, gated = chance.random() < 0.5, chance.random() < 0.7

    def norm(size: int) -> Tensor:
        return vector(size) if plus_one else (1 + torch.randn(size) / 5).to(dtype)

    def layer() -> DecoderLayer:
        heads, inner = kv_heads * group * size, experts * neurons
        return DecoderLayer(
            norm1=norm(hidden), q=matrix(heads, hidden), k=matrix(kv_heads * size, hidden),
            v=matrix(kv_heads * size, hidden), out=matrix(hidden, heads), norm2=norm(hidden), up=matrix(inner, hidden),
            down=matrix(hidden, inner).T.contiguous(), gate=matrix(inner, hidden) if gated else None,
            router=maybe(torch.randn(experts, hidden) * hidden**-0.5), router_bias=maybe(torch.randn(experts)),
            threshold=chance.random() - 0.5, q_bias=maybe(vector(heads)), k_bias=maybe(vector(kv_heads * size)),
            v_bias=maybe(vector(kv_heads * size)), out_bias=maybe(vector(hidden)), up_bias=maybe(vector(inner)),
            gate_bias=maybe(vector(inner)) if gated else None, down_bias=maybe(vector(hidden)),
            q_norm=maybe(norm(size)), k_norm=maybe(norm(size)), post1=maybe(norm(hidden)), post2=maybe(norm(hidden)),
            window=chance.choice([0, 3, 6]), rope=chance.choice([0, 1]),
        )  # fmt: skip

    embedding = torch.randn(VOCABULARY, hidden).to(dtype)
    plan = DecoderPlan(
        layers=[layer() for _ in range(chance.choice([2, 3]))], embedding=embedding, final_norm=norm(hidden),
        head=embedding if chance.random() < 0.5 else matrix(VOCABULARY, hidden), head_bias=maybe(vector(VOCABULARY)),
        ropes=[Rope(frequencies=torch.rand(size // 2)), Rope(frequencies=torch.rand(size // 4), factor=1.2)],
        heads=kv_heads * group, kv_heads=kv_heads, head_size=size, activation=chance.choice(list(ACTIVATIONS)),
        eps=1e-6, norm_plus_one=plus_one, embedding_scale=chance.choice([1.0, 3.3]), score_scale=size**-0.5,
        score_cap=chance.choice([0.0, 5.0]), logit_cap=chance.choice([0.0, 2.0]),
    )  # fmt: skip
    return dataclasses.replace(plan, **changes)


def make_caches(plan: DecoderPlan, batch: int, length: int, *, ring: bool = False) -> list[LayerCache]:
    """Caches full of NaN; of `ring`, layers with a window hold that many tokens, shifted."""
    caches = []
    for layer in plan.layers:
        capacity = layer.window if ring and layer.window else length
        shape = 2, batch, plan.kv_heads, capacity, plan.head_size
        keys, values = torch.full(shape, torch.nan, dtype=plan.embedding.dtype)
        caches.append(LayerCache(keys=keys, values=values, shift=2 if ring and layer.window else 0))
    return caches


def decode(
    engine: Any, caches: Sequence[LayerCache], tokens: Tensor, positions: Sequence[int], starts: Sequence[int]
) -> Tensor:
    """Logits [steps, B, V] of the tokens [steps, B], from those positions on."""
    step, at = engine.bind(caches), torch.tensor(positions)
    return torch.stack([step(row, at + i, torch.tensor(starts)).clone() for i, row in enumerate(tokens)])


@pytest.fixture
def check(relative_rms: Callable[[Tensor, Tensor], float]) -> Callable[..., Tensor]:
    """Decodes by the kernel and by the reference; returns the kernel's logits."""

    def compare(plan: DecoderPlan, tokens: Tensor, starts: Sequence[int], *, ring: bool = False) -> Tensor:
        ours, theirs = (make_caches(plan, tokens.shape[1], len(tokens) + max(starts), ring=ring) for _ in range(2))
        assert unfit(plan, ours) is None
        actual = decode(CpuEngine(plan), ours, tokens, starts, starts)
        expected = decode(ReferenceEngine(plan), theirs, tokens, starts, starts)
        bound = BOUNDS[plan.embedding.dtype]
        assert relative_rms(actual, expected) <= bound
        for mine, other in zip(ours, theirs, strict=True):
            for name in ("keys", "values"):
                known, found = getattr(other, name), getattr(mine, name)
                assert torch.equal(known.isnan(), found.isnan())
                assert relative_rms(found.nan_to_num(), known.nan_to_num()) <= bound
        return actual

    return compare


@pytest.mark.parametrize("seed", range(20))
def test_random_decoders(check: Callable, seed: int) -> None:
    chance = random.Random(seed)
    batch = chance.randint(1, 8)
    starts = [chance.randint(0, 4) for _ in range(batch)]
    check(random_plan(seed), torch.randint(VOCABULARY, (9, batch)), starts, ring=chance.random() < 0.5)


@pytest.mark.parametrize("tokens", [2, 5, 8])
@pytest.mark.parametrize("seed", range(5))
def test_several_tokens_of_one_sequence(
    seed: int, tokens: int, relative_rms: Callable[[Tensor, Tensor], float]
) -> None:
    """Against the reference one after the other: from an empty cache on, some taken back, and after single steps."""
    plan, start = random_plan(seed), seed % 3
    layers = [dataclasses.replace(layer, window=layer.window and layer.window + tokens - 1) for layer in plan.layers]
    wide = dataclasses.replace(plan, layers=layers)
    ours, theirs = (make_caches(wide, 1, start + 9 * tokens + 80, ring=True) for _ in range(2))
    engine, reference = CpuEngine(plan), ReferenceEngine(plan).bind(theirs)
    several, single, index = engine.bind(ours, tokens), engine.bind(ours), start
    # Of the last passes some tokens are none, in one all of them.
    some = (0, 0, 1), (0, 0, tokens - 1), (0, 0, tokens), (0, 0, 0)
    for singles, back, none in ((0, 0, 0), (0, min(tokens - 1, 3), 0), (0, 0, 0), (80, 0, 0), (0, 1, 0), *some):
        for _ in range(singles):
            given = torch.randint(VOCABULARY, (1,)), torch.tensor([index]), torch.tensor([start])
            assert relative_rms(single(*given), reference(*given)) <= 1e-5
            index += 1
        index -= back
        given = (
            torch.randint(VOCABULARY, (tokens,)),
            torch.arange(index, index + tokens),
            torch.full((tokens,), start),
        )
        known = tokens - none
        given[2][known:] = given[1][known:] + 1
        logits = several(*given)
        for row in range(known):
            expected = reference(*(each[row : row + 1] for each in given))
            assert relative_rms(logits[row : row + 1], expected) <= 1e-5, (index, row)
        index += known
    for mine, other in zip(ours, theirs, strict=True):
        for name in ("keys", "values"):
            known, found = getattr(other, name), getattr(mine, name)
            assert torch.equal(known.isnan(), found.isnan())
            assert relative_rms(found.nan_to_num(), known.nan_to_num()) <= 1e-5


def test_several_tokens_by_two_threads(relative_rms: Callable[[Tensor, Tensor], float], two_threads: None) -> None:
    plan = random_plan(1)
    ours, theirs = (make_caches(plan, 1, 20) for _ in range(2))
    given = torch.randint(VOCABULARY, (7,)), torch.arange(7), torch.zeros(7, dtype=torch.long)
    logits, reference = CpuEngine(plan).bind(ours, 7)(*given), ReferenceEngine(plan).bind(theirs, 7)
    assert relative_rms(logits, reference(*given)) <= 1e-5
    single = ReferenceEngine(plan).bind(make_caches(plan, 1, 20))
    for row in range(7):
        expected = single(*(each[row : row + 1] for each in given))
        assert relative_rms(logits[row : row + 1], expected) <= 1e-5


def test_several_tokens_that_do_not_fit_are_refused() -> None:
    plan = random_plan(0)
    plan = dataclasses.replace(plan, layers=[dataclasses.replace(layer, window=6) for layer in plan.layers])
    engine, zeros = CpuEngine(plan), torch.zeros(3, dtype=torch.long)
    with pytest.raises(ValueError, match="tokens must be 1, or up to 8 of a single sequence, got tokens=9"):
        engine.bind(make_caches(plan, 1, 20), 9)
    with pytest.raises(ValueError, match=r"tokens must be 1, .* got tokens=2 of 3 sequences"):
        engine.bind(make_caches(plan, 3, 20), 2)
    step = engine.bind(make_caches(plan, 1, 20), 3)
    with pytest.raises(ValueError, match="positions must follow each other and starts be one"):
        step(zeros, torch.tensor([4, 6, 7]), zeros)
    with pytest.raises(ValueError, match="positions must follow each other and starts be one"):
        step(zeros, torch.tensor([4, 5, 6]), torch.tensor([0, 0, 1]))
    with pytest.raises(ValueError, match="starts must be from 0 to positions"):
        step(zeros, torch.tensor([4, 5, 6]), torch.tensor([0, 9, 0]))
    # A ring of 6 tokens has lost what the first of three sees.
    step = engine.bind(make_caches(plan, 1, 20, ring=True), 3)
    with pytest.raises(ValueError, match="positions must be below 6"):
        step(zeros, torch.tensor([4, 5, 6]), zeros)


@pytest.mark.parametrize("seed", range(6))
def test_it_says_which_experts_the_last_layer_switched_on(seed: int) -> None:
    plan, batch = random_plan(seed), 3
    router = torch.randn(6, plan.embedding.shape[1])
    last = dataclasses.replace(plan.layers[-1], router=router, router_bias=None)
    up = torch.randn(48, plan.embedding.shape[1])
    last = dataclasses.replace(last, up=up, gate=None, down=up.clone(), up_bias=None, gate_bias=None)
    plan = dataclasses.replace(plan, layers=[*plan.layers[:-1], last])
    ours, theirs = (make_caches(plan, batch, 6) for _ in range(2))
    step, reference = CpuEngine(plan).bind(ours), ReferenceEngine(plan).bind(theirs)
    found = []
    for position in range(4):
        given = (
            torch.randint(VOCABULARY, (batch,)),
            torch.full((batch,), position),
            torch.zeros(batch, dtype=torch.long),
        )
        step(*given), reference(*given)
        assert torch.equal(step.active(), reference.active())
        found.append(step.active())
    assert 0 < torch.stack(found).float().mean() < 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("seed", range(6))
def test_16_bit_decoders(check: Callable, seed: int, dtype: torch.dtype) -> None:
    # One layer, as roundings add up; no router: a score that they carry over the threshold would say nothing.
    plan = random_plan(seed, dtype)
    layer = dataclasses.replace(plan.layers[0], router=None)
    check(dataclasses.replace(plan, layers=[layer]), torch.randint(VOCABULARY, (5, 3)), [0, 2, 1])


def test_a_router_counts_as_rounded(check: Callable) -> None:
    # 1 + 2^-12 in fp32 and 1 in bf16: the first two numbers of the FFN's input cancel, and no expert is on.
    plan = random_plan(0, torch.bfloat16)
    hidden = plan.embedding.shape[1]
    router = torch.zeros(1, hidden)
    router[0, :2] = torch.tensor([1 + 2**-12, 1.0])
    plan.embedding.fill_(0)[:, :2] = torch.tensor([1.0, -1.0])
    layer = dataclasses.replace(plan.layers[0], router=router, router_bias=None, threshold=0.0, window=0)
    layer.norm2[:2] = 1
    layer.out.zero_()
    gone = {"out_bias": None, "post1": None, "post2": None, "down_bias": None}
    without = dataclasses.replace(plan, layers=[dataclasses.replace(layer, **gone)], embedding_scale=1.0)
    logits = check(without, torch.zeros(1, 1, dtype=torch.long), [0])
    layer.up.zero_()
    if layer.up_bias is not None:
        layer.up_bias.zero_()
    assert torch.equal(logits, check(without, torch.zeros(1, 1, dtype=torch.long), [0]))


def test_contexts_of_several_pieces(check: Callable) -> None:
    for window in (0, 70):
        plan = random_plan(3)
        layers = [dataclasses.replace(layer, window=window) for layer in plan.layers[:1]]
        check(dataclasses.replace(plan, layers=layers), torch.randint(VOCABULARY, (150, 2)), [0, 3], ring=True)


@pytest.mark.parametrize("seed", range(4))
def test_neither_threads_nor_other_sequences_nor_rings_change_a_bit(seed: int) -> None:
    plan, starts = random_plan(seed), [0, 3, 1, 2, 0]
    tokens = torch.randint(VOCABULARY, (12, 5))
    engine = CpuEngine(plan)
    together = decode(engine, make_caches(plan, 5, 20), tokens, starts, starts)
    before = torch.get_num_threads()
    try:
        for threads in (2, 3):
            torch.set_num_threads(threads)
            assert torch.equal(decode(engine, make_caches(plan, 5, 20, ring=True), tokens, starts, starts), together)
    finally:
        torch.set_num_threads(before)
    for i, start in enumerate(starts):
        alone = decode(engine, make_caches(plan, 1, 20), tokens[:, i : i + 1], [0], [0])
        assert torch.equal(alone[:, 0], together[:, i]), start


def test_weights_may_change_between_steps(check: Callable) -> None:
    plan = random_plan(5)
    tokens = torch.randint(VOCABULARY, (3, 1))
    first = check(plan, tokens, [0])
    plan.layers[0].up.mul_(2)
    plan.final_norm.mul_(3)
    assert not torch.equal(check(plan, tokens, [0]), first)


def test_without_a_known_openmp_library_one_thread_computes(monkeypatch: pytest.MonkeyPatch, two_threads: None) -> None:
    plan, tokens = random_plan(6), torch.randint(VOCABULARY, (3, 2))
    expected = decode(CpuEngine(plan), make_caches(plan, 2, 3), tokens, [0, 0], [0, 0])
    monkeypatch.setattr(cpu, "_library", lambda: None)
    assert unfit(plan, make_caches(plan, 2, 3)) == "the CPU kernel does not know the library of torch's threads"
    assert torch.equal(decode(CpuEngine(plan), make_caches(plan, 2, 3), tokens, [0, 0], [0, 0]), expected)
    torch.set_num_threads(1)
    assert unfit(plan, make_caches(plan, 2, 3)) is None


def test_whatever_the_default_dtype_and_device() -> None:
    plan, inputs = random_plan(6), (torch.tensor([3, 4]), torch.zeros(2, dtype=torch.int64))
    expected = CpuEngine(plan).bind(make_caches(plan, 2, 3))(inputs[0], inputs[1], inputs[1])
    caches = make_caches(plan, 2, 3)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            actual = CpuEngine(plan).bind(caches)(inputs[0], inputs[1], inputs[1])
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(actual, expected)


def test_steps_of_several_python_threads(two_threads: None) -> None:
    plan, tokens = random_plan(7), torch.randint(VOCABULARY, (20, 2))
    engine = CpuEngine(plan)
    expected = decode(engine, make_caches(plan, 2, 20), tokens, [0, 0], [0, 0])
    with ThreadPoolExecutor(3) as pool:
        runs = [pool.submit(decode, engine, make_caches(plan, 2, 20), tokens, [0, 0], [0, 0]) for _ in range(6)]
    assert all(torch.equal(run.result(), expected) for run in runs)


def test_bad_tokens_and_positions_are_refused() -> None:
    plan = random_plan(8)
    plan = dataclasses.replace(plan, layers=[dataclasses.replace(layer, window=0) for layer in plan.layers])
    step = CpuEngine(plan).bind(make_caches(plan, 2, 4))
    good = torch.tensor([1, 2])
    for message, tokens, positions, starts in (
        ("tokens must be from 0 to 39", good + 38, good, good),
        ("positions must be below 4", good, good + 2, good),
        ("starts must be from 0 to positions", good, good, good + 1),
        (r"tokens must be contiguous int64 \[2\] on the CPU", good[:1], good, good),
        (r"positions must be contiguous int64 \[2\] on the CPU", good, good.int(), good),
    ):
        with pytest.raises(ValueError, match=message):
            step(tokens, positions, starts)


def test_what_does_not_fit_is_named() -> None:
    plan = random_plan(9)
    assert unfit(plan, make_caches(plan, 9, 1)) == "the CPU kernel takes at most 8 sequences, and these are 9"
    wide = dataclasses.replace(plan, final_norm=plan.final_norm.double())
    assert unfit(wide, make_caches(plan, 1, 1)) == "the CPU kernel takes contiguous weights of one dtype on the CPU"
    double = dataclasses.replace(plan, embedding=plan.embedding.double())
    assert unfit(double, make_caches(plan, 1, 1)) == "the CPU kernel takes no weights of torch.float64"
    halves = make_caches(dataclasses.replace(plan, embedding=plan.embedding.half()), 1, 1)
    assert unfit(plan, halves) == "the CPU kernel takes contiguous caches of the weights' dtype"
    odd = dataclasses.replace(plan.layers[0], up=plan.layers[0].up[:3])
    assert "experts of a multiple of 8" in str(unfit(dataclasses.replace(plan, layers=[odd]), make_caches(plan, 1, 1)))


def test_pieces_grow_with_the_cache(relative_rms: Callable[[Tensor, Tensor], float]) -> None:
    plan = random_plan(10)
    ours, theirs = (make_caches(plan, 2, 9000) for _ in range(2))
    for mine, other in zip(ours, theirs, strict=True):
        for name in ("keys", "values"):
            known = torch.randn(getattr(mine, name).shape)
            getattr(mine, name).copy_(known)
            getattr(other, name).copy_(known)
    tokens, positions, starts = torch.randint(VOCABULARY, (2, 2)), [8990, 4100], [0, 4000]
    actual = decode(CpuEngine(plan), ours, tokens, positions, starts)
    assert relative_rms(actual, decode(ReferenceEngine(plan), theirs, tokens, positions, starts)) <= 1e-5
