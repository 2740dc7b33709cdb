"""Launches that are kept between calls compute what new ones do, and stop where they would no longer be right."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from lte.ops import dispatch, paths, prefill, prefill_kernels, prefill_launch
from lte.ops.arguments import Routing
from lte.ops.dispatch import FfnRunner
from lte.ops.layout import stack_inputs
from lte.ops.paths import BreakEven, ExpectedUse, FfnKind
from lte.ops.reference import sparse_ffn_reference
from tests.ops.conftest import BOUNDS, DEVICE, masks, random_ffn, random_router

HIDDEN, EXPERTS = 64, 6
KERNELS = ("skinny_product_kernel", "masked_activation_kernel", "list_tokens_kernel", "grouped_kernel")
ALL = ExpectedUse(1.0)
Measure = Callable[[Tensor, Tensor], float]


def states(tokens: int, dtype: torch.dtype = torch.float16) -> Tensor:
    return torch.randn(tokens, HIDDEN, device=DEVICE).to(dtype)


class CompilingKernel:
    """Runs a kernel in the interpreter, as Triton does on a GPU: what it gives back takes all arguments by position.

    That refuses arguments for which Triton would have compiled another kernel.
    """

    def __init__(self, kernel: Any):
        self.kernel, self.arg_names = kernel, kernel.arg_names
        self.compiled = self.launched = 0

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Any]:
        def compile_and_launch(*args: Any, **constants: Any) -> Any:
            self.compiled += 1
            self.kernel[grid](*args, **constants)
            return Compiled(self, [seen(value) for value in args], constants)

        return compile_and_launch


class Compiled:
    def __init__(self, kernel: CompilingKernel, arguments: list[Any], constants: dict[str, Any]):
        self.kernel, self.arguments, self.constants = kernel, arguments, constants

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        assert grid[1:] == (1, 1)

        def launch(*args: Any) -> None:
            named = dict(zip(self.kernel.arg_names, args, strict=True))
            assert [seen(value) for value in args[: len(self.arguments)]] == self.arguments
            settled = list(named)[len(self.arguments) :]
            assert {name: named[name] for name in settled} == {name: self.constants[name] for name in settled}
            self.kernel.launched += 1
            self.kernel.kernel[(grid[0],)](**named)

        return launch


def seen(value: Any) -> Any:
    """What Triton looks at in an argument."""
    return (value.dtype, value.data_ptr() % 16 == 0) if isinstance(value, Tensor) else type(value)


@pytest.fixture(params=["masked", "grouped"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The path of all numbers of tokens."""
    rows = (BreakEven(tokens=2**31, grouped=float(request.param == "grouped")),)
    table = {FfnKind(80, size, gated, 10**6): rows for size in (1, 2, 4) for gated in (True, False)}
    monkeypatch.setattr(
        dispatch, "choose_path", lambda *given, union, core: paths.choose_path(*given, table=table, core=core)
    )
    return request.param


@pytest.fixture
def compiling(monkeypatch: pytest.MonkeyPatch) -> dict[str, CompilingKernel]:
    """Stand-ins for the kernels, all of which are taken somewhere."""
    made = {name: CompilingKernel(getattr(prefill_kernels, name)) for name in KERNELS}
    for name, kernel in made.items():
        monkeypatch.setattr(prefill_kernels, name, kernel)
    monkeypatch.setattr(prefill_launch, "architecture", lambda device: 90)
    monkeypatch.setattr(prefill_launch, "SKINNY_MIN_ROWS", 1)
    return made


def stacked_runner(*, gated: bool = True, biases: bool = False, with_router: bool = True) -> FfnRunner:
    weights = random_ffn(HIDDEN, EXPERTS, gated=gated, biases=biases, dtype=torch.float16)
    routing = random_router(states(8), EXPERTS, 0.5, torch.float16)
    parts = stack_inputs(weights.up, weights.gate, routing.weight)
    weights = replace(weights, up=parts.up, gate=parts.gate, stacked=parts.stacked)
    return FfnRunner(weights, replace(routing, weight=parts.router) if with_router else routing, "silu", ALL, 90)


def plain_runner(**kinds: Any) -> FfnRunner:
    """Without `stacked`, and with a router in fp32 that counts as rounded."""
    routing = random_router(states(8), EXPERTS, 0.5, torch.float16)
    assert routing.weight is not None
    wide = replace(routing, weight=routing.weight.float(), rounded=torch.empty_like(routing.weight))
    return FfnRunner(random_ffn(HIDDEN, EXPERTS, dtype=torch.float16, **kinds), wide, "silu", ALL, 90)


def with_core(run: FfnRunner) -> FfnRunner:
    return replace(run, routing=replace(run.routing, core=2))


MADE: dict[str, Callable[[], FfnRunner]] = {
    "stacked": stacked_runner,
    "stacked without its router": lambda: stacked_runner(with_router=False, biases=True),
    "no gate": lambda: stacked_runner(gated=False, biases=True),
    "plain": plain_runner,
    "int8": lambda: plain_runner(int8=True, biases=True),
    "stacked, with a core": lambda: with_core(stacked_runner(biases=True)),
    "plain, with a core": lambda: with_core(plain_runner()),
}


