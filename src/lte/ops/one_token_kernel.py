"""The Triton kernel of the sparse FFN for one token, where time is the bytes of weights that are read.

One launch per FFN: its programs all run at once and wait for each other between three phases: (0) routing; (1) each
program takes an equal share of the active neurons, whatever experts they belong to, and streams their rows of gate, up
and down through one loop; (2) the programs' outputs are added up, always in the same order.

FIRST and LAST limit a launch to some phases: a benchmark times them so, and the interpreter, which runs one program
after the other, takes one at a time.

Shapes: D hidden size, F = E S neurons, E experts of S neurons, P programs. All weights are row-major [rows, D], so
every tile is [rows, columns of D] with 16-byte loads along D.
"""

# Triton's own forms: a constexpr is upper case, and None arguments are compiled away.
import triton
import triton.language as tl

from lte.ops.activation_kernel import activate
from lte.ops.grid_kernels import (
    await_inputs,
    experts_of_ranks,
    grid_finish,
    grid_sync,
    pick,
    route_given,
    route_one,
    wait_for_masks,
)


@triton.jit
def _affine(values, scale, bias, neurons):
    """values [N, ...] of neurons [N] times scale plus bias, each [F] or None."""
    if scale is not None:
        values *= tl.load(scale + neurons)
    if bias is not None:
        values += tl.load(bias + neurons).to(tl.float32)
    return values


@triton.jit
def _stream_neurons(
    x,
    up,
    gate,
    down,
    up_bias,
    gate_bias,
    up_scale,
    gate_scale,
    experts,
    first,
    last,
    D: tl.constexpr,
    S: tl.constexpr,
    D_PAD: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ACTIVATION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """The output [D_PAD] of the neurons first..last of those of `experts`, BLOCK_N of one expert at a time."""
    ks = tl.arange(0, D_PAD)
    rows = tl.arange(0, BLOCK_N)
    offsets = rows[:, None] * D + ks[None, :]
    values = tl.load(x + ks, mask=ks < D, other=0).to(tl.float32)[None, :]
    total = tl.zeros([D_PAD], tl.float32)
    block = tl.where(first < last, first // BLOCK_N * BLOCK_N, last)
    for start in tl.range(block, last, BLOCK_N, num_stages=STAGES):
        expert = pick(experts, start // S - first // S)
        base = expert * S + start % S
        begin = base.to(tl.int64) * D
        # Blocks do not span experts, so those at the ends of a share hold fewer neurons.
        mine = (start + rows >= first) & (start + rows < last)
        mask = mine[:, None] & (ks < D)[None, :]
        u = tl.load(up + begin + offsets, mask=mask, other=0)
        if gate is not None:
            g = tl.load(gate + begin + offsets, mask=mask, other=0)
        w = tl.load(down + begin + offsets, mask=mask, other=0)
        neurons = base + rows
        h = _affine(tl.sum(u.to(tl.float32) * values, 1), up_scale, up_bias, neurons)
        if gate is None:
            h = activate(h, ACTIVATION)
        else:
            h *= activate(_affine(tl.sum(g.to(tl.float32) * values, 1), gate_scale, gate_bias, neurons), ACTIVATION)
        total += tl.sum(h[:, None] * w.to(tl.float32), 0)
    return total


@triton.jit
def decode_one_kernel(
    x,
    up,
    gate,
    down,
    up_bias,
    gate_bias,
    down_bias,
    up_scale,
    gate_scale,
    down_scale,
    router,
    router_bias,
    logits,
    partial,
    counters,
    masks,
    out,
    threshold,
    D: tl.constexpr,
    E: tl.constexpr,
    S: tl.constexpr,
    P: tl.constexpr,
    E_PAD: tl.constexpr,
    AT_ONCE: tl.constexpr,
    D_PAD: tl.constexpr,
    R: tl.constexpr,
    LOCAL: tl.constexpr,
    BLOCK_R: tl.constexpr,
    ROUTER_AS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ACTIVATION: tl.constexpr,
    STAGES: tl.constexpr,
    DEPENDENT: tl.constexpr,
    FIRST: tl.constexpr,
    LAST: tl.constexpr,
):
    """out [1, D] of x [1, D]; partial [P, D] of any content, and the counters and masks of a `Workspace`."""
    program = tl.program_id(0)
    if DEPENDENT:
        await_inputs(router, D, E, P, R)
    tag = tl.load(counters + 2)
    if FIRST == 0:
        if logits is None:
            route_one(x, router, router_bias, masks, tag, threshold, D, E, P, R, BLOCK_R, ROUTER_AS)
        else:
            route_given(logits, masks, tag, threshold, 1, E, 1, P, R)
    if FIRST <= 1 and LAST >= 1:
        needed = wait_for_masks(masks, tag, E, E_PAD, AT_ONCE, FIRST < 1)
        neurons = tl.sum(needed, 0) * S
        first = program * neurons // P
        last = (program + 1) * neurons // P
        experts = experts_of_ranks(needed, first // S, LOCAL)
        total = _stream_neurons(
            x, up, gate, down, up_bias, gate_bias, up_scale, gate_scale, experts, first, last,
            D, S, D_PAD, BLOCK_N, ACTIVATION, STAGES,
        )  # fmt: skip
        ks = tl.arange(0, D_PAD)
        tl.store(partial + program * D + ks, total, mask=ks < D)
    if FIRST < 2 and LAST == 2:
        grid_sync(counters, P)
    if LAST == 2:
        columns = program * BLOCK_C + tl.arange(0, BLOCK_C)
        sums = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
        for start in tl.static_range(0, P, BLOCK_P):
            programs = start + tl.arange(0, BLOCK_P)
            mask = (programs < P)[:, None] & (columns < D)[None, :]
            values = tl.load(
                partial + programs[:, None] * D + columns[None, :], mask=mask, other=0, cache_modifier=".cg"
            )
            if start == 0:
                grid_finish(counters, P)  # takes as long as the loads, which are under way
            sums += values
        output = tl.sum(sums, 0)
        if down_scale is not None:
            output *= tl.load(down_scale + columns, mask=columns < D, other=0)
        if down_bias is not None:
            output += tl.load(down_bias + columns, mask=columns < D, other=0).to(tl.float32)
        tl.store(out + columns, output.to(out.dtype.element_ty), mask=columns < D)
