"""Decoding through a sparse FFN on the CPU: reads the weights of the active experts and no others.

The kernel (`lte.ops.cpu_kernel`) needs numba, the extra `lte[cpu]`. Without it a slower path in plain PyTorch gathers
the rows of the active experts; it also skips the others, and says once that it is slow.

Int8 weights with a scale per neuron would be a third type of `like` in the kernel's `_load`, with the scales as three
more addresses of its plan: the two input scales multiply the dot products, the one of `down` the neuron's value.

Shapes: T tokens, D hidden size, F neurons, E experts of S = F / E neurons.
"""

from __future__ import annotations

import functools
import threading
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

MAX_TOKENS = 16
# Names in the order of the kernel's codes.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": functools.partial(functional.gelu, approximate="tanh"),
    "relu": functional.relu,
    "relu2": lambda x: functional.relu(x).square(),
}
_NO_NUMBA = "numba is not installed: sparse FFNs decode on a slower path; pip install 'lte[cpu]' brings the fast kernel"


@dataclass(frozen=True, eq=False)
class DecodeWeights:
    """The tensors of one sparse FFN, as they are: nothing is copied, and changes in place are seen.

    Attributes:
        up: [F, D], contiguous; the one input projection of a plain FFN.
        down: [D, F] with strides (1, D), one neuron after the other in memory; see `store_by_neuron_`.
        num_experts: E.
        activation: a name of `ACTIVATIONS`.
        gate: [F, D], contiguous; `None` for a plain FFN.
        biases: of gate, up and down, [F], [F] and [D], each may be `None`.
        router: fp32 weight [E, D] and bias [E] or `None`; no router if the logits are given with each call.
    """

    up: Tensor
    down: Tensor
    num_experts: int
    activation: str = "silu"
    gate: Tensor | None = None
    biases: tuple[Tensor | None, Tensor | None, Tensor | None] = (None, None, None)
    router: tuple[Tensor, Tensor | None] | None = None
    _checked: dict[Any, Any] = field(default_factory=dict, init=False, repr=False)

    def tensors(self) -> tuple[Tensor | None, ...]:
        """In the order of the kernel's plan: gate, up, down, their biases, router weight and bias."""
        return (self.gate, self.up, self.down, *self.biases, *(self.router or (None, None)))


def store_by_neuron_(down: nn.Linear) -> None:
    """Lays the weight of a down projection out as [F, D] in memory; it keeps its shape [D, F] and all uses."""
    down.weight.data = down.weight.data.T.contiguous().T


def kernel_available() -> bool:
    """Whether numba is installed, so that `sparse_ffn_decode` runs the fast kernel."""
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


def sparse_ffn_decode(
    x: Tensor, weights: DecodeWeights, threshold_logit: float, logits: Tensor | None = None
) -> Tensor:
    """The hard-mode FFN of `SparseFfn`, for the few tokens of a decoding step; each token has its own experts.

    sum over experts e with s_e > threshold_logit of act(x W_gate,e + b) * (x W_up,e + b) W_down,e, plus the bias of
    down. Sums are fp32; a token's result does not depend on the other tokens or the number of threads.

    Args:
        x: [T, D] or [..., D] on the CPU, fp32 or bf16 as the weights, T from 1 to 16.
        weights: of the FFN.
        threshold_logit: experts with larger logits are active.
        logits: fp32 [T, E] or [..., E] from a router of another form; by default those of `weights.router`.

    Returns:
        As x.

    Raises:
        ValueError: if a shape, dtype or layout is wrong, or a gradient is wanted.
    """
    if torch.compiler.is_compiling():
        return torch.ops.lte.sparse_ffn_decode_cpu(
            x, weights.tensors(), logits, threshold_logit, weights.num_experts, weights.activation
        )
    tokens = _check_input(x, weights, logits)
    plan = _checked_plan(weights)
    kernel = _kernel()
    if kernel is None:
        return _gather_path(x, weights, threshold_logit, logits)
    x = x.contiguous()
    out = torch.empty_like(x)
    # Held in a variable: the kernel knows the address alone.
    given = None if logits is None else logits.contiguous()
    addresses = (x.data_ptr(), 0 if given is None else given.data_ptr(), out.data_ptr())
    scratch, like, threads = _LOCAL.prepare(kernel, plan.scratch_per_token * tokens, x.dtype)
    kernel.sparse_ffn(plan.numbers, kernel.np.float32(threshold_logit), addresses, tokens, threads, scratch, like)
    return out


