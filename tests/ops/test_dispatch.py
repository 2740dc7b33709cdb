"""Every path that the dispatcher knows gives the reference's result, and the tables decide which is taken."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from lte.ops import dispatch
from lte.ops.arguments import FfnWeights, Routing
from lte.ops.dispatch import FfnRunner, kernel_names, masked_ffn, warm_up_tokens
from lte.ops.layout import stack_inputs
from lte.ops.paths import BreakEven, ExpectedUse, FfnKind
from lte.ops.reference import sparse_ffn_reference
from tests.ops.conftest import BOUNDS, DEVICE, masks, random_ffn, random_router

Measure = Callable[[Tensor, Tensor], float]
HIDDEN, EXPERTS = 64, 6


def runner(x: Tensor, *, sparsity: float = 0.5, **kinds: Any) -> FfnRunner:
    weights = random_ffn(HIDDEN, EXPERTS, dtype=x.dtype, **kinds)
    return FfnRunner(weights, random_router(x, EXPERTS, sparsity, x.dtype), "silu")


def states(tokens: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(tokens, HIDDEN, device=DEVICE).to(dtype)


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The paths that were taken."""
    from lte.ops import decode, prefill

    names: list[str] = []

    def noting(name: str, function: Any) -> Any:
        def run(*arguments: Any, **named: Any) -> Tensor:
            names.append(name)
            return function(*arguments, **named)

        return run

    monkeypatch.setattr(decode.DecodeLaunch, "__call__", noting("decode", decode.DecodeLaunch.__call__))
    for path, kind in (("masked", prefill.MaskedLaunch), ("grouped", prefill.GroupedLaunch)):
        monkeypatch.setattr(kind, "activations", noting(path, kind.activations))
    return names


def set_table(monkeypatch: pytest.MonkeyPatch, *rows: BreakEven) -> None:
    monkeypatch.setattr(
        dispatch,
        "choose_path",
        lambda *given, union, core: original(
            *given,
            table={FfnKind(80, size, gated, 10**6): rows for size in (1, 4) for gated in (True, False)},
            union=union,
            core=core,
        ),
    )


original = dispatch.choose_path


