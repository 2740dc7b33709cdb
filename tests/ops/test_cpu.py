"""The CPU decode kernel and its plain PyTorch fallback against a dense fp32 computation."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import warnings
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from lte.ops import cpu
from lte.ops.cpu import ACTIVATIONS, DecodeWeights, sparse_ffn_decode, store_by_neuron_

EXPERTS, SIZE = 6, 32
NEURONS = EXPERTS * SIZE
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
PATTERNS = ("none", "one", "some", "all", "per_token")


@pytest.fixture(params=["kernel", "fallback"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Runs a test on both paths; the kernel's scratch is poisoned either way."""
    if request.param == "fallback":
        monkeypatch.setattr(cpu, "_kernel", lambda: None)
    else:
        pytest.importorskip("numba")
        monkeypatch.setattr(cpu._Local, "prepare", _prepare_poisoned)
    return request.param


def _prepare_poisoned(self, kernel, size, dtype, _prepare=cpu._Local.prepare):
    scratch, like, threads = _prepare(self, kernel, size, dtype)
    scratch[:] = float("nan")
    return scratch, like, threads


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def make_weights(
    hidden: int,
    dtype: torch.dtype = torch.float32,
    *,
    activation: str = "silu",
    gated: bool = True,
    biased: bool = False,
) -> DecodeWeights:
    generator = torch.Generator().manual_seed(hidden)

    def normal(*shape: int, fan_in: int) -> Tensor:
        return torch.randn(*shape, generator=generator) * fan_in**-0.5

    up = normal(NEURONS, hidden, fan_in=hidden).to(dtype)
    gate = normal(NEURONS, hidden, fan_in=hidden).to(dtype) if gated else None
    down = normal(NEURONS, hidden, fan_in=NEURONS).to(dtype).T
    sizes = (NEURONS if gated else 0, NEURONS, hidden)
    biases = tuple(normal(size, fan_in=4).to(dtype) if biased and size else None for size in sizes)
    router = normal(EXPERTS, hidden, fan_in=hidden), normal(EXPERTS, fan_in=4)
    return DecodeWeights(up, down, EXPERTS, activation, gate, biases, router)


def make_logits(pattern: str, tokens: int) -> Tensor:
    """Logits [T, E] of which those above 0 are active."""
    active = torch.zeros(tokens, EXPERTS, dtype=torch.bool)
    if pattern == "per_token":
        active = torch.rand(tokens, EXPERTS, generator=torch.Generator().manual_seed(1)) > 0.5
    else:
        active[:, {"none": [], "one": [4], "some": [0, 2, 5], "all": range(EXPERTS)}[pattern]] = True
    return torch.where(active, 1.0, -1.0)


def reference(x: Tensor, weights: DecodeWeights, threshold: float, logits: Tensor | None = None) -> Tensor:
    """The dense computation in fp32, with the intermediate activations of inactive experts set to zero."""
    x = x.float()
    gate, up, down, *biases, router, router_bias = (t if t is None else t.float() for t in weights.tensors())
    logits = functional.linear(x, router, router_bias) if logits is None else logits
    activation = ACTIVATIONS[weights.activation]
    hidden = functional.linear(x, up, biases[1])
    hidden = activation(hidden) if gate is None else hidden * activation(functional.linear(x, gate, biases[0]))
    return functional.linear(hidden * (logits > threshold).repeat_interleave(SIZE, -1), down, biases[2])


def assert_close(actual: Tensor, expected: Tensor) -> None:
    """Relative RMS, or exact zeros."""
    error = (actual.float() - expected).square().mean().sqrt()
    assert error <= TOLERANCE[actual.dtype] * expected.square().mean().sqrt()