@dataclass(frozen=True)
class _Plan:
    numbers: Any
    scratch_per_token: int


class _Local(threading.local):
    """What each thread keeps between calls: scratch memory, and how many threads numba was told to use."""

    def __init__(self) -> None:
        self.scratch: Any = None
        self.threads = 0

    def prepare(self, kernel: ModuleType, size: int, dtype: torch.dtype) -> tuple[Any, Any, int]:
        """Scratch of at least `size` numbers, the kernel's number type and torch's number of threads."""
        if self.scratch is None or len(self.scratch) < size:
            self.scratch = kernel.np.empty(size, kernel.np.float32)
        threads = torch.get_num_threads()
        if threads != self.threads:
            kernel.use_threads(threads)
            self.threads = threads
        return self.scratch, kernel.LIKE_FLOAT32 if dtype == torch.float32 else kernel.LIKE_BFLOAT16, threads


_LOCAL = _Local()


def _checked_plan(weights: DecodeWeights) -> Any:
    """The kernel's plan, checked and made anew whenever a tensor lies elsewhere; without a kernel a mark alone."""
    key = tuple([None if tensor is None else (tensor.data_ptr(), tensor.dtype) for tensor in weights.tensors()])
    found = weights._checked.get(key)
    if found is None:
        _check_weights(weights)
        weights._checked.clear()
        found = weights._checked[key] = _make_plan(weights)
    return found


def _make_plan(weights: DecodeWeights) -> Any:
    kernel = _kernel()
    if kernel is None:
        return True
    (neurons, hidden), experts = weights.up.shape, weights.num_experts
    numbers = [0 if tensor is None else tensor.data_ptr() for tensor in weights.tensors()]
    numbers += [hidden, neurons, experts, kernel.block_size(neurons, experts)]
    numbers += [list(ACTIVATIONS).index(weights.activation)]
    return _Plan(kernel.np.array(numbers, kernel.np.int64), kernel.scratch_per_token(hidden, neurons, experts))


def _check_input(x: Tensor, weights: DecodeWeights, logits: Tensor | None) -> int:
    """Checks what changes from call to call; returns T."""
    hidden = weights.up.shape[1]
    if x.shape[-1] != hidden or x.dtype is not weights.up.dtype or not x.is_cpu:
        raise ValueError(
            f"x must be [..., {hidden}] of {weights.up.dtype} on the CPU, as the weights, got shape {tuple(x.shape)}, "
            f"{x.dtype} on {x.device}"
        )
    tokens = x.numel() // hidden
    if not 1 <= tokens <= MAX_TOKENS:
        raise ValueError(f"x must hold 1 to {MAX_TOKENS} tokens, got {tokens}; use SparseFfn for longer inputs")
    if torch.is_grad_enabled() and (x.requires_grad or weights.up.requires_grad):
        raise ValueError("gradients must be off for decoding, got grad enabled; use torch.no_grad() or SparseFfn")
    if logits is None:
        if weights.router is None:
            raise ValueError("logits must be given for weights without a router, got logits=None")
        return tokens
    if logits.shape != (*x.shape[:-1], weights.num_experts) or logits.dtype is not torch.float32 or not logits.is_cpu:
        raise ValueError(
            f"logits must be float32 of shape {(*x.shape[:-1], weights.num_experts)} on the CPU, got "
            f"{logits.dtype} of shape {tuple(logits.shape)} on {logits.device}"
        )
    return tokens


