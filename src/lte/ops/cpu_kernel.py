"""The CPU kernel of `lte.ops.cpu`, compiled by numba on first use and cached on disk; needs numba.

Three parallel passes: the logits, split by experts; h = act(x W_gate) * (x W_up) of the active experts, split by
neurons; h W_down, split by columns. Weights are read once, rows in the order of memory; sums are fp32, every neuron
and every column has its own and adds in the order of memory, so no result depends on the number of threads or, for
each token, on the other tokens (`lte.ops.cpu_intrinsics`).

Shapes: T tokens, D hidden size, F neurons, E experts of S = F / E neurons.
"""

# numba takes the types from the arguments.
# mypy: disable-error-code="no-untyped-def, call-arg, attr-defined"

from __future__ import annotations

import hashlib
import warnings
from pathlib import Path

import numba
import numpy as np
from numba import carray, config, njit, prange, set_num_threads
from numba.core.caching import FunctionCache

from lte.ops import cpu_intrinsics, cpu_tiles
from lte.ops.cpu_intrinsics import HAS_FLOAT16, LANES, fma, load, pointer, size_of, store
from lte.ops.cpu_tiles import UNIT, activate, add_rows, dot_rows

__all__ = ["HAS_FLOAT16", "LIKE", "scratch_per_token", "sparse_ffn", "threading_layer", "use_threads"]

# Slots of the plan: addresses (0 for a missing tensor), sizes, the activation's place in `ops.activations.ACTIVATIONS`
# and the places in `LIKE` of the types of the biases.
(
    GATE, UP, DOWN, GATE_BIAS, UP_BIAS, DOWN_BIAS, GATE_SCALE, UP_SCALE, DOWN_SCALE, ROUTER, ROUTER_BIAS,
    HIDDEN, NEURONS, EXPERTS, ACTIVATION, GATE_BIAS_TYPE, UP_BIAS_TYPE, DOWN_BIAS_TYPE, ROUTER_BIAS_TYPE,
) = range(19)  # fmt: skip
FFN_SLOTS = 19
# What the kernel takes for its type alone: fp32, bf16, fp16, int8.
LIKE = np.float32(0), np.uint16(0), np.int16(0), np.int8(0)
_FP32, _BF16, _FP16, _ = LIKE
# A thread with fewer columns of the down projection than this reads too little of each row.
LEAST_COLUMNS = 64


@njit
def address(array):
    """Where an array begins; an int64 like all other addresses, so that numba compiles what takes one once."""
    return np.int64(array.ctypes.data)


@njit
def number(address, kind, index, missing):
    """Number `index` of a vector whose type is number `kind` of `LIKE`; `missing` if there is no such vector."""
    if address == 0:
        return np.float32(missing)
    if kind == 0:
        return carray(pointer(address, _FP32), (index + 1,))[index]
    if kind == 1:
        return load(carray(pointer(address, _BF16), (index + 1,))[index])
    return load(carray(pointer(address, _FP16), (index + 1,))[index])


@njit
def _project(plan, slot, like, item, neuron, x, order, tokens, values):
    """Writes the projection `slot` (GATE or UP) of UNIT neurons to values [T, UNIT], scale and bias included."""
    hidden = plan[HIDDEN]
    row_bytes = item * hidden
    start = plan[slot] + neuron * row_bytes
    dot_rows(like, start, row_bytes, UNIT, x, order, tokens, hidden, address(values), UNIT)
    scale, bias = plan[slot + GATE_SCALE], plan[slot + GATE_BIAS]
    if scale != 0 or bias != 0:
        kind = plan[slot + GATE_BIAS_TYPE]
        for i in range(UNIT):
            factor, term = number(scale, 0, neuron + i, 1), number(bias, kind, neuron + i, 0)
            for token in range(tokens):
                values[token, i] = fma(values[token, i], factor, term)


@njit
def intermediate(plan, like, item, x, neuron, order, tokens, h, values):
    """Writes h of UNIT neurons for the tokens of `order`."""
    gated = plan[GATE] != 0
    _project(plan, UP, like, item, neuron, x, address(order), tokens, values[0])
    if gated:
        _project(plan, GATE, like, item, neuron, x, address(order), tokens, values[1])
    for token in range(tokens):
        up, activated = values[0, token], values[1 if gated else 0, token]
        activate(plan[ACTIVATION], activated)
        to = h[order[token], neuron : neuron + UNIT]
        for i in range(UNIT):
            to[i] = up[i] * activated[i] if gated else activated[i]


@njit
def route(plan, like, item, x, tokens, logits, order, first, last):
    """Writes the logits [T, first:last]; the product is rounded to the router's type before the bias is added."""
    hidden, experts = plan[HIDDEN], plan[EXPERTS]
    start, to = plan[ROUTER] + first * item * hidden, address(logits) + 4 * first
    dot_rows(like, start, item * hidden, last - first, x, address(order), tokens, hidden, to, experts)
    for token in range(tokens):
        for expert in range(first, last):
            bias = number(plan[ROUTER_BIAS], plan[ROUTER_BIAS_TYPE], expert, 0)
            logits[token, expert] = load(store(logits[token, expert], like)) + bias


@njit
def select(logits, threshold, experts, order, counts):
    """Fills the active experts, the tokens `order` [E, T] of each and how many those are; returns how many experts."""
    found = 0
    for expert in range(logits.shape[1]):
        count = 0
        for token in range(logits.shape[0]):
            if logits[token, expert] > threshold:
                order[found, count] = token
                count += 1
        experts[found], counts[found] = expert, count
        found += count > 0
    return found


