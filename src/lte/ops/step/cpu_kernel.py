"""The whole decoding step on a CPU, compiled by numba on first use and cached on disk; needs numba.

One function that every thread of a team runs from the embedding to the logits; the threads meet at six barriers in a
layer: after queries, keys and values, after attention, after the output product, after the router, after gate and up,
and after down. What is small (norms, residuals, choice of experts) every thread computes for itself, which costs less
than a barrier. One thread reads a row of a matrix, once for all tokens, and each sum has one order
(`lte.ops.cpu_intrinsics`), so no result depends on the number of threads or on the other sequences.

Attention takes the tokens that a token sees in pieces of a fixed length, each with a maximum and sums of its own; the
phase of the output product puts them together.

Of several tokens of one sequence (SEVERAL) each is a row as other sequences' tokens are, and no bytes lie between their
caches. They see each other, so a phase of its own, before attention, writes what they add to the cache.

Shapes: see `lte.ops.step.plan`; G = HQ / HKV heads of queries share one of keys and values, P pieces.
"""

# numba takes the types from the arguments, and its intrinsics lose two of theirs.
# mypy: disable-error-code="no-untyped-def, call-arg, attr-defined"

from __future__ import annotations

import hashlib
import math
from pathlib import Path
from typing import Any

import numpy as np
from numba import carray, njit, types
from numba.core.ccallback import CFunc
from numba.core.compiler import Compiler

from lte.ops import cpu_intrinsics, cpu_kernel, cpu_tiles
from lte.ops.cpu_intrinsics import (
    HAS_FLOAT16,
    LANES,
    call,
    count_up,
    fma,
    load,
    look,
    pointer,
    size_of,
    store,
)
from lte.ops.cpu_kernel import (
    EXPERTS,
    FFN_SLOTS,
    HIDDEN,
    LEAST_COLUMNS,
    LIKE,
    NEURONS,
    ROUTER,
    add_down,
    address,
    intermediate,
    route,
    select,
    with_cache,
)
from lte.ops.cpu_tiles import UNIT, add_rows, dot_rows, exponential_parts

__all__ = ["HAS_FLOAT16", "compile_step", "own_floats"]

# Slots of a layer: those of its FFN, then addresses (0 for a missing tensor), the window and the number of the rope.
(
    NORM1, NORM2, POST1, POST2, Q, K, V, OUT, Q_BIAS, K_BIAS, V_BIAS, OUT_BIAS, Q_NORM, K_NORM, WINDOW, ROPE,
) = range(FFN_SLOTS, FFN_SLOTS + 16)  # fmt: skip
LAYER_SLOTS = FFN_SLOTS + 16
# Slots of the cache of a layer: addresses, the bytes from one sequence to the next, C, and the length of a piece.
KEYS, VALUES, KEY_STRIDE, VALUE_STRIDE, CAPACITY, SHIFT, PIECE = range(7)
CACHE_SLOTS = 7
# Slots of a rope: the address of its frequencies, and how many those are.
FREQUENCIES, COUNT = range(2)
# Slots of the frame: functions (0 for a single thread), the counter of the barriers, addresses, sizes, then scratch.
(
    YIELD, THREAD, THREADS, COUNTER, LAYERS, CACHES, ROPES, NUMBERS, TOKENS, POSITIONS, STARTS, LOGITS,
    EMBEDDING, FINAL_NORM, HEAD, HEAD_BIAS, NUM_LAYERS, NUM_ROPES, VOCABULARY, HEADS, KV_HEADS, HEAD_SIZE, PLUS_ONE,
    BATCH, SEVERAL, MOST_PIECES, OWN_BYTES,
    ANGLES, QKV, PEAKS, TOTALS, PARTS, ADDED, SCORES_OF_EXPERTS, H, OWN,
) = range(36)  # fmt: skip
FRAME_SLOTS = 36
# How often a thread looks for the others before it yields its core: some 0.1 ms.
SPINS = 2000
# What `numbers`, float64, begins with; then the thresholds of the layers, then the factors of the ropes.
EPS, EMBEDDING_SCALE, SCORE_SCALE, SCORE_CAP, LOGIT_CAP = range(5)
NUM_NUMBERS = 5
_FP32, _INT64, _FP64 = LIKE[0], np.int64(0), np.float64(0)