class TestGpu:
    @pytest.mark.parametrize("kinds", [{}, {"int8": True}, {"gated": False, "biases": True}])
    @pytest.mark.parametrize("tokens", [1, 5, 20])
    @pytest.mark.parametrize("path", ["decode", "masked", "grouped"])
    def test_every_path_is_the_reference(
        self, path: str, tokens: int, kinds: Any, taken: list[str], monkeypatch: Any, relative_rms: Measure
    ) -> None:
        set_table(monkeypatch, BreakEven(tokens=99, decode=path == "decode", grouped=path == "grouped"))
        x = states(tokens)
        run = replace(runner(x, **kinds), arch=90, use=ExpectedUse(1.0))
        expected = sparse_ffn_reference(x, run.weights, run.routing, "silu")
        assert relative_rms(run.run_on_gpu(x, run.routing), expected) <= BOUNDS[x.dtype]
        assert taken == ["masked" if path == "decode" and tokens > 16 else path]

    def test_the_expected_share_decides(self, taken: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
        set_table(monkeypatch, BreakEven(tokens=99, decode=0.4))
        x = states(2)
        for fraction in (0.1, 0.5, None):
            run = replace(runner(x), arch=90, use=None if fraction is None else ExpectedUse(fraction))
            run.run_on_gpu(x, run.routing)
        assert taken == ["decode", "masked", "masked"]

    def test_the_core_counts_half_and_reaches_the_kernels(
        self, taken: list[str], monkeypatch: pytest.MonkeyPatch, relative_rms: Measure
    ) -> None:
        set_table(monkeypatch, BreakEven(tokens=99, grouped=0.4))
        x = states(20)
        plain = replace(runner(x), arch=90, use=ExpectedUse(0.5))
        run = replace(plain, routing=replace(plain.routing, core=2))  # of 6: 0.5 - 0.33 / 2
        expected = sparse_ffn_reference(x, run.weights, run.routing, "silu")
        for each in (plain, run):
            assert relative_rms(each.run_on_gpu(x, each.routing), expected) <= BOUNDS[x.dtype]
        given = torch.randn(20, EXPERTS, device=DEVICE)
        run.run_on_gpu(x, run._given(given))
        assert taken == ["masked", "grouped", "grouped"]
        assert [launch.core for launch in run._launches.values()] == [2, 2]

    def test_measured_unions_decide_by_whether_tokens_follow_each_other(
        self, taken: list[str], monkeypatch: pytest.MonkeyPatch, relative_rms: Measure
    ) -> None:
        set_table(monkeypatch, BreakEven(tokens=99, decode=0.4))
        use = ExpectedUse(0.3, texts=((2, 0.5), (4, 0.8)), row=((2, 0.3), (4, 0.39)))
        for tokens, in_a_row in ((1, False), (2, False), (2, True), (3, True), (5, True), (20, True), (2, False)):
            x = states(tokens)
            run = replace(runner(x), arch=90, use=use)
            expected = sparse_ffn_reference(x, run.weights, run.routing, "silu")
            assert relative_rms(run.run_on_gpu(x, run.routing, in_a_row), expected) <= BOUNDS[x.dtype]
        assert taken == ["decode", "masked", "decode", "decode", "masked", "masked", "masked"]

    def test_a_runner_keeps_both_ways(self, taken: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
        set_table(monkeypatch, BreakEven(tokens=99, decode=0.4))
        x = states(2)
        run = replace(runner(x), arch=90, use=ExpectedUse(0.3, texts=((2, 0.5),), row=((2, 0.3),)))
        for in_a_row in (True, False, True, False):
            run.run_on_gpu(x, run.routing, in_a_row)
        assert taken == ["decode", "masked"] * 2
        assert len(run._launches) == 2
        assert run.path_of(2, x.dtype) == ("masked" if x.is_cuda else "decode")  # of texts

    def test_a_kept_launch_takes_other_logits(self, relative_rms: Measure) -> None:
        x = states(1)
        run = replace(runner(x), arch=90)
        for hidden in (x, states(1)):
            found = run.run_on_gpu(hidden, run.routing)
            assert (
                relative_rms(found, sparse_ffn_reference(hidden, run.weights, run.routing, "silu")) <= BOUNDS[x.dtype]
            )
        for name in ("some", "one", "all"):
            given = Routing.forced(masks(1, EXPERTS)[name])
            expected = sparse_ffn_reference(x, run.weights, given, "silu")
            assert relative_rms(run.run_on_gpu(x, given), expected) <= BOUNDS[x.dtype]
        assert len(run._launches) == 2

    @pytest.mark.parametrize("tokens", [2, 20])
    def test_it_compiles_as_one_graph(self, tokens: int, relative_rms: Measure) -> None:
        torch.compiler.reset()
        x = states(tokens)
        run = replace(runner(x), arch=90)
        compiled = torch.compile(lambda x: run.run_on_gpu(x, run.routing), fullgraph=True, backend="aot_eager")
        assert relative_rms(compiled(x), run.run_on_gpu(x, run.routing)) <= BOUNDS[x.dtype]


@pytest.mark.skipif(DEVICE != "cpu", reason="what runs on a CPU")
class TestCpu:
    @pytest.mark.parametrize("kinds", [{}, {"int8": True}, {"gated": False, "biases": True}])
    @pytest.mark.parametrize("tokens", [1, 16, 17])
    @pytest.mark.parametrize("given", [False, True])
    def test_it_is_the_reference(self, tokens: int, kinds: Any, given: bool, relative_rms: Measure) -> None:
        x = states(tokens)
        run = runner(x, **kinds)
        routing = Routing.forced(masks(tokens, EXPERTS)["different"]) if given else run.routing
        expected = sparse_ffn_reference(x, run.weights, routing, "silu")
        assert relative_rms(run(x, routing.logits), expected) <= BOUNDS[x.dtype]

    @pytest.mark.parametrize(
        ("tokens", "dtype", "fraction", "int8", "kernel"),
        [
            (1, torch.float32, None, False, True),
            (16, torch.float32, None, False, True),
            (17, torch.float32, None, False, False),
            (1, torch.float64, None, False, False),
            (16, torch.bfloat16, 0.9, False, False),
            (16, torch.bfloat16, 0.1, False, True),
            (16, torch.bfloat16, None, True, True),
        ],
    )
    def test_the_kernel_runs_where_it_wins(
        self, tokens: int, dtype: torch.dtype, fraction: float | None, int8: bool, kernel: bool, monkeypatch: Any
    ) -> None:
        x = states(tokens, dtype)
        run = replace(runner(x, int8=int8), use=None if fraction is None else ExpectedUse(fraction))
        marks = {"sparse_ffn_cpu": True, "masked_ffn": False}
        for name, mark in marks.items():
            monkeypatch.setattr(dispatch, name, lambda *_, mark=mark: mark)
        assert run(x) is kernel
        monkeypatch.setattr(dispatch, "HAS_NUMBA", False)
        assert run(x) is False  # type: ignore[comparison-overlap]


class TestMasked:
    @pytest.mark.parametrize("dtype", BOUNDS)
    @pytest.mark.parametrize("kinds", [{}, {"int8": True}, {"gated": False}, {"biases": True}])
    def test_it_is_the_reference(self, dtype: torch.dtype, kinds: Any, relative_rms: Measure) -> None:
        x = states(33, dtype)
        run = runner(x, **kinds)
        expected = sparse_ffn_reference(x, run.weights, run.routing, "silu")
        assert relative_rms(masked_ffn(x, run.weights, run.routing, "silu"), expected) <= BOUNDS[dtype]

    def test_inactive_experts_may_hold_anything(self) -> None:
        x, mask = states(3), torch.tensor([[True] * (EXPERTS - 1) + [False]] * 3, device=DEVICE)
        weights = random_ffn(HIDDEN, EXPERTS)
        expected = masked_ffn(x, weights, Routing.forced(mask), "silu")
        weights.up[-32:] = torch.nan
        assert torch.equal(masked_ffn(x, weights, Routing.forced(mask), "silu"), expected)


def test_stacked_weights_give_the_same(relative_rms: Measure) -> None:
    x = states(20)
    run = runner(x)
    parts = stack_inputs(run.weights.up, run.weights.gate, run.routing.weight)
    weights = FfnWeights(up=parts.up, gate=parts.gate, down=run.weights.down, stacked=parts.stacked)
    routing = Routing(weight=parts.router, bias=run.routing.bias, threshold=run.routing.threshold)
    stacked = FfnRunner(weights, routing, "silu", arch=90)
    assert relative_rms(stacked.run_on_gpu(x, routing), run.run_on_gpu(x, run.routing)) <= BOUNDS[x.dtype]


class _Noting:
    """A kernel that notes the constants of its launches and does not run."""

    def __init__(self, name: str, noted: list[Any]):
        self.name, self.noted = name, noted

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *_, **constants: self.noted.append((self.name, sorted(constants.items(), key=str)))


@pytest.mark.parametrize("given", [False, True])
def test_after_the_warm_up_no_number_of_tokens_launches_another_kernel(
    given: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lte.ops import paths, prefill_kernels, prefill_launch

    noted: list[Any] = []
    names = ("skinny_product_kernel", "masked_activation_kernel", "list_tokens_kernel", "grouped_kernel")
    for name in names:
        monkeypatch.setattr(prefill_kernels, name, _Noting(name, noted))
    # The tables of this architecture have all the kernels.
    monkeypatch.setattr(prefill_launch, "architecture", lambda device: 90)
    monkeypatch.setattr(prefill_launch, "SKINNY_MIN_ROWS", 1)
    x = states(1400, torch.bfloat16)
    plain = runner(x[:2])
    parts = stack_inputs(plain.weights.up, plain.weights.gate, plain.routing.weight)
    weights = FfnWeights(up=parts.up, gate=parts.gate, down=plain.weights.down, stacked=parts.stacked)
    kind = dispatch.ffn_kind(weights.up, weights.gate, 90)
    rows = (BreakEven(tokens=300), BreakEven(tokens=2**31, grouped=0.6))
    monkeypatch.setitem(paths.MEASURED, kind, rows)  # type: ignore[arg-type]
    routing = Routing(weight=parts.router, bias=plain.routing.bias)
    logits = torch.zeros(len(x), EXPERTS, device=DEVICE) if given else None
    # The first layer, whose experts are nearly all active, takes no grouped product, and the second one does.
    layers = [FfnRunner(weights, routing, "silu", ExpectedUse(fraction), 90) for fraction in (0.9, 0.5)]
    done = set[Any]()
    for layer in layers:
        layer.warm_up(x[: warm_up_tokens(len(x))[-1]], logits, done)
    warm = list(noted)
    assert {name for name, _ in warm} == set(names)
    for layer in layers:
        for tokens in range(1, len(x) + 1, 7):
            layer.run_on_gpu(x[:tokens], routing if logits is None else Routing(logits=logits[:tokens]))
    assert len(noted) > 4 * len(warm)
    assert [launch for launch in noted if launch not in warm] == []
    noted.clear()
    layers[1].warm_up(x, logits, done)  # as after weights are loaded again
    assert noted == []
    assert len(warm_up_tokens(2**17)) < 64


def test_names() -> None:
    assert kernel_names(torch.device("cuda"), torch.bfloat16) == {"decode": "triton", "prefill": "triton"}
    assert kernel_names(torch.device("cpu"), torch.float32) == {"decode": "numba", "prefill": "pytorch"}
    assert kernel_names(torch.device("cpu"), torch.float64) == {"decode": "pytorch", "prefill": "pytorch"}