def make_input(tokens: int, hidden: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(tokens, hidden, generator=torch.Generator().manual_seed(tokens)).to(dtype)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("hidden", [64, 100, 576])
@pytest.mark.parametrize("tokens", [1, 2, 7, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_the_dense_computation(path: str, dtype: torch.dtype, tokens: int, hidden: int, pattern: str) -> None:
    weights = make_weights(hidden, dtype)
    x, logits = make_input(tokens, hidden, dtype), make_logits(pattern, tokens)
    out = sparse_ffn_decode(x, weights, 0.0, logits)
    assert out.dtype == dtype
    assert out.shape == x.shape
    assert_close(out, reference(x, weights, 0.0, logits))


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_form_of_ffn(path: str, dtype: torch.dtype, activation: str, gated: bool, biased: bool) -> None:
    weights = make_weights(100, dtype, activation=activation, gated=gated, biased=biased)
    x = make_input(3, 100, dtype)
    assert_close(sparse_ffn_decode(x, weights, 0.1), reference(x, weights, 0.1))


def test_experts_at_the_threshold_are_off(path: str) -> None:
    logits = torch.full((1, EXPERTS), 0.25)
    out = sparse_ffn_decode(make_input(1, 64), make_weights(64), 0.25, logits)
    assert torch.equal(out, torch.zeros(1, 64))


@pytest.mark.parametrize("size", [1, 17, 48])
def test_expert_sizes_that_blocks_do_not_divide(path: str, size: int) -> None:
    up, gate, down = (torch.randn(4 * size, 64) / 8 for _ in range(3))
    weights = DecodeWeights(up, down.T, 4, gate=gate)
    x = make_input(2, 64)
    logits = torch.tensor([[1.0, -1, -1, 1], [-1, -1, 1, 1]])
    mask = (logits > 0).repeat_interleave(size, -1)
    expected = (functional.silu(x @ gate.T) * (x @ up.T) * mask) @ down
    assert_close(sparse_ffn_decode(x, weights, 0.0, logits), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_token_is_bit_equal_to_itself_alone_on_any_number_of_threads(dtype: torch.dtype) -> None:
    pytest.importorskip("numba")
    weights, x = make_weights(100, dtype, biased=True), make_input(16, 100, dtype)
    before = torch.get_num_threads()
    try:
        together = {}
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            together[threads] = sparse_ffn_decode(x, weights, 0.1)
            alone = torch.cat([sparse_ffn_decode(token[None], weights, 0.1) for token in x])
            assert torch.equal(together[threads], alone)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(together[1], together[2])
    assert torch.equal(together[1], together[3])


def test_runs_are_bit_equal(path: str) -> None:
    weights, x = make_weights(576), make_input(7, 576)
    first = sparse_ffn_decode(x, weights, 0.1)
    assert all(torch.equal(first, sparse_ffn_decode(x, weights, 0.1)) for _ in range(10))


def test_weights_of_inactive_experts_are_not_read(path: str) -> None:
    weights, logits = make_weights(64), make_logits("some", 2)
    expected = sparse_ffn_decode(make_input(2, 64), weights, 0.0, logits)
    off = (logits[0] < 0).repeat_interleave(SIZE)
    for tensor in (weights.gate, weights.up, weights.down.T):
        tensor[off] = float("nan")
    assert torch.equal(sparse_ffn_decode(make_input(2, 64), weights, 0.0, logits), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_nan_in_the_input_reaches_the_output(path: str, activation: str, dtype: torch.dtype) -> None:
    x = make_input(2, 64, dtype)
    x[1, 3] = float("nan")
    weights = make_weights(64, dtype, activation=activation)
    out = sparse_ffn_decode(x, weights, 0.0, make_logits("all", 2))
    assert out[0].isfinite().all()
    assert out[1].isnan().all()


def test_inputs_of_other_layouts_and_ranks(path: str) -> None:
    weights, x = make_weights(64), make_input(6, 64)
    expected = sparse_ffn_decode(x, weights, 0.1)
    assert torch.equal(sparse_ffn_decode(x.T.contiguous().T, weights, 0.1), expected)
    assert torch.equal(sparse_ffn_decode(x.view(2, 3, 64), weights, 0.1), expected.view(2, 3, 64))
    logits = functional.linear(x, *weights.router).T.contiguous().T
    assert_close(sparse_ffn_decode(x, weights, 0.1, logits), expected)


def test_changed_and_replaced_weights_are_seen(path: str) -> None:
    linear = torch.nn.Linear(NEURONS, 64, bias=False)
    store_by_neuron_(linear)
    weights = dataclasses.replace(make_weights(64), down=linear.weight)
    x, logits = make_input(1, 64), make_logits("all", 1)
    first = sparse_ffn_decode(x, weights, 0.0, logits)
    linear.weight.mul_(2)
    assert_close(sparse_ffn_decode(x, weights, 0.0, logits), 2 * first)
    linear.weight.data = -linear.weight.data
    assert_close(sparse_ffn_decode(x, weights, 0.0, logits), -2 * first)
    linear.to(torch.bfloat16)
    with pytest.raises(ValueError, match=r"down must be torch.float32 of shape \(64, 192\).*got torch.bfloat16"):
        sparse_ffn_decode(x, weights, 0.0, logits)


def test_store_by_neuron_keeps_values_and_shape() -> None:
    linear = torch.nn.Linear(NEURONS, 64)
    x, before = torch.randn(2, NEURONS), linear.weight.clone()
    expected = linear(x)
    store_by_neuron_(linear)
    assert linear.weight.stride() == (1, 64)
    assert torch.equal(linear.weight, before)
    torch.testing.assert_close(linear(x), expected)


def test_compiles_as_one_graph(path: str) -> None:
    weights, x = make_weights(64), make_input(2, 64)
    model = torch.compile(lambda x: sparse_ffn_decode(x * 2, weights, 0.1) + 1, fullgraph=True, backend="aot_eager")
    assert_close(model(x), reference(x * 2, weights, 0.1) + 1)


def test_the_operator_keeps_to_its_declaration() -> None:
    weights, x = make_weights(64), make_input(2, 64)
    operator = torch.ops.lte.sparse_ffn_decode_cpu.default
    logits = make_logits("some", 2)
    torch.library.opcheck(
        operator, (x, weights.tensors(), logits, 0.0, EXPERTS, "silu"), test_utils=("test_schema", "test_faketensor")
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"up": torch.zeros(192, 64).half()}, r"up must be \[F, D\] of float32 or bfloat16, got torch.float16"),
        ({"num_experts": 5}, "num_experts must divide 192 neurons, got num_experts=5"),
        ({"activation": "mish"}, "activation must be one of silu, .*, got activation='mish'"),
        ({"down": torch.zeros(64, 192)}, r"down must have strides \(1, 64\), got .*; call store_by_neuron_"),
        ({"gate": torch.zeros(64, 192).T}, r"gate must have strides \(64, 1\), got .*; call .contiguous\(\)"),
        ({"gate": torch.zeros(192, 65)}, r"gate must be torch.float32 of shape \(192, 64\)"),
        ({"router": (torch.zeros(6, 64).bfloat16(), None)}, "router weight must be torch.float32"),
    ],
)
def test_wrong_weights_are_refused(path: str, change: dict[str, object], message: str) -> None:
    weights = dataclasses.replace(make_weights(64), **change)
    with pytest.raises(ValueError, match=message):
        sparse_ffn_decode(make_input(1, 64, weights.up.dtype), weights, 0.0)


def test_wrong_calls_are_refused(path: str) -> None:
    weights, x = make_weights(64), make_input(1, 64)
    for wrong in (x.bfloat16(), torch.zeros(1, 65)):
        with pytest.raises(ValueError, match=r"x must be \[..., 64\] of torch.float32 on the CPU"):
            sparse_ffn_decode(wrong, weights, 0.0)
    with pytest.raises(ValueError, match="x must hold 1 to 16 tokens, got 17"):
        sparse_ffn_decode(make_input(17, 64), weights, 0.0)
    with pytest.raises(ValueError, match=r"logits must be float32 of shape \(1, 6\)"):
        sparse_ffn_decode(x, weights, 0.0, torch.zeros(1, 5))
    with pytest.raises(ValueError, match="logits must be given"):
        sparse_ffn_decode(x, dataclasses.replace(weights, router=None), 0.0)
    with torch.enable_grad(), pytest.raises(ValueError, match="gradients must be off"):
        sparse_ffn_decode(x.clone().requires_grad_(), weights, 0.0)


def test_without_numba_it_warns_once_and_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu._kernel.cache_clear()
    monkeypatch.setitem(sys.modules, "numba", None)
    monkeypatch.delitem(sys.modules, "lte.ops.cpu_kernel", raising=False)
    monkeypatch.delattr("lte.ops.cpu_kernel", raising=False)
    weights, x = make_weights(64), make_input(1, 64)
    try:
        with pytest.warns(RuntimeWarning, match="numba is not installed"):
            out = sparse_ffn_decode(x, weights, 0.1)
        assert_close(out, reference(x, weights, 0.1))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            sparse_ffn_decode(x, weights, 0.1)
    finally:
        cpu._kernel.cache_clear()


def test_importing_the_module_does_not_import_numba() -> None:
    code = "import sys, lte.ops.cpu; sys.exit('numba' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