def _check_weights(weights: DecodeWeights) -> None:
    up, experts = weights.up, weights.num_experts
    if up.dtype not in (torch.float32, torch.bfloat16) or up.ndim != 2:
        raise ValueError(f"up must be [F, D] of float32 or bfloat16, got {up.dtype} of shape {tuple(up.shape)}")
    neurons, hidden = up.shape
    if experts < 1 or neurons % experts:
        raise ValueError(f"num_experts must divide {neurons} neurons, got num_experts={experts}")
    if weights.activation not in ACTIVATIONS:
        known = ", ".join(ACTIVATIONS)
        raise ValueError(f"activation must be one of {known}, got activation={weights.activation!r}")
    row_major, by_neuron = (hidden, 1), (1, hidden)
    for name, tensor, shape, strides in (
        ("gate", weights.gate, (neurons, hidden), row_major),
        ("up", up, (neurons, hidden), row_major),
        ("down", weights.down, (hidden, neurons), by_neuron),
        ("gate bias", weights.biases[0], (neurons,), (1,)),
        ("up bias", weights.biases[1], (neurons,), (1,)),
        ("down bias", weights.biases[2], (hidden,), (1,)),
    ):
        _check_tensor(name, tensor, up.dtype, shape, strides)
    router, bias = weights.router or (None, None)
    _check_tensor("router weight", router, torch.float32, (experts, hidden), row_major)
    _check_tensor("router bias", bias, torch.float32, (experts,), (1,))


def _check_tensor(
    name: str, tensor: Tensor | None, dtype: torch.dtype, shape: Sequence[int], strides: Sequence[int]
) -> None:
    if tensor is None:
        return
    if tensor.dtype is not dtype or tensor.shape != shape or not tensor.is_cpu:
        raise ValueError(
            f"{name} must be {dtype} of shape {shape} on the CPU, got {tensor.dtype} of shape {tuple(tensor.shape)} "
            f"on {tensor.device}"
        )
    if tensor.stride() != strides:
        fix = "call store_by_neuron_" if name == "down" else "call .contiguous()"
        raise ValueError(f"{name} must have strides {strides}, got strides {tensor.stride()}; {fix}")


def _gather_path(x: Tensor, weights: DecodeWeights, threshold_logit: float, logits: Tensor | None) -> Tensor:
    """The same in PyTorch: copies the rows of the experts that any token needs, then computes with those alone."""
    flat = x.reshape(-1, x.shape[-1]).contiguous().float()
    if logits is None:
        logits = functional.linear(flat, *weights.router)  # type: ignore[misc]
    active = logits.reshape(len(flat), -1) > threshold_logit
    needed = active.any(0)
    expert_size = len(weights.up) // weights.num_experts

    def rows(tensor: Tensor) -> Tensor:
        return tensor.unflatten(0, (-1, expert_size))[needed].flatten(0, 1).float()

    def product(weight: Tensor, bias: Tensor | None) -> Tensor:
        return functional.linear(flat, rows(weight), None if bias is None else rows(bias))

    activation = ACTIVATIONS[weights.activation]
    gate_bias, up_bias, down_bias = weights.biases
    hidden = product(weights.up, up_bias)
    hidden = activation(hidden) if weights.gate is None else hidden * activation(product(weights.gate, gate_bias))
    hidden = hidden * active[:, needed].repeat_interleave(expert_size, 1)
    out = hidden @ rows(weights.down.T)
    return (out if down_bias is None else out + down_bias.float()).to(x.dtype).view(x.shape)


@torch.library.custom_op("lte::sparse_ffn_decode_cpu", mutates_args=(), device_types="cpu")
def _decode_op(
    x: Tensor,
    tensors: Sequence[Tensor | None],
    logits: Tensor | None,
    threshold_logit: float,
    num_experts: int,
    activation: str,
) -> Tensor:
    """What `torch.compile` sees of `sparse_ffn_decode`; called directly it costs several times more per call."""
    gate, up, down, gate_bias, up_bias, down_bias, router, router_bias = tensors
    if up is None or down is None:
        raise ValueError(f"tensors must hold up and down, got up={up}, down={down}")
    both = None if router is None else (router, router_bias)
    biases = gate_bias, up_bias, down_bias
    weights = DecodeWeights(up, down, num_experts, activation, gate, biases, both)
    with torch.no_grad():
        return sparse_ffn_decode(x, weights, threshold_logit, logits)


@_decode_op.register_fake
def _(
    x: Tensor,
    tensors: Sequence[Tensor | None],
    logits: Tensor | None,
    threshold_logit: float,
    num_experts: int,
    activation: str,
) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)
