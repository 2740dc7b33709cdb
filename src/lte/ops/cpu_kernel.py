"""The CPU kernel of `lte.ops.cpu`, compiled by numba on first use and cached on disk; needs the extra `lte[cpu]`.

Decoding reads every active weight once from memory and does little else, so the kernel is written for bandwidth: rows
in the order of memory, one pass, fp32 sums. Weights of bf16 are loaded as uint16 and shifted.

Neurons are worked off in blocks inside one expert. Every block writes its own partial output, and those are added in
the order of the blocks: the result does not depend on the number of threads nor on the other tokens, bit for bit.

Shapes: T tokens, D hidden size, F neurons, E experts of S = F / E neurons, B neurons in a block.
"""

# numba takes the types from the arguments, and its intrinsics lose two of theirs.
# mypy: disable-error-code="no-untyped-def, call-arg, attr-defined"

from __future__ import annotations

import math

import numpy as np
from llvmlite import ir
from numba import carray, config, njit, prange, set_num_threads, types
from numba.extending import intrinsic

# Sums may be reordered, which is what vectorises them; NaN and infinity keep their meaning.
FASTMATH = {"reassoc", "contract", "nsz"}
# Slots of the plan: addresses (0 for a missing tensor), sizes, and the activation's place in `ops.cpu.ACTIVATIONS`.
GATE, UP, DOWN, GATE_BIAS, UP_BIAS, DOWN_BIAS, ROUTER, ROUTER_BIAS, HIDDEN, NEURONS, EXPERTS, BLOCK, ACTIVATION = range(
    13
)
# What the kernel takes for its type alone.
LIKE_FLOAT32, LIKE_BFLOAT16 = np.float32(0), np.uint16(0)


@intrinsic
def _pointer(typing_context, address, like):
    """The integer `address` as a pointer to numbers of the type of `like`."""
    signature = types.CPointer(like)(address, like)

    def generate(context, builder, sig, args):
        return builder.inttoptr(args[0], context.get_value_type(sig.return_type))

    return signature, generate


@intrinsic
def _load(typing_context, value):
    """A float32 as it is, or the bits of a bf16 as float32."""

    def generate(context, builder, sig, args):
        if sig.args[0] == types.float32:
            return args[0]
        word = ir.IntType(32)
        bits = builder.shl(builder.zext(args[0], word), ir.Constant(word, 16))
        return builder.bitcast(bits, ir.FloatType())

    return types.float32(value), generate


@intrinsic
def _store(typing_context, value, like):
    """A float32 as it is, or the bits of the nearest bf16 (ties to even), by the type of `like`."""

    def generate(context, builder, sig, args):
        if sig.return_type == types.float32:
            return args[0]
        word, half = ir.IntType(32), ir.IntType(16)
        bits = builder.bitcast(args[0], word)
        odd = builder.and_(builder.lshr(bits, ir.Constant(word, 16)), ir.Constant(word, 1))
        rounded = builder.add(builder.add(bits, ir.Constant(word, 0x7FFF)), odd)
        short = builder.trunc(builder.lshr(rounded, ir.Constant(word, 16)), half)
        # Rounding would carry some NaNs over to zero.
        is_nan = builder.fcmp_unordered("uno", args[0], args[0])
        return builder.select(is_nan, ir.Constant(half, 0x7FC0), short)

    return like(value, like), generate


@njit(fastmath=FASTMATH)
def _dot(x, row):
    total = np.float32(0)
    for i in range(x.shape[0]):
        total += x[i] * _load(row[i])
    return total


@njit(fastmath=FASTMATH)
def _activate(code, a):
    """The activation number `code`, in float32."""
    one, half = np.float32(1), np.float32(0.5)
    if code == 0:
        return a / (one + np.float32(math.exp(-a)))
    if code == 1:
        return half * a * (one + np.float32(math.erf(a * np.float32(0.7071067811865476))))
    if code == 2:
        inner = np.float32(0.7978845608028654) * (a + np.float32(0.044715) * a * a * a)
        return half * a * (one + np.float32(math.tanh(inner)))
    # Written so that NaN stays NaN.
    positive = np.float32(0) if a < 0 else a
    return positive if code == 3 else positive * positive


@njit(fastmath=FASTMATH)
def _bias(address, neuron, size, like):
    if address == 0:
        return np.float32(0)
    return _load(carray(_pointer(address, like), (size,))[neuron])


@njit(fastmath=FASTMATH)
def _add_block(plan, x, active, first, partial, like):
    """Adds the outputs of the neurons [first, first + B) for each active token to `partial` [T, D]."""
    hidden, neurons = plan[HIDDEN], plan[NEURONS]
    shape = (neurons, hidden)
    gated = plan[GATE] != 0
    up, down = carray(_pointer(plan[UP], like), shape), carray(_pointer(plan[DOWN], like), shape)
    gate = carray(_pointer(plan[GATE] if gated else plan[UP], like), shape)
    for token in range(x.shape[0]):
        if active[token]:
            partial[token] = np.float32(0)
    for neuron in range(first, first + plan[BLOCK]):
        for token in range(x.shape[0]):
            if not active[token]:
                continue
            value = _dot(x[token], up[neuron]) + _bias(plan[UP_BIAS], neuron, neurons, like)
            if gated:
                gate_value = _dot(x[token], gate[neuron]) + _bias(plan[GATE_BIAS], neuron, neurons, like)
                value *= _activate(plan[ACTIVATION], gate_value)
            else:
                value = _activate(plan[ACTIVATION], value)
            row, out = down[neuron], partial[token]
            for i in range(hidden):
                out[i] += value * _load(row[i])