@njit
def add_down(plan, like, item, h, experts, order, counts, sums, out, out_like, first, last):
    """Writes the columns first to last of the output [T, D]."""
    hidden, neurons = plan[HIDDEN], plan[NEURONS]
    size = neurons // plan[EXPERTS]
    sums[:, first:last] = np.float32(0)
    for i in range(experts.shape[0]):
        neuron = experts[i] * size
        at, h_at = plan[DOWN] + item * neuron * hidden, address(h) + 4 * neuron
        these = address(order[i])
        add_rows(like, item, at, size, hidden, h_at, neurons, these, counts[i], address(sums), first, last)
    scaled, biased = plan[DOWN_SCALE] != 0, plan[DOWN_BIAS] != 0
    for token in range(sums.shape[0]):
        for column in range(first, last):
            total = sums[token, column]
            if scaled:
                total *= number(plan[DOWN_SCALE], 0, column, 1)
            if biased:
                total += number(plan[DOWN_BIAS], plan[DOWN_BIAS_TYPE], column, 0)
            out[token, column] = store(total, out_like)


class _OptionalCache(FunctionCache):
    """numba's cache on disk, whose faults (a full disk, a damaged file) cost the time of compiling and no more."""

    def load_overload(self, sig, target_context):
        """What is cached, `None` if that cannot be read."""
        try:
            return super().load_overload(sig, target_context)
        except Exception as error:  # Damaged pickles raise anything.
            _warn(error)
            return None

    def save_overload(self, sig, data):
        """Caches what was compiled, if that can be written."""
        try:
            super().save_overload(sig, data)
        except Exception as error:
            _warn(error)


def _warn(error: Exception) -> None:
    text = "numba's cache cannot be used, so every process compiles the CPU kernel, which takes some seconds; set "
    warnings.warn(f"{text}NUMBA_CACHE_DIR to a folder that can be written ({error})", RuntimeWarning, stacklevel=2)


def with_cache(kernel):
    """Gives a function of numba, not yet compiled, a cache on disk."""
    try:
        # As njit(cache=True), which raises where no folder can be written.
        kernel._cache = _OptionalCache(kernel.__wrapped__)
    except RuntimeError as error:
        _warn(error)
    return kernel


def _compile(sources: str):
    """The kernel. numba looks for changes in this file alone, so what it is built from is part of its cache's key."""

    @with_cache
    @njit(parallel=True)
    def sparse_ffn(plan, threshold, addresses, tokens, threads, scratch, like, weight_like, router_like):
        """The sparse FFN for T tokens.

        Args:
            plan: int64, see the slots above.
            threshold: float32, of the logits.
            addresses: of x [T, D], the given fp32 logits [T, E] (0: run the router) and the output [T, D].
            tokens: T.
            threads: number of parts of the work.
            scratch: float32, T times `scratch_per_token` numbers of any value.
            like: a number of `LIKE`, of the type of x and the output.
            weight_like: the same for the projections.
            router_like: the same for the router.
        """
        _ = sources
        hidden, neurons, experts = plan[HIDDEN], plan[NEURONS], plan[EXPERTS]
        source = carray(pointer(addresses[0], like), (tokens, hidden))
        out = carray(pointer(addresses[2], like), (tokens, hidden))
        ends = np.cumsum(np.array([0, hidden, hidden, neurons, experts])) * tokens
        x = scratch[ends[0] : ends[1]].reshape((tokens, hidden))
        sums = scratch[ends[1] : ends[2]].reshape((tokens, hidden))
        h = scratch[ends[2] : ends[3]].reshape((tokens, neurons))
        logits = scratch[ends[3] : ends[4]].reshape((tokens, experts))
        for token in range(tokens):
            for i in range(hidden):
                x[token, i] = load(source[token, i])
        x_at, item = address(x), size_of(weight_like)
        if addresses[1] == 0:
            everyone = np.arange(tokens)
            for part in prange(threads):
                first, last = experts * part // threads, experts * (part + 1) // threads
                route(plan, router_like, size_of(router_like), x_at, tokens, logits, everyone, first, last)
        else:
            logits[:] = carray(pointer(addresses[1], _FP32), (tokens, experts))
        active, counts = np.empty(experts + 1, np.int64), np.empty(experts + 1, np.int64)
        order = np.empty((experts + 1, tokens), np.int64)
        found = select(logits, threshold, active, order, counts)
        units = neurons // experts // UNIT
        for part in prange(threads):
            values = np.empty((2, tokens, UNIT), np.float32)
            for unit in range(found * units * part // threads, found * units * (part + 1) // threads):
                i = unit // units
                neuron = (active[i] * units + unit % units) * UNIT
                intermediate(plan, weight_like, item, x_at, neuron, order[i], counts[i], h, values)
        parts = max(min(threads, hidden // LEAST_COLUMNS), 1)
        chunks = (hidden + LANES - 1) // LANES
        for part in prange(parts):
            first = chunks * part // parts * LANES
            last = min(chunks * (part + 1) // parts * LANES, hidden)
            add_down(plan, weight_like, item, h, active[:found], order, counts, sums, out, like, first, last)

    return sparse_ffn


_parts = [Path(str(module.__file__)).read_bytes() for module in (cpu_intrinsics, cpu_tiles)]
sparse_ffn = _compile(hashlib.sha256(b"".join(_parts)).hexdigest())


def scratch_per_token(hidden: int, num_neurons: int, num_experts: int) -> int:
    """How many float32 the kernel needs for each token: x, its output, h and the logits."""
    return 2 * hidden + num_neurons + num_experts


def use_threads(threads: int) -> None:
    """Sets numba's number of threads for the calling thread, as far as its pool reaches."""
    set_num_threads(min(threads, config.NUMBA_NUM_THREADS))


def threading_layer() -> str:
    """What numba's threads run on: "omp", "tbb" or "workqueue"; known once `use_threads` was called."""
    return numba.threading_layer()
