"""The sparse FFN for 1 to 16 tokens on a CPU: `lte::sparse_ffn_cpu`, which reads active experts and no others.

The kernel (`lte.ops.cpu_kernel`) needs numba (`pip install numba`). Without it a slower path in plain PyTorch gathers
the rows of the active experts; it also skips the others, and says once that it is slow.

Shapes: T tokens, D hidden size, F neurons, E experts of S = F / E neurons each.
"""

from __future__ import annotations

import contextlib
import functools
import threading
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from lte.ops.activations import ACTIVATIONS
from lte.ops.arguments import MAX_TOKENS, FfnWeights, Routing, check_arguments
from lte.ops.cpu_fallback import gather_ffn

# In the order of `LIKE` of the kernel.
_NUMBERS = (torch.float32, torch.bfloat16, torch.float16, torch.int8)
_FLOATS = _NUMBERS[:3]
# (dtype, most tokens): the active fraction up to which the kernel takes less time than the dense FFN in PyTorch, each
# token with experts of its own: results/cpu_decode.json.
_WINS: dict[tuple[torch.dtype, int], float] = {
    (torch.float32, 16): 1.0,
    (torch.bfloat16, 4): 1.0,
    (torch.bfloat16, 16): 0.5,
}
_MOST_PLANS = 4096
_NO_NUMBA = "numba is not installed: sparse FFNs decode on a slower path; pip install numba brings the fast kernel"
_WORKQUEUE = (
    "numba runs on its workqueue threads, which only one caller may use at a time: sparse FFNs in several Python "
    "threads wait for each other; install libgomp or the package tbb to lift that"
)
# Held, since vLLM puts a function in its place that does nothing, and then computes with the count of its own start.
_SET_NUM_THREADS = torch.set_num_threads


def sparse_ffn_cpu(x: Tensor, weights: FfnWeights, routing: Routing, activation: str) -> Tensor:
    """Computes (m * act(x W_gate) * (x W_up)) W_down with m = 1[logit > threshold], reading active experts alone.

    Sums are fp32; a token's result depends neither on the other tokens nor on the number of threads. Nothing of the
    weights is copied: changes in place are seen by the next call. `torch.compile` takes it as one operation.

    Args:
        x: hidden states [T, D] on the CPU, T from 1 to 16, fp32, fp16 or bf16.
        weights: the projections; in the dtype of x, or all of them int8 with scales.
        routing: what decides on m.
        activation: a key of `ACTIVATIONS`.

    Returns:
        [T, D] in the dtype of x.

    Raises:
        ValueError: if shapes, dtypes, devices or layouts do not fit, or a gradient is wanted.
    """
    if torch.compiler.is_compiling():
        return torch.ops.lte.sparse_ffn_cpu(x, weights.flat(), routing.flat(), routing.threshold, activation)
    if routing.rounded is not None and routing.logits is None:
        routing = replace(routing, weight=routing.rounded_weight(), rounded=None)
    plan = _find_plan(x, weights, routing, activation)
    if not 1 <= x.shape[0] <= MAX_TOKENS or routing.logits is not None:
        _check(x, weights, routing, activation)
    if torch.is_grad_enabled() and (x.requires_grad or weights.up.requires_grad):
        raise ValueError("gradients must be off for sparse_ffn_cpu, got grad enabled; use torch.no_grad() or SparseFfn")
    kernel = _kernel()
    if kernel is None or (x.dtype == torch.float16 and not kernel.HAS_FLOAT16):
        return gather_ffn(x, weights, routing, activation)
    x = x.contiguous()
    out = x.new_empty(x.shape)
    logits = 0 if routing.logits is None else routing.logits.data_ptr()
    addresses = (x.data_ptr(), logits, out.data_ptr())
    tokens = x.shape[0]
    scratch, threads, guard = _LOCAL.prepare(kernel, plan.scratch_per_token * tokens)
    with guard:
        kernel.sparse_ffn(
            plan.numbers, kernel.np.float32(routing.threshold), addresses, tokens, threads, scratch, *plan.likes
        )
    return out


def cpu_kernel_wins(dtype: torch.dtype, tokens: int, active_fraction: float) -> bool:
    """Whether `sparse_ffn_cpu` is faster than the dense FFN in PyTorch.

    It says no only where a matrix product in bf16 instructions beats the kernel's fp32 sums: many tokens with many
    active experts. Measured on 2 cores of an AMD EPYC (Zen 4) at the widths of SmolLM2-135M.

    Args:
        dtype: of the hidden states.
        tokens: T.
        active_fraction: share of the FFN's neurons that a token is expected to use.

    Returns:
        `False` also without numba, beyond 16 tokens, and for a dtype that the kernel does not take.
    """
    limits = [limit for (known, most), limit in _WINS.items() if known == dtype and tokens <= most]
    kernel = _kernel() if limits else None
    if kernel is None or (dtype == torch.float16 and not kernel.HAS_FLOAT16):
        return False
    return active_fraction <= limits[0]


def cpu_kernel_available() -> bool:
    """Whether numba is installed, so that `sparse_ffn_cpu` runs the fast kernel; warns once if it is not."""
    return _kernel() is not None


@functools.cache
def _kernel() -> ModuleType | None:
    try:
        from lte.ops import cpu_kernel
    except ModuleNotFoundError as error:
        if error.name not in ("numba", "llvmlite"):
            raise
        warnings.warn(_NO_NUMBA, RuntimeWarning, stacklevel=3)
        return None
    return cpu_kernel