@njit(fastmath=FASTMATH)
def _route(plan, x, logits, first, last):
    """Writes the router logits [T, first:last]."""
    like = np.float32(0)
    weight = carray(_pointer(plan[ROUTER], like), (plan[EXPERTS], plan[HIDDEN]))
    for expert in range(first, last):
        bias = _bias(plan[ROUTER_BIAS], expert, plan[EXPERTS], like)
        for token in range(x.shape[0]):
            logits[token, expert] = _dot(x[token], weight[expert]) + bias


@njit(fastmath=FASTMATH)
def _add_partials(plan, partials, blocks, active, out, span, like):
    """Writes the columns `span` of the output [T, D]: the partials of each token's blocks, in order, plus the bias."""
    first, last = span
    total = np.empty(last - first, np.float32)
    blocks_per_expert = plan[NEURONS] // (plan[BLOCK] * plan[EXPERTS])
    for token in range(out.shape[0]):
        for i in range(last - first):
            total[i] = _bias(plan[DOWN_BIAS], first + i, plan[HIDDEN], like)
        for index in range(blocks.shape[0]):
            if active[blocks[index] // blocks_per_expert, token]:
                part = partials[index, token, first:last]
                for i in range(last - first):
                    total[i] += part[i]
        for i in range(last - first):
            out[token, first + i] = _store(total[i], like)


@njit(fastmath=FASTMATH)
def _active_blocks(logits, threshold, active, blocks, blocks_per_expert):
    """Fills `active` [E, T] and the blocks of all experts that any token needs; returns how many blocks."""
    count = 0
    for expert in range(logits.shape[1]):
        needed = False
        for token in range(logits.shape[0]):
            active[expert, token] = logits[token, expert] > threshold
            needed |= active[expert, token]
        if needed:
            for block in range(expert * blocks_per_expert, (expert + 1) * blocks_per_expert):
                blocks[count] = block
                count += 1
    return count


@njit(parallel=True, fastmath=FASTMATH, cache=True)
def sparse_ffn(plan, threshold, addresses, tokens, threads, scratch, like):
    """The sparse FFN for T tokens.

    Args:
        plan: int64 [13], see the indices above.
        threshold: float32, of the logits.
        addresses: of x [T, D], the given logits [T, E] (0: run the router) and the output [T, D].
        tokens: T.
        threads: number of parts of the work.
        scratch: float32, T times `scratch_per_token` numbers of any value.
        like: a number of the type of x, the weights and the output: float32, or uint16 for bf16.
    """
    hidden, experts = plan[HIDDEN], plan[EXPERTS]
    num_blocks = plan[NEURONS] // plan[BLOCK]
    source = carray(_pointer(addresses[0], like), (tokens, hidden))
    out = carray(_pointer(addresses[2], like), (tokens, hidden))
    x = scratch[: tokens * hidden].reshape((tokens, hidden))
    for token in range(tokens):
        for i in range(hidden):
            x[token, i] = _load(source[token, i])
    own_logits = scratch[tokens * hidden : tokens * (hidden + experts)].reshape((tokens, experts))
    if addresses[1] == 0:
        for part in prange(threads):
            _route(plan, x, own_logits, experts * part // threads, experts * (part + 1) // threads)
    else:
        own_logits[:] = carray(_pointer(addresses[1], np.float32(0)), (tokens, experts))
    active = np.empty((experts, tokens), np.bool_)
    blocks = np.empty(num_blocks, np.int64)
    blocks_per_expert = num_blocks // experts
    count = _active_blocks(own_logits, threshold, active, blocks, blocks_per_expert)
    start = tokens * (hidden + experts)
    partials = scratch[start : start + num_blocks * tokens * hidden].reshape((num_blocks, tokens, hidden))
    for part in prange(threads):
        for index in range(count * part // threads, count * (part + 1) // threads):
            block = blocks[index]
            _add_block(plan, x, active[block // blocks_per_expert], block * plan[BLOCK], partials[index], like)
    for part in prange(threads):
        span = (hidden * part // threads, hidden * (part + 1) // threads)
        _add_partials(plan, partials, blocks[:count], active, out, span, like)


def block_size(num_neurons: int, num_experts: int) -> int:
    """B: a divisor of S from 8 to 16, so that few active experts split evenly; S if none, or in large FFNs."""
    expert_size = num_neurons // num_experts
    if num_neurons > 4096 or expert_size <= 16:
        return expert_size
    return max((size for size in range(8, 17) if expert_size % size == 0), default=expert_size)


def scratch_per_token(hidden: int, num_neurons: int, num_experts: int) -> int:
    """How many float32 the kernel needs for each token: x, logits and partial outputs."""
    num_blocks = num_neurons // block_size(num_neurons, num_experts)
    return hidden + num_experts + num_blocks * hidden


def use_threads(threads: int) -> None:
    """Sets numba's number of threads for the calling thread, as far as its pool reaches."""
    set_num_threads(min(threads, config.NUMBA_NUM_THREADS))
