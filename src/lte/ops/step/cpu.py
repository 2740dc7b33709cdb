"""The decoding step of a whole decoder on a CPU: one call into `lte.ops.step.cpu_kernel` per token.

It runs on the threads of the OpenMP library that torch itself uses, as many as `torch.get_num_threads()`: with threads
of its own, those of the last operation of torch, which still spin for some milliseconds, would take its cores.

Shapes: see `lte.ops.step.plan`.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from lte.ops.activations import ACTIVATIONS
from lte.ops.cpu import cpu_kernel_available
from lte.ops.step.plan import DecoderLayer, DecoderPlan, LayerCache, Quantized, rows_of

MAX_SEQUENCES = 8
# In the order of `LIKE` of the kernel.
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_ALIGNMENT = 64


def unfit(plan: DecoderPlan, caches: Sequence[LayerCache]) -> str | None:
    """See `lte.ops.step.plan.Engine`."""
    dtype, batch = plan.embedding.dtype, len(caches[0].keys)
    if not cpu_kernel_available():
        return "numba is not installed"
    if dtype not in _DTYPES or (dtype == torch.float16 and not _kernel().HAS_FLOAT16):
        return f"the CPU kernel takes no weights of {dtype}"
    if torch.get_num_threads() > 1 and _library() is None:
        return "the CPU kernel does not know the library of torch's threads"
    if batch > MAX_SEQUENCES:
        return f"the CPU kernel takes at most {MAX_SEQUENCES} sequences, and these are {batch}"
    tensors = [plan.embedding, plan.final_norm, plan.head, plan.head_bias]
    for layer in plan.layers:
        tensors += [getattr(layer, name) for name in _WEIGHTS]
        experts = 1 if layer.router is None else len(layer.router)
        if len(layer.up) % (8 * experts):
            return "the CPU kernel takes experts of a multiple of 8 neurons"
    if any(isinstance(t, Quantized) for t in tensors):
        return "the CPU kernel takes no quantised weights"
    if not all(
        t is None or (isinstance(t, Tensor) and t.is_cpu and t.dtype == dtype and t.is_contiguous()) for t in tensors
    ):
        return "the CPU kernel takes contiguous weights of one dtype on the CPU"
    # These caches may lie anywhere, or be no more than shapes.
    if not all(t[0].is_contiguous() and t.dtype == dtype for cache in caches for t in (cache.keys, cache.values)):
        return "the CPU kernel takes contiguous caches of the weights' dtype"
    return None


class CpuEngine:
    """See `lte.ops.step.plan.Engine`; making the first one of a dtype compiles for some seconds, once on a machine."""

    def __init__(self, plan: DecoderPlan) -> None:
        self.plan = plan
        self._step = _compiled(_DTYPES.index(plan.embedding.dtype))

    def bind(self, caches: Sequence[LayerCache], tokens: int = 1, *, fewer: bool = False) -> CpuStep:
        """A step on these caches."""
        return CpuStep(self.plan, caches, self._step, tokens)


_MATRICES = ("gate", "up", "down", "gate_bias", "up_bias", "down_bias")
_OTHERS = (
    "norm1", "norm2", "post1", "post2", "q", "k", "v", "out",
    "q_bias", "k_bias", "v_bias", "out_bias", "q_norm", "k_norm",
)  # fmt: skip
_WEIGHTS = _MATRICES + _OTHERS


class CpuStep:
    """See `lte.ops.step.plan.DecodeStep`."""

    def __init__(self, plan: DecoderPlan, caches: Sequence[LayerCache], step: Any, tokens: int = 1) -> None:
        kernel = _kernel()
        np = kernel.np
        self._plan, self._caches, self._address = plan, tuple(caches), step.address
        self._batch = batch = rows_of(caches, tokens, MAX_SEQUENCES)
        self._several = tokens > 1
        # What a sequence may hold without a window, or where the first of its tokens would lose some of its window.
        lengths = [
            cache.keys.shape[2]
            for layer, cache in zip(plan.layers, caches, strict=True)
            if not layer.window or (self._several and cache.keys.shape[2] < layer.window + tokens - 1)
        ]
        self._most = min(lengths, default=None)
        self._keep: list[Any] = []
        layers = np.array([self._layer(layer) for layer in plan.layers], np.int64)
        rows = [_cache_row(cache, self._several) for cache in caches]
        frequencies = [rope.frequencies.float().contiguous() for rope in plan.ropes]
        ropes = np.array([[f.data_ptr(), len(f)] for f in frequencies], np.int64)
        numbers = np.array(
            [plan.eps, plan.embedding_scale, plan.score_scale, plan.score_cap, plan.logit_cap]
            + [layer.threshold for layer in plan.layers]
            + [rope.factor for rope in plan.ropes],
            np.float64,
        )
        table = np.array(rows, np.int64)
        # Whatever default dtype and device the user chose.
        self._logits = torch.empty(batch, len(plan.head), dtype=torch.float32, device="cpu")
        self._frame = np.zeros(kernel.FRAME_SLOTS, np.int64)
        self._keep += [layers, table, frequencies, ropes, numbers]
        head = plan.head
        assert isinstance(head, Tensor)
        bias = 0 if plan.head_bias is None else plan.head_bias.data_ptr()
        for slot, value in {
            "LAYERS": layers.ctypes.data, "CACHES": table.ctypes.data, "ROPES": ropes.ctypes.data,
            "NUMBERS": numbers.ctypes.data, "LOGITS": self._logits.data_ptr(),
            "EMBEDDING": plan.embedding.data_ptr(), "FINAL_NORM": plan.final_norm.data_ptr(),
            "HEAD": head.data_ptr(), "HEAD_BIAS": bias, "NUM_LAYERS": len(layers), "NUM_ROPES": len(ropes),
            "VOCABULARY": len(plan.head), "HEADS": plan.heads, "KV_HEADS": plan.kv_heads,
            "HEAD_SIZE": plan.head_size, "PLUS_ONE": plan.norm_plus_one, "BATCH": batch,
            "SEVERAL": self._several,
        }.items():  # fmt: skip
            self._frame[getattr(kernel, slot)] = value
        pieces = [
            -(-min(row[kernel.CAPACITY], layer.window or row[kernel.CAPACITY]) // row[kernel.PIECE])
            for layer, row in zip(plan.layers, rows, strict=True)
        ]
        self._lay_out(max(pieces), max(row[kernel.PIECE] for row in rows))
        self._threads = 0

    def _layer(self, layer: DecoderLayer) -> list[int]:
        """The kernel's row of a layer."""
        dtype = layer.norm1.dtype
        # As `lte.ops.arguments.Routing` rounds it; the bias is added in fp32.
        router = None if layer.router is None else layer.router.to(dtype).contiguous()
        bias = None if layer.router_bias is None else layer.router_bias.float().contiguous()
        self._keep += [router, bias]
        matrices = [getattr(layer, name) for name in _MATRICES]
        others = [getattr(layer, name) for name in _OTHERS]
        experts = 1 if router is None else len(router)
        kind = _DTYPES.index(dtype)
        activation = list(ACTIVATIONS).index(self._plan.activation)
        neurons, hidden = layer.up.shape
        return [
            *map(_address, matrices), 0, 0, 0, _address(router), _address(bias),
            hidden, neurons, experts, activation, kind, kind, kind, 0,
            *map(_address, others), layer.window, layer.rope,
        ]  # fmt: skip

    def _lay_out(self, most_pieces: int, longest_piece: int) -> None:
        """Places scratch into the frame."""
        plan, kernel, batch = self._plan, _kernel(), self._batch
        hidden, size = plan.embedding.shape[1], plan.head_size
        experts = max(1 if layer.router is None else len(layer.router) for layer in plan.layers)
        parts = batch * plan.heads * most_pieces
        sizes = {
            "ANGLES": len(plan.ropes) * batch * size,
            "QKV": batch * (plan.heads + 2 * plan.kv_heads) * size,
            "PEAKS": parts,
            "TOTALS": parts,
            "PARTS": parts * size,
            "ADDED": batch * hidden,
            "SCORES_OF_EXPERTS": batch * experts,
            "H": batch * max(len(layer.up) for layer in plan.layers),
        }
        group = plan.heads // plan.kv_heads
        own = kernel.own_floats(batch, hidden, plan.heads, size, group, longest_piece)
        self._own_bytes = -(-4 * own // _ALIGNMENT) * _ALIGNMENT
        starts = [0, *itertools.accumulate(-(-size // 16) * 16 for size in sizes.values())]
        self._shared_floats = starts[-1]
        self._offsets = dict(zip([*sizes, "OWN"], starts, strict=True))
        self._frame[kernel.MOST_PIECES] = most_pieces
        self._frame[kernel.OWN_BYTES] = self._own_bytes

    def _allocate(self, threads: int) -> None:
        kernel, frame = _kernel(), self._frame
        # A line of the cache to itself.
        self._counter = torch.zeros(32, dtype=torch.int64, device="cpu")[16:17]
        frame[kernel.COUNTER] = self._counter.data_ptr()
        floats = self._shared_floats + threads * self._own_bytes // 4
        self._scratch = torch.empty(floats, dtype=torch.float32, device="cpu")
        for slot, offset in self._offsets.items():
            frame[getattr(kernel, slot)] = self._scratch.data_ptr() + 4 * offset
        library = _library() if threads > 1 else None
        for slot, name in (
            (kernel.YIELD, "sched_yield"),
            (kernel.THREAD, "omp_get_thread_num"),
            (kernel.THREADS, "omp_get_num_threads"),
        ):
            frame[slot] = 0 if library is None else _function_address(library, name)
        self._threads = threads

    @torch.no_grad()
    def __call__(self, tokens: Tensor, positions: Tensor, starts: Tensor) -> Tensor:
        """As the protocol says.

        Raises:
            ValueError: if a token is not in the vocabulary, or a position does not fit into the caches.
        """
        if self._several and starts.shape == positions.shape:
            none = starts > positions
            if not (none[:-1] & ~none[1:]).any():
                # Computed in vain, as if they were some.
                starts = torch.where(none, torch.minimum(starts[0], positions[0]), starts)
        self._check(tokens, positions, starts)
        threads = torch.get_num_threads()
        if threads != self._threads:
            self._allocate(threads)
        kernel, frame = _kernel(), self._frame
        frame[kernel.TOKENS] = tokens.data_ptr()
        frame[kernel.POSITIONS] = positions.data_ptr()
        frame[kernel.STARTS] = starts.data_ptr()
        if threads == 1 or (library := _library()) is None:
            ctypes.CFUNCTYPE(None, ctypes.c_void_p)(self._address)(frame.ctypes.data)
        else:
            self._counter.zero_()
            library.GOMP_parallel(self._address, frame.ctypes.data, threads, 0)
        return self._logits

    def active(self) -> Tensor:
        """As the protocol says."""
        layer = self._plan.layers[-1]
        assert layer.router is not None
        start, count = self._offsets["SCORES_OF_EXPERTS"], self._batch * len(layer.router)
        # Both in fp32, as the kernel compares them.
        return self._scratch[start : start + count].view(self._batch, -1) > torch.tensor(layer.threshold)

    def _check(self, tokens: Tensor, positions: Tensor, starts: Tensor) -> None:
        for name, tensor in (("tokens", tokens), ("positions", positions), ("starts", starts)):
            fits = tensor.is_cpu and tensor.dtype == torch.int64 and tensor.is_contiguous()
            if not fits or tensor.shape != (self._batch,):
                given = f"{tensor.dtype} {list(tensor.shape)} on {tensor.device}"
                raise ValueError(f"{name} must be contiguous int64 [{self._batch}] on the CPU, got {name}={given}")
        vocabulary = len(self._plan.embedding)
        for token, position, start in zip(tokens.tolist(), positions.tolist(), starts.tolist(), strict=True):
            if not 0 <= token < vocabulary:
                raise ValueError(f"tokens must be from 0 to {vocabulary - 1}, got tokens={tokens.tolist()}")
            if not 0 <= start <= position:
                raise ValueError(f"starts must be from 0 to positions, got starts={starts.tolist()}")
            if self._most is not None and position >= self._most:
                raise ValueError(f"positions must be below {self._most}, got positions={positions.tolist()}")
        if self._several and (positions.diff().ne(1).any() or starts.ne(starts[0]).any()):
            raise ValueError(
                "positions must follow each other and starts be one for several tokens of one sequence, "
                f"got positions={positions.tolist()} and starts={starts.tolist()}"
            )


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _cache_row(cache: LayerCache, shared: bool) -> list[int]:
    keys, values = cache.keys, cache.values
    item, capacity = keys.element_size(), keys.shape[2]
    # 64 pieces at most: every thread puts them together for itself.
    piece = 64 * -(-capacity // 4096)
    strides = (0, 0) if shared else (keys.stride(0) * item, values.stride(0) * item)
    return [keys.data_ptr(), values.data_ptr(), *strides, capacity, cache.shift % capacity, piece]


def _kernel() -> ModuleType:
    from lte.ops.step import cpu_kernel

    return cpu_kernel


@functools.cache
def _compiled(kind: int) -> Any:
    return _kernel().compile_step(kind)


@functools.cache
def _library() -> Any:
    """The OpenMP library that torch itself uses, `None` if it has not the functions of GNU's."""
    # A handle of torch's library finds what that library needs, too.
    folder = Path(torch.__file__).parent / "lib"
    for path in folder.glob("*torch_cpu.*"):
        try:
            library: Any = ctypes.CDLL(str(path))
            library.GOMP_parallel.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
            library.GOMP_parallel.restype = None
            _ = library.sched_yield, library.omp_get_thread_num, library.omp_get_num_threads
        except (OSError, AttributeError):
            continue
        return library
    return None


def _function_address(library: Any, name: str) -> int:
    return ctypes.cast(getattr(library, name), ctypes.c_void_p).value or 0
