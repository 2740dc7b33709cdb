"""The CPU kernel and its plain PyTorch fallback against the reference."""

from __future__ import annotations

import contextlib
import dataclasses
import random
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from lte.ops import cpu
from lte.ops.activations import ACTIVATIONS
from lte.ops.arguments import FfnWeights, Routing
from lte.ops.cpu import cpu_kernel_wins, sparse_ffn_cpu
from lte.ops.reference import sparse_ffn_reference
from tests.ops import conftest
from tests.ops.conftest import BOUNDS, finer_router, masks, opposed_states, random_ffn, random_router

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(params=["kernel", "fallback"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, poisoned: None) -> str:
    """Runs a test on both paths; outputs and the kernel's scratch hold NaN before."""
    if request.param == "fallback":
        monkeypatch.setattr(cpu, "_kernel", lambda: None)
        monkeypatch.setattr(cpu, "_plans", {})
    else:
        pytest.importorskip("numba")
        monkeypatch.setattr(cpu._Local, "prepare", _prepare_poisoned)
    return request.param


def _prepare_poisoned(self, kernel, size, _prepare=cpu._Local.prepare):
    scratch, *others = _prepare(self, kernel, size)
    scratch[:] = float("nan")
    return scratch, *others


@pytest.fixture(autouse=True)
def on_the_cpu_without_gradients(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(conftest, "DEVICE", "cpu")
    with torch.no_grad():
        yield


@pytest.fixture
def check(path: str, relative_rms: Callable[[Tensor, Tensor], float]) -> Callable[..., Tensor]:
    """Compares a path with the reference; returns the output."""

    def compare(x: Tensor, weights: FfnWeights, routing: Routing, activation: str = "silu", note: Any = "") -> Tensor:
        actual = sparse_ffn_cpu(x, weights, routing, activation)
        assert actual.dtype == x.dtype
        assert relative_rms(actual, sparse_ffn_reference(x, weights, routing, activation)) <= BOUNDS[x.dtype], note
        return actual

    return compare


@pytest.mark.parametrize("hidden", [64, 100, 576])
@pytest.mark.parametrize("tokens", [1, 2, 7, 16])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_mask_equals_the_reference(check: Callable, dtype: torch.dtype, tokens: int, hidden: int) -> None:
    weights, x = random_ffn(hidden, 6, dtype=dtype), torch.randn(tokens, hidden).to(dtype)
    for name, mask in masks(tokens, 6).items():
        check(x, weights, Routing.forced(mask), note=name)


@pytest.mark.parametrize("biases", [False, True])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_form_of_ffn(check: Callable, activation: str, gated: bool, biases: bool) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        weights = random_ffn(100, 6, dtype=dtype, gated=gated, biases=biases)
        x = torch.randn(3, 100).to(dtype)
        check(x, weights, random_router(x, 6, 0.5), activation, note=dtype)


def test_random_shapes_and_masks(check: Callable) -> None:
    numbers = random.Random(0)
    for round_ in range(60):
        hidden, experts = numbers.randint(1, 300), numbers.randint(1, 9)
        size, tokens = numbers.choice([8, 16, 32, 64]), numbers.randint(1, 16)
        gated, biases, int8 = (numbers.random() < 0.5 for _ in range(3))
        dtype = numbers.choice([torch.float32, torch.bfloat16])
        weights = random_ffn(hidden, experts, size, dtype=dtype, gated=gated, biases=biases, int8=int8)
        x = torch.randn(tokens, hidden).to(dtype)
        routing = Routing.forced(torch.rand(tokens, experts) < numbers.random())
        activation = numbers.choice(list(ACTIVATIONS))
        check(x, weights, routing, activation, note=(round_, hidden, experts, size, tokens, gated, biases, int8))


@pytest.mark.parametrize("dtype", DTYPES)
def test_int8_weights(check: Callable, dtype: torch.dtype) -> None:
    x = torch.randn(5, 100).to(dtype)
    weights = random_ffn(100, 6, dtype=dtype, biases=True, int8=True)
    check(x, weights, Routing.forced(masks(5, 6)["different"]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_routers_in_fp32_and_in_the_dtype_of_x(check: Callable, dtype: torch.dtype) -> None:
    x = torch.randn(5, 100).to(dtype)
    weights = random_ffn(100, 9, dtype=dtype)
    for router_dtype in {dtype, torch.float32}:
        check(x, weights, random_router(x, 9, 0.5, router_dtype), note=router_dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_finer_router_counts_as_rounded(check: Callable, dtype: torch.dtype) -> None:
    x = opposed_states(3, 100, dtype)
    routing = finer_router(x, 6)
    assert not check(x, random_ffn(100, 6, dtype=dtype), routing).any()
    assert check(x, random_ffn(100, 6, dtype=dtype), dataclasses.replace(routing, rounded=None)).any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_16_bit_router_rounds_its_product(check: Callable, dtype: torch.dtype) -> None:
    # 1 + 2^-9 + 2^-12 in fp32 and 1 in bf16; the bias is added after that, in fp32.
    x = torch.zeros(1, 64, dtype=dtype)
    x[0, :3] = torch.tensor([1, 2**-9, 2**-12])
    router = torch.ones(1, 64, dtype=dtype)
    rounded = x.float().sum().to(dtype).item()
    weights = random_ffn(64, 1, dtype=dtype)
    for bias in (0.0, 2.0**-15):
        given = torch.tensor([bias])
        at, below = rounded + bias, rounded + bias - 2**-16
        assert not check(x, weights, Routing(weight=router, bias=given, threshold=at)).any()
        assert check(x, weights, Routing(weight=router, bias=given, threshold=below)).any()


def test_experts_at_the_threshold_are_off(path: str) -> None:
    routing = Routing(logits=torch.full((1, 6), 0.25), threshold=0.25)
    assert torch.equal(sparse_ffn_cpu(torch.randn(1, 64), random_ffn(64, 6), routing, "silu"), torch.zeros(1, 64))


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_token_is_bit_equal_in_every_batch_and_on_any_number_of_threads(dtype: torch.dtype, int8: bool) -> None:
    pytest.importorskip("numba")
    for hidden in (100, 256, 576):
        weights, x = random_ffn(hidden, 6, dtype=dtype, biases=True, int8=int8), torch.randn(16, hidden).to(dtype)
        routing = random_router(x, 6, 0.5)
        alone = torch.cat([sparse_ffn_cpu(token[None], weights, routing, "silu") for token in x])
        assert alone.any()
        for count in (1, 2, 3, 7):
            with threads(count):
                for part in (x, x[:3], x[5:12], x[[2]]):
                    start = next(i for i, row in enumerate(x) if torch.equal(row, part[0]))
                    together = sparse_ffn_cpu(part, weights, routing, "silu")
                    assert torch.equal(together, alone[start : start + len(part)]), (hidden, count, len(part))
                order = torch.randperm(16)
                assert torch.equal(sparse_ffn_cpu(x[order], weights, routing, "silu"), alone[order])


def test_runs_are_bit_equal(path: str) -> None:
    weights, x = random_ffn(576, 6), torch.randn(7, 576)
    routing = random_router(x, 6, 0.5)
    first = sparse_ffn_cpu(x, weights, routing, "silu")
    assert all(torch.equal(first, sparse_ffn_cpu(x, weights, routing, "silu")) for _ in range(10))


def test_weights_of_inactive_experts_are_not_read(path: str) -> None:
    weights, mask, x = random_ffn(64, 6), masks(2, 6)["some"], torch.randn(2, 64)
    expected = sparse_ffn_cpu(x, weights, Routing.forced(mask), "silu")
    off = (~mask[0]).repeat_interleave(32)
    for tensor in (weights.gate, weights.up, weights.down):
        tensor[off] = float("nan")
    assert torch.equal(sparse_ffn_cpu(x, weights, Routing.forced(mask), "silu"), expected)


def test_an_expert_that_is_not_finite_stays_with_its_tokens(path: str) -> None:
    weights, x = random_ffn(64, 6), torch.randn(2, 64)
    weights.up[:32] = float("inf")
    mask = torch.ones(2, 6, dtype=torch.bool)
    mask[0, 0] = False
    out = sparse_ffn_cpu(x, weights, Routing.forced(mask), "silu")
    assert out[0].isfinite().all()
    assert not out[1].isfinite().any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_nan_in_the_input_reaches_the_output(path: str, activation: str, dtype: torch.dtype) -> None:
    x = torch.randn(2, 64).to(dtype)
    x[1, 3] = float("nan")
    out = sparse_ffn_cpu(x, random_ffn(64, 6, dtype=dtype), Routing.forced(masks(2, 6)["all"]), activation)
    assert out[0].isfinite().all()
    assert out[1].isnan().all()


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_far_from_zero(check: Callable, activation: str) -> None:
    up = torch.zeros(32, 64)
    up[:, 0] = torch.tensor([0, 1e-30, 1e-3, 1, 5, 10, 20, 50, 87, 88, 89, 100, 1e3, 1e10, 1e15, 1e18]).repeat(2)
    up[16:] *= -1
    weights = FfnWeights(up=up, down=torch.eye(64)[:32].contiguous())
    x = torch.zeros(1, 64)
    x[0, 0] = 1
    out = check(x, weights, Routing.forced(torch.ones(1, 1, dtype=torch.bool)), activation)[0, :32]
    torch.testing.assert_close(out, ACTIVATIONS[activation](up[:, 0]), rtol=3e-6, atol=1e-6)


def test_inputs_of_other_layouts(check: Callable) -> None:
    weights, x = random_ffn(64, 6), torch.randn(6, 64)
    routing = random_router(x, 6, 0.5)
    check(x.T.contiguous().T, weights, routing)
    check(torch.empty(6 * 64 + 1)[1:].view(6, 64).copy_(x), weights, routing)


def test_misaligned_weights(check: Callable) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(3, 64).to(dtype)
        storage = torch.randn(3, 192 * 64 + 1).to(dtype) / 8
        up, gate, down = (row[1:].view(192, 64) for row in storage)
        check(x, FfnWeights(up=up, gate=gate, down=down), Routing.forced(masks(3, 6)["different"]), note=dtype)


def test_views_of_a_stacked_tensor(check: Callable) -> None:
    stacked = torch.randn(2 * 192 + 6, 64) / 8
    weights = FfnWeights(gate=stacked[:192], up=stacked[192:384], down=torch.randn(192, 64) / 14, stacked=stacked)
    check(torch.randn(3, 64), weights, Routing(weight=stacked[384:], threshold=0.01))


def test_changed_and_replaced_weights_are_seen(path: str) -> None:
    weights, x = random_ffn(64, 6), torch.randn(1, 64)
    routing = Routing.forced(masks(1, 6)["some"])
    first = sparse_ffn_cpu(x, weights, routing, "silu")
    weights.down.mul_(2)
    assert torch.equal(sparse_ffn_cpu(x, weights, routing, "silu"), 2 * first)
    replaced = dataclasses.replace(weights, down=-weights.down)
    assert torch.equal(sparse_ffn_cpu(x, replaced, routing, "silu"), -2 * first)
    transposed = dataclasses.replace(weights, down=weights.down.view(64, 192))
    with pytest.raises(ValueError, match=r"down must have shape \[192, 64\], got down=\[64, 192\]"):
        sparse_ffn_cpu(x, transposed, routing, "silu")


def test_plans_keep_no_tensors_and_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "_plans", {})
    monkeypatch.setattr(cpu, "_MOST_PLANS", 3)
    x, routing = torch.randn(1, 64), Routing.forced(masks(1, 2)["all"])
    kept = [random_ffn(64, 2) for _ in range(7)]
    for weights in kept:
        sparse_ffn_cpu(x, weights, routing, "silu")
        assert 1 <= len(cpu._plans) <= 3
    assert not any(isinstance(value, Tensor) for plan in cpu._plans.values() for value in vars(plan).values())


def test_several_python_threads_at_once(path: str) -> None:
    weights, x = random_ffn(100, 6), torch.randn(8, 100)
    routing = random_router(x, 6, 0.5)
    expected = sparse_ffn_cpu(x, weights, routing, "silu")
    results: list[bool] = []

    def work() -> None:
        with torch.no_grad():
            results.extend(torch.equal(sparse_ffn_cpu(x, weights, routing, "silu"), expected) for _ in range(50))

    workers = [threading.Thread(target=work) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert results == [True] * 200


# In a process of its own: a second caller of numba's workqueue would end it.
WORKQUEUE = """
import threading, warnings, numba, torch
numba.config.THREADING_LAYER = "workqueue"
from lte.ops.arguments import FfnWeights, Routing
from lte.ops.cpu import sparse_ffn_cpu
weights = FfnWeights(up=torch.randn(64, 64), down=torch.randn(64, 64))
routing = Routing.forced(torch.ones(4, 2, dtype=torch.bool))
x = torch.randn(4, 64)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(3):
        sparse_ffn_cpu(x, weights, routing, "relu")
assert numba.threading_layer() == "workqueue"
found = [str(warning.message) for warning in caught if "workqueue" in str(warning.message)]
assert len(found) == 1, found
def work():
    for _ in range(20):
        sparse_ffn_cpu(x, weights, routing, "relu")
workers = [threading.Thread(target=work) for _ in range(4)]
[worker.start() for worker in workers]
[worker.join() for worker in workers]
print("done")
"""


def test_the_threads_of_numba_leave_those_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    # As when they begin, once in a process, on the OpenMP library of torch.
    kernel = pytest.importorskip("lte.ops.cpu_kernel")
    monkeypatch.setattr(kernel, "use_threads", lambda count: torch.set_num_threads(count + 2))
    with threads(1):
        local = cpu._Local()
        for _ in range(2):
            assert local.prepare(kernel, 1)[1] == torch.get_num_threads() == 1


def test_workqueue_threads_are_guarded_by_a_lock() -> None:
    pytest.importorskip("numba")
    run = subprocess.run([sys.executable, "-c", WORKQUEUE], capture_output=True, text=True, check=False)
    assert run.stdout.strip() == "done", run.stderr


def test_compiles_as_one_graph(path: str, relative_rms: Callable[[Tensor, Tensor], float]) -> None:
    weights, x = random_ffn(64, 6), torch.randn(2, 64)
    routing = random_router(2 * x, 6, 0.5)
    model = torch.compile(
        lambda x: sparse_ffn_cpu(x * 2, weights, routing, "silu") + 1, fullgraph=True, backend="aot_eager"
    )
    assert relative_rms(model(x), sparse_ffn_reference(x * 2, weights, routing, "silu") + 1) <= 1e-5


def test_the_operator_keeps_to_its_declaration() -> None:
    weights, x = random_ffn(64, 6), torch.randn(2, 64)
    arguments = (x, weights.flat(), Routing(logits=torch.randn(2, 6)).flat(), 0.0, "silu")
    torch.library.opcheck(
        torch.ops.lte.sparse_ffn_cpu.default, arguments, test_utils=("test_schema", "test_faketensor")
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"up": torch.zeros(192, 64).half()}, "up must be torch.float32, the dtype of x, got up=torch.float16"),
        ({"down": torch.zeros(64, 192).T}, r"down must be contiguous, got down=\(1, 192\)"),
        ({"gate": torch.zeros(192, 65)}, r"gate must have shape \[192, 64\], got gate=\[192, 65\]"),
        ({"up_bias": torch.zeros(192).double()}, "up_bias must be one of .*, got up_bias=torch.float64"),
        ({"gate": torch.zeros(192, 64).to(torch.int8), "gate_scale": torch.ones(192)}, "must be all int8 or none"),
        ({"gate": torch.zeros(192, 64, device="meta")}, r"gate must be on the device of x \(cpu\), got gate=meta"),
    ],
)
def test_wrong_weights_are_refused(path: str, change: dict[str, Tensor], message: str) -> None:
    weights = dataclasses.replace(random_ffn(64, 6), **change)
    with pytest.raises(ValueError, match=message):
        sparse_ffn_cpu(torch.randn(1, 64), weights, Routing(weight=torch.zeros(6, 64)), "silu")


def test_wrong_calls_are_refused(path: str) -> None:
    weights, x = random_ffn(64, 6), torch.randn(1, 64)
    routing = Routing(weight=torch.ones(6, 64))
    sparse_ffn_cpu(x, weights, routing, "silu")
    for wrong, message in (
        (x.bfloat16(), "up must be torch.bfloat16, the dtype of x, got up=torch.float32"),
        (x.double(), "x must be float32, float16 or bfloat16, got x=torch.float64"),
        (torch.zeros(1, 65), r"up must have shape \[192, 65\]"),
        (torch.zeros(17, 64), r"1 to 16 tokens, got x=\[17, 64\]"),
        (torch.zeros(0, 64), r"1 to 16 tokens, got x=\[0, 64\]"),
        (torch.zeros(1, 1, 64), r"x must have shape \[tokens, hidden\]"),
        (torch.zeros(1, 64, device="meta"), "device of x"),
    ):
        with pytest.raises(ValueError, match=message):
            sparse_ffn_cpu(wrong, weights, routing, "silu")
    for wrong, message in (
        (Routing(weight=torch.ones(5, 64)), "neurons / experts must be one of 8, 16, 32, 64, got 192 / 5"),
        (Routing(weight=torch.ones(6, 64).double()), "weight must be one of .*, got weight=torch.float64"),
        (Routing(logits=torch.ones(1, 6).double()), "logits must be torch.float32, got logits=torch.float64"),
        (Routing(logits=torch.ones(2, 6)), r"logits must have shape \[1, 6\], got logits=\[2, 6\]"),
        (Routing(), "routing must hold weight or logits"),
    ):
        with pytest.raises(ValueError, match=message):
            sparse_ffn_cpu(x, weights, wrong, "silu")
    with pytest.raises(ValueError, match=r"activation must be .*mish"):
        sparse_ffn_cpu(x, weights, routing, "mish")
    with torch.enable_grad(), pytest.raises(ValueError, match="gradients must be off"):
        sparse_ffn_cpu(x.clone().requires_grad_(), weights, routing, "silu")


def test_where_the_kernel_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("numba")
    assert cpu_kernel_wins(torch.float32, 1, 1.0)
    assert cpu_kernel_wins(torch.bfloat16, 1, 0.9)
    assert not cpu_kernel_wins(torch.bfloat16, 16, 1.0)
    assert cpu_kernel_wins(torch.bfloat16, 16, 0.2)
    assert not cpu_kernel_wins(torch.float32, 17, 0.1)
    assert not cpu_kernel_wins(torch.float64, 1, 0.1)
    monkeypatch.setattr(cpu, "_kernel", lambda: None)
    assert not cpu_kernel_wins(torch.float32, 1, 0.1)


def test_without_numba_it_warns_once_and_is_right(
    monkeypatch: pytest.MonkeyPatch, relative_rms: Callable[[Tensor, Tensor], float]
) -> None:
    cpu._kernel.cache_clear()
    monkeypatch.setattr(cpu, "_plans", {})
    monkeypatch.setitem(sys.modules, "numba", None)
    for name in ("cpu_kernel", "cpu_tiles", "cpu_intrinsics"):
        monkeypatch.delitem(sys.modules, f"lte.ops.{name}", raising=False)
        monkeypatch.delattr(f"lte.ops.{name}", raising=False)
    weights, x = random_ffn(64, 6), torch.randn(1, 64)
    routing = Routing.forced(masks(1, 6)["some"])
    try:
        with pytest.warns(RuntimeWarning, match="numba is not installed"):
            out = sparse_ffn_cpu(x, weights, routing, "silu")
        assert relative_rms(out, sparse_ffn_reference(x, weights, routing, "silu")) <= 1e-5
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            sparse_ffn_cpu(x, weights, routing, "silu")
    finally:
        cpu._kernel.cache_clear()


def test_importing_the_module_does_not_import_numba() -> None:
    code = "import sys, lte.ops.cpu; sys.exit('numba' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("at", ["find", "write"])
def test_a_cache_that_cannot_be_used_costs_time_alone(at: str, monkeypatch: pytest.MonkeyPatch) -> None:
    numba = pytest.importorskip("numba")
    from lte.ops import cpu_kernel

    def fails(*arguments: Any) -> None:
        raise RuntimeError("no locator available") if at == "find" else OSError("disk full")

    target = {"find": "_impl_class", "write": "_save_overload"}[at]
    monkeypatch.setattr(cpu_kernel._OptionalCache, target, fails)
    with pytest.warns(RuntimeWarning, match="compiles the CPU kernel, which takes some seconds; set NUMBA_CACHE_DIR"):
        assert cpu_kernel.with_cache(numba.njit(lambda x: x + 1))(1) == 2