@dataclass(frozen=True)
class _Plan:
    """What the kernel takes besides x; holds addresses and sizes, no tensors, and so keeps no memory alive."""

    numbers: Any
    likes: tuple[Any, Any, Any]
    scratch_per_token: int


# By the layout and address of all tensors: whatever lies there now is what the plan describes.
_plans: dict[Any, _Plan | None] = {}


def _find_plan(x: Tensor, weights: FfnWeights, routing: Routing, activation: str) -> Any:
    """The kernel's plan; the arguments are checked when it is made, its key then stands for the checks."""
    w, weight, bias = weights, routing.weight, routing.bias
    tensors = (
        w.gate, w.up, w.down, w.gate_bias, w.up_bias, w.down_bias, w.gate_scale, w.up_scale, w.down_scale, weight, bias
    )  # fmt: skip
    given = None if routing.logits is None else routing.logits.shape[-1]
    layouts = [None if t is None else (t.data_ptr(), t.dtype, t.shape, t.is_contiguous(), t.device) for t in tensors]
    key = (activation, given, x.shape[-1], x.dim(), x.dtype, x.device, *layouts)
    try:
        return _plans[key]
    except KeyError:
        _check(x, weights, routing, activation)
    kernel = _kernel()
    plan = None
    if kernel is not None:
        sizes = (x.shape[1], len(w.up), routing.num_experts)
        kinds = [0 if t is None else _FLOATS.index(t.dtype) for t in (w.gate_bias, w.up_bias, w.down_bias, bias)]
        numbers = [0 if t is None else t.data_ptr() for t in tensors]
        numbers += [*sizes, list(ACTIVATIONS).index(activation), *kinds]
        router_dtype = torch.float32 if weight is None else weight.dtype
        likes = [kernel.LIKE[_NUMBERS.index(dtype)] for dtype in (x.dtype, w.up.dtype, router_dtype)]
        plan = _Plan(kernel.np.array(numbers, kernel.np.int64), tuple(likes), kernel.scratch_per_token(*sizes))
    if len(_plans) >= _MOST_PLANS:
        _plans.clear()
    _plans[key] = plan
    return plan


def _check(x: Tensor, weights: FfnWeights, routing: Routing, activation: str) -> None:
    """What `check_arguments` checks, and what this path needs besides."""
    check_arguments(x, weights, routing, activation)
    if not x.is_cpu:
        raise ValueError(f"x must be on the CPU, got x={x.device}; sparse_ffn_decode runs on a GPU")
    floats = ", ".join(str(dtype) for dtype in _FLOATS)
    for name, tensor in (
        ("weight", routing.weight),
        ("bias", routing.bias),
        *((name, getattr(weights, name)) for name in ("gate_bias", "up_bias", "down_bias")),
    ):
        if tensor is not None and tensor.dtype not in _FLOATS:
            raise ValueError(f"{name} must be one of {floats}, got {name}={tensor.dtype}")
    if routing.logits is not None and routing.logits.dtype != torch.float32:
        raise ValueError(f"logits must be torch.float32, got logits={routing.logits.dtype}")
    dtypes = {t.dtype for t in (weights.gate, weights.up, weights.down) if t is not None}
    if len(dtypes) > 1:
        raise ValueError(f"gate, up and down must be all int8 or none, got {sorted(map(str, dtypes))}")


class _Local(threading.local):
    """What each thread keeps between calls: scratch memory, and how many threads numba was told to use."""

    def __init__(self) -> None:
        self.scratch: Any = None
        self.threads = 0

    def prepare(self, kernel: ModuleType, size: int) -> tuple[Any, int, contextlib.AbstractContextManager[Any]]:
        """Scratch of at least `size` numbers, torch's number of threads, and what to hold while the kernel runs."""
        if self.scratch is None or len(self.scratch) < size:
            self.scratch = kernel.np.empty(size, kernel.np.float32)
        threads = torch.get_num_threads()
        if threads != self.threads:
            kernel.use_threads(threads)
            # numba's threads, which begin here, set the count of the OpenMP library that torch may share with them.
            if torch.get_num_threads() != threads:
                _SET_NUM_THREADS(threads)
            self.threads = threads
        return self.scratch, threads, _guard(kernel.threading_layer)


_LOCAL = _Local()
_ONE_CALLER = threading.Lock()


@functools.cache
def _guard(threading_layer: Any) -> contextlib.AbstractContextManager[Any]:
    """A lock if numba's threads take one caller at a time: a second one would end the process."""
    if threading_layer() != "workqueue":
        return contextlib.nullcontext()
    warnings.warn(_WORKQUEUE, RuntimeWarning, stacklevel=4)
    return _ONE_CALLER


# Lists, since the operation's schema cannot hold a dataclass. Called directly it costs several times more per call.
@torch.library.custom_op("lte::sparse_ffn_cpu", mutates_args=(), device_types="cpu")
def _cpu_op(
    x: Tensor,
    weights: Sequence[Tensor | None],
    routing: Sequence[Tensor | None],
    threshold: float,
    activation: str,
) -> Tensor:
    route = Routing.from_flat(routing, threshold)
    with torch.no_grad():
        return sparse_ffn_cpu(x, FfnWeights.from_flat(list(weights)), route, activation)


@_cpu_op.register_fake
def _(
    x: Tensor, weights: Sequence[Tensor | None], routing: Sequence[Tensor | None], threshold: float, activation: str
) -> Tensor:
    return x.new_empty(x.shape)