def check(run: FfnRunner, x: Tensor, path: str, relative_rms: Measure, logits: Tensor | None = None) -> None:
    """A call is, bit for bit, that of a new launch, and the reference's within its bound."""
    routing = run.routing if logits is None else Routing(logits=logits, threshold=run.routing.threshold)
    output = run.run_on_gpu(x, routing)
    new = prefill.run_grouped if path == "grouped" else prefill.run_masked
    assert torch.equal(output, new(x.contiguous(), run.weights, routing, "silu"))
    assert relative_rms(output, sparse_ffn_reference(x, run.weights, routing, "silu")) <= BOUNDS[x.dtype]


@pytest.mark.parametrize("name", MADE)
def test_kept_launches_compute_what_new_ones_do(
    name: str, path: str, compiling: dict[str, CompilingKernel], relative_rms: Measure, poisoned: None
) -> None:
    run = MADE[name]()
    for tokens in (20, 130, 17, 140):
        check(run, states(tokens), path, relative_rms)
    misaligned = torch.cat([states(1).flatten()[:1], states(20).flatten()])[1:].view(20, HIDDEN)
    assert misaligned.data_ptr() % 16
    for x in (misaligned, states(20), states(2 * 20)[::2], misaligned):
        check(run, x, path, relative_rms)
    logits = Routing.forced(masks(25, EXPERTS)["different"]).logits
    assert logits is not None
    for given in (logits, logits[:20], logits.flatten()[1:121].view(20, EXPERTS)):
        check(run, states(len(given)), path, relative_rms, given)
    assert all(kernel.launched for kernel in compiling.values() if kernel.compiled)


def test_a_range_of_tokens_is_one_launch(path: str, compiling: dict[str, CompilingKernel]) -> None:
    run = stacked_runner()
    for tokens in (20, 33, 70):
        run.run_on_gpu(states(tokens), run.routing)
    kept = [kernel.compiled for kernel in compiling.values()]
    for tokens in (32, 17, 64, 48, 80, 128):
        run.run_on_gpu(states(tokens), run.routing)
    assert [kernel.compiled for kernel in compiling.values()] == kept
    assert len(run._launches) == 3


def test_what_changes_between_calls_counts(
    path: str, compiling: dict[str, CompilingKernel], relative_rms: Measure
) -> None:
    run = stacked_runner()
    x = states(20)
    check(run, x, path, relative_rms)
    run.weights.up.mul_(2)
    check(run, x, path, relative_rms)
    run.weights.gate.data, run.weights.down.data = states(192) / 8, states(192) / 14  # type: ignore[union-attr]
    check(run, x, path, relative_rms)
    run.weights.gate.data = torch.cat([states(192).flatten() / 8, x[0]])[1 : 1 + 192 * HIDDEN].view(192, HIDDEN)  # type: ignore[union-attr]
    check(run, x, path, relative_rms)
    run.routing.weight.data = -run.routing.weight  # type: ignore[union-attr,operator]
    check(run, x, path, relative_rms)
    run.routing = replace(run.routing, threshold=run.routing.threshold + 0.5)
    check(run, x, path, relative_rms)
    run.weights = random_ffn(HIDDEN, EXPERTS, dtype=x.dtype, biases=True)
    check(run, x, path, relative_rms)
    logits = torch.randn(20, EXPERTS, device=DEVICE)
    for threshold in (0.0, 0.7):
        run.routing = replace(run.routing, threshold=threshold)
        check(run, x, path, relative_rms, logits)


def test_int8_weights_take_states_of_any_dtype(path: str, compiling: Any, relative_rms: Measure) -> None:
    run = plain_runner(int8=True)
    run.routing = replace(run.routing, weight=run.routing.weight.half(), rounded=None)  # type: ignore[union-attr]
    for dtype in (torch.float16, torch.float32, torch.float16):
        check(run, states(20, dtype), path, relative_rms)


def test_on_another_gpu_than_the_current_one_nothing_is_kept(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run, x = stacked_runner(), states(20)
    expected = run.run_on_gpu(x, run.routing)
    run._launches.clear()
    monkeypatch.setattr(dispatch, "_current_device", lambda x: 1)
    assert torch.equal(run.run_on_gpu(x, run.routing), expected)
    assert not run._launches


def test_the_numbers_of_a_range_take_one_path() -> None:
    for kind in paths.MEASURED:
        side = round((kind.weight_bytes / kind.dtype_bytes / 3) ** 0.5)
        up = torch.empty(side, side, dtype=torch.bfloat16, device="meta")
        for fraction in (0.02, 0.3, 0.4, 0.45, 1.0):
            use = ExpectedUse(fraction, row=((16, min(2 * fraction, 1.0)),))
            run = FfnRunner(replace(stacked_runner().weights, up=up, gate=up), Routing(), "silu", use, kind.arch)
            for tokens in (*range(1, 600), *range(600, 5000, 13), 2**20):
                assert run._settled_path(tokens) == run._path(tokens)
                assert tokens > 16 or run._settled_path(tokens, in_a_row=True) == run._path(tokens, in_a_row=True)