@njit
def _meet(frame, threads):
    """Waits for the other threads of the team; on a busy machine for those that wait for a core, too."""
    if threads > 1:
        goal = (count_up(frame[COUNTER]) // threads + 1) * threads
        looks = 0
        while look(frame[COUNTER]) < goal:
            looks += 1
            # The wait is long, so the other thread may be one that this one keeps from running.
            if looks > SPINS:
                call(frame[YIELD])


@njit
def _vector(address, size):
    return carray(pointer(address, _FP32), (size,))


@njit
def _matrix(address, rows, columns):
    return carray(pointer(address, _FP32), (rows, columns))


@njit
def _integers(address, size):
    return carray(pointer(address, _INT64), (size,))


@njit
def _share(total, unit, thread, threads):
    """The first of a thread's numbers and the one after its last, both multiples of `unit` but for the end."""
    units = (total + unit - 1) // unit
    return units * thread // threads * unit, min(units * (thread + 1) // threads * unit, total)


@njit
def _round(value, like):
    return load(store(value, like))


@njit(fastmath={"reassoc"})
def _square_sum(values):
    total = np.float32(0)
    for i in range(len(values)):
        total += values[i] * values[i]
    return total


@njit(fastmath={"reassoc"})
def _sum(values):
    total = np.float32(0)
    for i in range(len(values)):
        total += values[i]
    return total


@njit(fastmath={"reassoc", "nnan", "nsz"})
def _peak(values):
    """The greatest of some numbers, any if one is NaN."""
    peak = values[0]
    for i in range(1, len(values)):
        peak = values[i] if values[i] > peak else peak
    return peak


@njit
def _normalise(values, weight, plus_one, eps, like, out):
    """Writes the norm of a vector; `weight` is an address."""
    weights = carray(pointer(weight, like), (len(values),))
    scale = np.float32(1) / np.sqrt(_square_sum(values) / np.float32(len(values)) + eps)
    for i in range(len(values)):
        if plus_one:
            out[i] = _round(values[i] * scale * (np.float32(1) + load(weights[i])), like)
        else:
            out[i] = _round(load(weights[i]) * _round(values[i] * scale, like), like)


@njit
def _exponential(a):
    """exp(a) for a <= 0 within 3e-7."""
    p, power = exponential_parts(np.float32(-87) if a < np.float32(-87) else a)
    return p * power


@njit
def _cap(value, cap, like):
    return _round(cap * _round(math.tanh(_round(value / cap, like)), like), like)


@njit
def _linear(like, weight, bias, first, last, x, everyone, tokens, size, out, stride):
    """Writes the products first to last of a matrix [., size] with the tokens to out, fp32 [T, stride]."""
    row_bytes, to = size_of(like) * size, out + 4 * first
    dot_rows(like, weight + first * row_bytes, row_bytes, last - first, x, everyone, tokens, size, to, stride)
    for token in range(tokens):
        values = _vector(out + 4 * (token * stride + first), last - first)
        if bias == 0:
            for i in range(last - first):
                values[i] = _round(values[i], like)
        else:
            biases = carray(pointer(bias, like), (last,))
            for i in range(last - first):
                values[i] = _round(values[i] + load(biases[first + i]), like)


@njit
def _embed(frame, scale, like, x):
    hidden = x.shape[1]
    tokens = _integers(frame[TOKENS], len(x))
    scale = _round(scale, like)
    for token in range(len(x)):
        row = carray(pointer(frame[EMBEDDING] + tokens[token] * hidden * size_of(like), like), (hidden,))
        for i in range(hidden):
            x[token, i] = _round(load(row[i]) * scale, like)


@njit
def _turn_tables(frame, numbers, like, thread, threads):
    """Writes cosines and sines [ropes, B, 2, HD / 2], rounded, of the positions without padding."""
    batch, half = frame[BATCH], frame[HEAD_SIZE] // 2
    positions, starts = _integers(frame[POSITIONS], batch), _integers(frame[STARTS], batch)
    ropes = _integers(frame[ROPES], 2 * frame[NUM_ROPES])
    for item in range(thread, frame[NUM_ROPES] * batch, threads):
        rope, token = item // batch, item % batch
        count = ropes[2 * rope + COUNT]
        frequencies = _vector(ropes[2 * rope + FREQUENCIES], count)
        factor = np.float32(numbers[NUM_NUMBERS + frame[NUM_LAYERS] + rope])
        waves = _matrix(frame[ANGLES] + 4 * item * 2 * half, 2, half)
        for i in range(count):
            angle = np.float64(np.float32(positions[token] - starts[token]) * frequencies[i])
            waves[0, i] = _round(np.float32(math.cos(angle)) * factor, like)
            waves[1, i] = _round(np.float32(math.sin(angle)) * factor, like)


@njit
def _turn(frame, layer, token, numbers, like, norm, source, head):
    """Writes a head [HD] of queries or keys after its norm and its rotary embedding."""
    if norm == 0:
        for i in range(len(head)):
            head[i] = source[i]
    else:
        _normalise(source, norm, frame[PLUS_ONE] != 0, np.float32(numbers[EPS]), like, head)
    ropes = _integers(frame[ROPES], 2 * frame[NUM_ROPES])
    half, count = frame[HEAD_SIZE] // 2, ropes[2 * layer[ROPE] + COUNT]
    item = layer[ROPE] * frame[BATCH] + token
    waves = _matrix(frame[ANGLES] + 4 * item * 2 * half, 2, half)
    for i in range(count):
        cosine, sine, first, second = waves[0, i], waves[1, i], head[i], head[count + i]
        head[i] = _round(_round(first * cosine, like) - _round(second * sine, like), like)
        head[count + i] = _round(_round(second * cosine, like) + _round(first * sine, like), like)


@njit
def _project_heads(frame, layer, like, x, everyone, thread, threads):
    """Writes a thread's share of queries, keys and values [B, (HQ + 2 HKV) HD]."""
    size, hidden = frame[HEAD_SIZE], layer[HIDDEN]
    queries, keys = frame[HEADS] * size, frame[KV_HEADS] * size
    width = queries + 2 * keys
    begin, end = _share(width, 16, thread, threads)
    start = 0
    for part in range(3):
        rows = queries if part == 0 else keys
        first, last = max(begin - start, 0), min(end - start, rows)
        if first < last:
            weight, bias, to = layer[Q + part], layer[Q_BIAS + part], frame[QKV] + 4 * start
            _linear(like, weight, bias, first, last, x, everyone, frame[BATCH], hidden, to, width)
        start += rows


@njit
def _num_seen(layer, cache, position, start):
    """How many tokens a token sees, itself included."""
    seen = min(position - start + 1, cache[CAPACITY])
    return min(seen, layer[WINDOW]) if layer[WINDOW] > 0 else seen


@njit
def _write_cache(frame, layer, cache, token, head, position, numbers, like, key):
    """Writes keys and values of one head of a token's own position into the cache."""
    size = frame[HEAD_SIZE]
    queries, keys = frame[HEADS] * size, frame[KV_HEADS] * size
    row = _vector(frame[QKV] + 4 * token * (queries + 2 * keys), queries + 2 * keys)
    at = (head * cache[CAPACITY] + (position + cache[SHIFT]) % cache[CAPACITY]) * size * size_of(like)
    key_to = carray(pointer(cache[KEYS] + token * cache[KEY_STRIDE] + at, like), (size,))
    value_to = carray(pointer(cache[VALUES] + token * cache[VALUE_STRIDE] + at, like), (size,))
    first = queries + head * size
    _turn(frame, layer, token, numbers, like, layer[K_NORM], row[first : first + size], key)
    for i in range(size):
        key_to[i] = store(key[i], like)
        value_to[i] = store(row[first + keys + i], like)


@njit
def _attend_piece(frame, layer, cache, token, head, piece, numbers, like, own, everyone):
    """Writes maxima, sums and sums of values of a piece of the seen tokens, for the G heads of one of the keys."""
    size, group, capacity = frame[HEAD_SIZE], frame[HEADS] // frame[KV_HEADS], cache[CAPACITY]
    position, start = _integers(frame[POSITIONS], token + 1)[token], _integers(frame[STARTS], token + 1)[token]
    seen = _num_seen(layer, cache, position, start)
    begin, end = piece * cache[PIECE], min((piece + 1) * cache[PIECE], seen)
    length = end - begin
    item: Any = size_of(like)
    queries = _matrix(own, group, size)
    scores = _matrix(own + 4 * group * size, group, length)
    if end == seen and frame[SEVERAL] == 0:
        _write_cache(frame, layer, cache, token, head, position, numbers, like, queries[0])
    width = (frame[HEADS] + 2 * frame[KV_HEADS]) * size
    row = _vector(frame[QKV] + 4 * token * width, width)
    for i in range(group):
        first = (head * group + i) * size
        _turn(frame, layer, token, numbers, like, layer[Q_NORM], row[first : first + size], queries[i])
    # Where the piece begins in the cache; it goes on at slot 0 after the last.
    slot = (position - seen + 1 + begin + cache[SHIFT]) % capacity
    until = min(length, capacity - slot)
    keys = cache[KEYS] + token * cache[KEY_STRIDE] + head * capacity * size * item
    values = cache[VALUES] + token * cache[VALUE_STRIDE] + head * capacity * size * item
    q, s = address(queries), address(scores)
    dot_rows(like, keys + slot * size * item, size * item, until, q, everyone, group, size, s, length)
    dot_rows(like, keys, size * item, length - until, q, everyone, group, size, s + 4 * until, length)
    first = (token * frame[HEADS] + head * group) * frame[MOST_PIECES] + piece
    scale, cap = np.float32(numbers[SCORE_SCALE]), np.float32(numbers[SCORE_CAP])
    for i in range(group):
        row = scores[i]
        for j in range(length):
            row[j] *= scale
        if cap != 0:
            for j in range(length):
                row[j] = cap * math.tanh(row[j] / cap)
        peak = _peak(row)
        for j in range(length):
            row[j] = _exponential(row[j] - peak)
        at = first + i * frame[MOST_PIECES]
        _vector(frame[PEAKS], at + 1)[at] = peak
        _vector(frame[TOTALS], at + 1)[at] = _sum(row)
        _vector(frame[PARTS] + 4 * at * size, size)[:] = 0
    to, stride = frame[PARTS] + 4 * first * size, frame[MOST_PIECES] * size
    for i in range(group):
        at = s + 4 * i * length
        add_rows(like, item, values + slot * size * item, until, size, at, 0, everyone, 1, to + 4 * i * stride, 0, size)
        add_rows(like, item, values, length - until, size, at + 4 * until, 0, everyone, 1, to + 4 * i * stride, 0, size)


@njit
def _write_all(frame, layer, cache, numbers, like, own, thread, threads):
    """A thread's share of the keys and values of all tokens."""
    positions, key = _integers(frame[POSITIONS], frame[BATCH]), _vector(own, frame[HEAD_SIZE])
    for item in range(thread, frame[BATCH] * frame[KV_HEADS], threads):
        token, head = item // frame[KV_HEADS], item % frame[KV_HEADS]
        _write_cache(frame, layer, cache, token, head, positions[token], numbers, like, key)


@njit
def _attend(frame, layer, cache, numbers, like, own, everyone, thread, threads):
    """A thread's share of the pieces of all sequences and heads."""
    positions, starts = _integers(frame[POSITIONS], frame[BATCH]), _integers(frame[STARTS], frame[BATCH])
    total = 0
    for token in range(frame[BATCH]):
        seen = _num_seen(layer, cache, positions[token], starts[token])
        total += (seen + cache[PIECE] - 1) // cache[PIECE] * frame[KV_HEADS]
    item, last = total * thread // threads, total * (thread + 1) // threads
    before = 0
    for token in range(frame[BATCH]):
        seen = _num_seen(layer, cache, positions[token], starts[token])
        pieces = (seen + cache[PIECE] - 1) // cache[PIECE]
        until = before + pieces * frame[KV_HEADS]
        while item < min(until, last):
            head, piece = (item - before) // pieces, (item - before) % pieces
            _attend_piece(frame, layer, cache, token, head, piece, numbers, like, own, everyone)
            item += 1
        before = until


@njit
def _merge(frame, layer, cache, like, attended):
    """Puts the pieces of attention together: writes [B, HQ HD]."""
    size, most = frame[HEAD_SIZE], frame[MOST_PIECES]
    positions, starts = _integers(frame[POSITIONS], frame[BATCH]), _integers(frame[STARTS], frame[BATCH])
    for token in range(frame[BATCH]):
        seen = _num_seen(layer, cache, positions[token], starts[token])
        pieces = (seen + cache[PIECE] - 1) // cache[PIECE]
        for head in range(frame[HEADS]):
            first = (token * frame[HEADS] + head) * most
            peaks, totals = _vector(frame[PEAKS] + 4 * first, pieces), _vector(frame[TOTALS] + 4 * first, pieces)
            parts = _matrix(frame[PARTS] + 4 * first * size, pieces, size)
            to = attended[token, head * size : (head + 1) * size]
            peak, total = _peak(peaks), np.float32(0)
            to[:] = 0
            for piece in range(pieces):
                weight = _exponential(peaks[piece] - peak)
                total += weight * totals[piece]
                for i in range(size):
                    to[i] = fma(weight, parts[piece, i], to[i])
            for i in range(size):
                to[i] = _round(to[i] / total, like)


@njit
def _add(frame, post, eps, like, x, spare):
    """Adds what a part of a layer gave to the residual, after its norm if it has one."""
    added = _matrix(frame[ADDED], len(x), x.shape[1])
    for token in range(len(x)):
        for i in range(x.shape[1]):
            spare[i] = _round(added[token, i], like)
        if post != 0:
            _normalise(spare, post, frame[PLUS_ONE] != 0, eps, like, spare)
        for i in range(x.shape[1]):
            x[token, i] = _round(x[token, i] + spare[i], like)


@njit
def _norm_all(frame, weight, eps, like, x, out):
    for token in range(len(x)):
        _normalise(x[token], weight, frame[PLUS_ONE] != 0, eps, like, out[token])


@njit
def _choose(frame, layer, threshold, like, x, everyone, integers, thread, threads):
    """How many experts are active, written with their tokens to `integers`; the router is run before."""
    batch, experts = frame[BATCH], layer[EXPERTS]
    if layer[ROUTER] == 0:
        integers[0], integers[experts + 1] = 0, batch
        for token in range(batch):
            integers[2 * experts + 2 + token] = token
        return 1
    logits = _matrix(frame[SCORES_OF_EXPERTS], batch, experts)
    first, last = _share(experts, 4, thread, threads)
    route(layer, like, size_of(like), address(x), batch, logits, everyone, first, last)
    _meet(frame, threads)
    active, counts = integers[: experts + 1], integers[experts + 1 : 2 * experts + 2]
    order = integers[2 * experts + 2 : (experts + 1) * (batch + 2)].reshape((experts + 1, batch))
    return select(logits, np.float32(threshold), active, order, counts)


@njit
def _ffn(frame, layer, found, like, x, integers, values, thread, threads):
    """Writes what the active experts give to ADDED."""
    batch, hidden, neurons, experts = frame[BATCH], layer[HIDDEN], layer[NEURONS], layer[EXPERTS]
    active, counts = integers[: experts + 1], integers[experts + 1 : 2 * experts + 2]
    order = integers[2 * experts + 2 : (experts + 1) * (batch + 2)].reshape((experts + 1, batch))
    h, sums = _matrix(frame[H], batch, neurons), _matrix(frame[ADDED], batch, hidden)
    item: Any = size_of(like)
    units = neurons // experts // UNIT
    first, last = _share(found * units, 1, thread, threads)
    for unit in range(first, last):
        i = unit // units
        neuron = (active[i] * units + unit % units) * UNIT
        intermediate(layer, like, item, address(x), neuron, order[i], counts[i], h, values)
    _meet(frame, threads)
    parts = max(min(threads, hidden // LEAST_COLUMNS), 1)
    if thread < parts:
        first, last = _share(hidden, LANES, thread, parts)
        add_down(layer, like, item, h, active[:found], order, counts, sums, sums, _FP32, first, last)
    _meet(frame, threads)


def _make(like: Any, sources: str) -> Any:
    def decoder_step(data):
        """A thread's share of a step; `data` is the frame."""
        _ = sources
        frame = carray(data, (FRAME_SLOTS,))
        thread = threads = 0
        if frame[THREAD] != 0:
            thread, threads = call(frame[THREAD]), call(frame[THREADS])
        threads = max(threads, 1)
        batch, depth = frame[BATCH], frame[NUM_LAYERS]
        layers = carray(pointer(frame[LAYERS], _INT64), (depth, LAYER_SLOTS))
        caches = carray(pointer(frame[CACHES], _INT64), (depth, CACHE_SLOTS))
        numbers = carray(pointer(frame[NUMBERS], _FP64), (NUM_NUMBERS + depth + frame[NUM_ROPES],))
        hidden, heads = layers[0, HIDDEN], frame[HEADS] * frame[HEAD_SIZE]
        # What each thread has for itself; the integers come last.
        own = frame[OWN] + thread * frame[OWN_BYTES]
        x, normed = _matrix(own, batch, hidden), _matrix(own + 4 * batch * hidden, batch, hidden)
        own += 8 * batch * hidden
        attended, own = _matrix(own, batch, heads), own + 4 * batch * heads
        spare, own = _vector(own, hidden), own + 4 * hidden
        values, own = carray(pointer(own, _FP32), (2, batch, UNIT)), own + 8 * batch * UNIT
        everyone = np.arange(batch)
        most = 0
        for i in range(depth):
            most = max(most, layers[i, EXPERTS])
        group = frame[HEADS] // frame[KV_HEADS]
        own_group = np.arange(group)
        integers = np.empty((most + 1) * (batch + 2), np.int64)
        at, eps = address(normed), np.float32(numbers[EPS])
        people = address(everyone)
        _embed(frame, np.float32(numbers[EMBEDDING_SCALE]), like, x)
        _turn_tables(frame, numbers, like, thread, threads)
        for i in range(depth):
            layer, cache = layers[i], caches[i]
            _norm_all(frame, layer[NORM1], eps, like, x, normed)
            _project_heads(frame, layer, like, at, people, thread, threads)
            _meet(frame, threads)
            if frame[SEVERAL] != 0:
                _write_all(frame, layer, cache, numbers, like, own, thread, threads)
                _meet(frame, threads)
            _attend(frame, layer, cache, numbers, like, own, address(own_group), thread, threads)
            _meet(frame, threads)
            _merge(frame, layer, cache, like, attended)
            first, last = _share(hidden, 16, thread, threads)
            weight, bias, to = layer[OUT], layer[OUT_BIAS], frame[ADDED]
            _linear(like, weight, bias, first, last, address(attended), people, batch, heads, to, hidden)
            _meet(frame, threads)
            _add(frame, layer[POST1], eps, like, x, spare)
            _norm_all(frame, layer[NORM2], eps, like, x, normed)
            found = _choose(frame, layer, numbers[NUM_NUMBERS + i], like, normed, everyone, integers, thread, threads)
            _ffn(frame, layer, found, like, normed, integers, values, thread, threads)
            _add(frame, layer[POST2], eps, like, x, spare)
        _norm_all(frame, frame[FINAL_NORM], eps, like, x, normed)
        first, last = _share(frame[VOCABULARY], 16, thread, threads)
        to, vocabulary = frame[LOGITS], frame[VOCABULARY]
        _linear(like, frame[HEAD], frame[HEAD_BIAS], first, last, at, people, batch, hidden, to, vocabulary)
        cap = np.float32(numbers[LOGIT_CAP])
        if cap != 0:
            for token in range(batch):
                logits = _vector(to + 4 * (token * vocabulary + first), last - first)
                for i in range(last - first):
                    logits[i] = _cap(logits[i], cap, like)

    return decoder_step


def compile_step(kind: int) -> Any:
    """The step for weights of the type `LIKE[kind]`, a C function that takes the address of a frame."""
    parts = [Path(str(module.__file__)).read_bytes() for module in (cpu_intrinsics, cpu_tiles, cpu_kernel)]
    function = _make(LIKE[kind], hashlib.sha256(b"".join(parts)).hexdigest())
    signature = types.void(types.CPointer(types.int64))
    options = {"nopython": True, "error_model": "numpy"}
    step = CFunc(function, (signature.args, signature.return_type), {}, options, pipeline_class=Compiler)
    with_cache(step)
    step.compile()
    return step


def own_floats(batch: int, hidden: int, heads: int, head_size: int, group: int, piece: int) -> int:
    """How many float32 each thread needs for itself; `heads` of queries, `group` = G, and the longest piece."""
    return batch * (2 * hidden + heads * head_size + 2 * UNIT) + hidden + group * (head_size + piece)
