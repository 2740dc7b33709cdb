"""Triton kernels of the sparse FFN for few tokens, where time is the bytes of weights that are read.

One launch per FFN: its programs all run at once and wait for each other at two barriers, between three phases.

`decode_one_kernel`: (0) routing; (1) each program takes an equal share of the active neurons, whatever experts they
belong to, and streams their rows of gate, up and down through one loop; (2) the programs' outputs are added up.

`decode_many_kernel`: (0) routing; (1) gate and up of the experts that any token needs; (2) down, whose partial sums
the program of a tile adds up that arrives last.

FIRST and LAST limit a launch to some phases: a benchmark times them so, and the interpreter, which runs one program
after the other, takes one at a time.

Shapes: T tokens padded to T_PAD (1, or 16 for tensor cores), D hidden size, F = E S neurons, E experts of S neurons, P
programs. All weights are row-major [rows, D], so every tile is [rows, columns of D] with 16-byte loads along D.
"""

# Triton's own forms: a constexpr is upper case, and None arguments are compiled away.
import triton
import triton.language as tl

from lte.ops.activations import activate
from lte.ops.grid_kernels import grid_reset, grid_sync, list_needed, route_given, route_many, route_one


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
    down_scale,
    order,
    first,
    last,
    D: tl.constexpr,
    S: tl.constexpr,
    D_PAD: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ACTIVATION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """The output [D_PAD] of the units first..last, BLOCK_N neurons of one active expert each."""
    UNITS: tl.constexpr = S // BLOCK_N
    ks = tl.arange(0, D_PAD)
    rows = tl.arange(0, BLOCK_N)
    offsets = rows[:, None] * D + ks[None, :]
    mask = (rows < BLOCK_N)[:, None] & (ks < D)[None, :]
    values = tl.load(x + ks, mask=ks < D, other=0).to(tl.float32)[None, :]
    total = tl.zeros([D_PAD], tl.float32)
    expert = tl.load(order + first // UNITS, mask=first < last, other=0)
    for unit in tl.range(first, last, num_stages=STAGES):
        base = expert * S + (unit % UNITS) * BLOCK_N
        begin = base.to(tl.int64) * D
        u = tl.load(up + begin + offsets, mask=mask, other=0)
        if gate is not None:
            g = tl.load(gate + begin + offsets, mask=mask, other=0)
        w = tl.load(down + begin + offsets, mask=mask, other=0)
        expert = tl.load(order + (unit + 1) // UNITS, mask=unit + 1 < last, other=0)
        neurons = base + rows
        h = _affine(tl.sum(u.to(tl.float32) * values, 1), up_scale, up_bias, neurons)
        if gate is None:
            h = activate(h, ACTIVATION)
        else:
            h *= activate(_affine(tl.sum(g.to(tl.float32) * values, 1), gate_scale, gate_bias, neurons), ACTIVATION)
        if down_scale is not None:
            h *= tl.load(down_scale + neurons)
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
    masks,
    order,
    partial,
    workspace,
    out,
    threshold,
    D: tl.constexpr,
    E: tl.constexpr,
    S: tl.constexpr,
    P: tl.constexpr,
    E_PAD: tl.constexpr,
    D_PAD: tl.constexpr,
    R: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ACTIVATION: tl.constexpr,
    STAGES: tl.constexpr,
    FIRST: tl.constexpr,
    LAST: tl.constexpr,
):
    """out [1, D] of x [1, D]; scratch masks [E], order [E], partial [P, D] of any content, workspace of zeros."""
    program = tl.program_id(0)
    if FIRST == 0:
        if logits is None:
            route_one(x, router, router_bias, masks, threshold, D, E, P, R, BLOCK_R)
        else:
            route_given(logits, masks, threshold, 1, E, 1, P, R)
    if FIRST < 1 and LAST >= 1:
        grid_sync(workspace, P)
    if FIRST <= 1 and LAST >= 1:
        units = list_needed(masks, order, E, E_PAD) * (S // BLOCK_N)
        first = program * units // P
        last = (program + 1) * units // P
        total = _stream_neurons(
            x, up, gate, down, up_bias, gate_bias, up_scale, gate_scale, down_scale, order, first, last,
            D, S, D_PAD, BLOCK_N, ACTIVATION, STAGES,
        )  # fmt: skip
        ks = tl.arange(0, D_PAD)
        tl.store(partial + program * D + ks, total, mask=ks < D)
    if FIRST < 2 and LAST == 2:
        grid_sync(workspace + 1, P)
    if LAST == 2:
        columns = program * BLOCK_C + tl.arange(0, BLOCK_C)
        sums = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
        for start in tl.static_range(0, P, BLOCK_P):
            programs = start + tl.arange(0, BLOCK_P)
            mask = (programs < P)[:, None] & (columns < D)[None, :]
            sums += tl.load(
                partial + programs[:, None] * D + columns[None, :], mask=mask, other=0, cache_modifier=".cg"
            )
        output = tl.sum(sums, 0)
        if down_bias is not None:
            output += tl.load(down_bias + columns, mask=columns < D, other=0).to(tl.float32)
        tl.store(out + columns, output.to(out.dtype.element_ty), mask=columns < D)
    if FIRST == 0 and LAST == 2:
        grid_reset(workspace, P)


@triton.jit
def _gate_up(
    x,
    up,
    gate,
    up_bias,
    gate_bias,
    up_scale,
    gate_scale,
    down_scale,
    masks,
    order,
    h,
    first,
    last,
    T,
    D: tl.constexpr,
    E: tl.constexpr,
    S: tl.constexpr,
    T_PAD: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ACTIVATION: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
    STAGES: tl.constexpr,
):
    """h [T, F] of the units first..last, BLOCK_N neurons of one expert each, in one loop over units and columns."""
    UNITS: tl.constexpr = S // BLOCK_N
    STEPS: tl.constexpr = (D + BLOCK_K - 1) // BLOCK_K
    ks = tl.arange(0, BLOCK_K)
    rows = tl.arange(0, BLOCK_N)
    ts = tl.arange(0, T_PAD)
    a = tl.zeros([BLOCK_N, T_PAD], tl.float32)
    b = tl.zeros([BLOCK_N, T_PAD], tl.float32)
    expert = tl.load(order + first // UNITS, mask=first < last, other=0)
    for step in tl.range(first * STEPS, last * STEPS, num_stages=STAGES):
        k = (step % STEPS) * BLOCK_K
        base = expert * S + (step // STEPS % UNITS) * BLOCK_N
        offsets = rows[:, None] * D + (k + ks)[None, :]
        begin = base.to(tl.int64) * D
        mask = (rows < BLOCK_N)[:, None] & (k + ks < D)[None, :]
        u = tl.load(up + begin + offsets, mask=mask, other=0)
        if gate is not None:
            g = tl.load(gate + begin + offsets, mask=mask, other=0)
        mask_x = (ts < T)[None, :] & (k + ks < D)[:, None]
        values = tl.load(x + ts[None, :] * D + (k + ks)[:, None], mask=mask_x, other=0).to(DOT_DTYPE)
        a = tl.dot(u.to(DOT_DTYPE), values, a, input_precision="ieee")
        if gate is not None:
            b = tl.dot(g.to(DOT_DTYPE), values, b, input_precision="ieee")
        if step % STEPS == STEPS - 1:
            neurons = base + rows
            value = _affine_rows(a, up_scale, up_bias, neurons)
            if gate is None:
                value = activate(value, ACTIVATION)
            else:
                value *= activate(_affine_rows(b, gate_scale, gate_bias, neurons), ACTIVATION)
            if down_scale is not None:
                value *= tl.load(down_scale + neurons)[:, None]
            active = (tl.load(masks + expert, cache_modifier=".cg") >> ts) & 1
            value = tl.where((active != 0)[None, :], value, 0.0)
            target = h + ts[None, :] * (E * S) + neurons[:, None]
            tl.store(target, value.to(h.dtype.element_ty), mask=(ts < T)[None, :] & (rows < BLOCK_N)[:, None])
            a = tl.zeros([BLOCK_N, T_PAD], tl.float32)
            b = tl.zeros([BLOCK_N, T_PAD], tl.float32)
        next_step = step + 1
        expert = tl.load(order + next_step // STEPS // UNITS, mask=next_step < last * STEPS, other=0)


@triton.jit
def _affine_rows(values, scale, bias, neurons):
    """values [N, T_PAD] of neurons [N] times scale plus bias, each [F] or None."""
    if scale is not None:
        values *= tl.load(scale + neurons)[:, None]
    if bias is not None:
        values += tl.load(bias + neurons).to(tl.float32)[:, None]
    return values


@triton.jit
def _down(
    h,
    down,
    order,
    begin,
    end,
    columns,
    T,
    D: tl.constexpr,
    E: tl.constexpr,
    S: tl.constexpr,
    T_PAD: tl.constexpr,
    BLOCK_D: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
    STAGES: tl.constexpr,
):
    """h times the rows of the needed experts of ranks begin..end: [T_PAD, BLOCK_D] fp32."""
    ROWS: tl.constexpr = S if S > 16 else 16  # the least depth of tl.dot; half of it is masked for S = 8
    rows = tl.arange(0, ROWS)
    ts = tl.arange(0, T_PAD)
    mask = (rows < S)[:, None] & (columns < D)[None, :]
    offsets = rows[:, None] * D + columns[None, :]
    total = tl.zeros([T_PAD, BLOCK_D], tl.float32)
    expert = tl.load(order + begin, mask=begin < end, other=0)
    for rank in tl.range(begin, end, num_stages=STAGES):
        w = tl.load(down + expert.to(tl.int64) * (S * D) + offsets, mask=mask, other=0)
        mask_h = (ts < T)[:, None] & (rows < S)[None, :]
        source = h + ts[:, None] * (E * S) + (expert * S + rows)[None, :]
        values = tl.load(source, mask=mask_h, other=0, cache_modifier=".cg").to(DOT_DTYPE)
        expert = tl.load(order + rank + 1, mask=rank + 1 < end, other=0)
        total = tl.dot(values, w.to(DOT_DTYPE), total, input_precision="ieee")
    return total


@triton.jit(do_not_specialize=["T"])
def decode_many_kernel(
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
    masks,
    order,
    h,
    partial,
    workspace,
    out,
    threshold,
    T,
    D: tl.constexpr,
    E: tl.constexpr,
    S: tl.constexpr,
    P: tl.constexpr,
    E_PAD: tl.constexpr,
    T_PAD: tl.constexpr,
    R: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SPLITS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
    ROUTER_DTYPE: tl.constexpr,
    STAGES: tl.constexpr,
    FIRST: tl.constexpr,
    LAST: tl.constexpr,
):
    """out [T, D] of x [T, D]; scratch masks [E], order [E], h [T, F], partial [SPLITS, T, D], workspace of zeros.

    The workspace holds the counters of the barriers in its first 4 numbers and then one counter per tile of columns.
    """
    program = tl.program_id(0)
    if FIRST == 0:
        if logits is None:
            route_many(x, router, router_bias, masks, threshold, T, D, E, T_PAD, P, R, BLOCK_R, ROUTER_DTYPE)
        else:
            route_given(logits, masks, threshold, T, E, T_PAD, P, R)
    if FIRST < 1 and LAST >= 1:
        grid_sync(workspace, P)
    if LAST >= 1:
        count = list_needed(masks, order, E, E_PAD)
    if FIRST <= 1 and LAST >= 1:
        units = count * (S // BLOCK_N)
        _gate_up(
            x, up, gate, up_bias, gate_bias, up_scale, gate_scale, down_scale, masks, order, h,
            program * units // P, (program + 1) * units // P, T,
            D, E, S, T_PAD, BLOCK_N, BLOCK_K, ACTIVATION, DOT_DTYPE, STAGES,
        )  # fmt: skip
    if FIRST < 2 and LAST == 2:
        grid_sync(workspace + 1, P)
    if LAST == 2:
        TILES: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
        ts = tl.arange(0, T_PAD)
        for item in tl.range(program, TILES * SPLITS, P, num_stages=1):
            tile = item % TILES
            split = item // TILES
            columns = tile * BLOCK_D + tl.arange(0, BLOCK_D)
            mask = (ts < T)[:, None] & (columns < D)[None, :]
            offsets = ts[:, None] * D + columns[None, :]
            begin = split * count // SPLITS
            end = (split + 1) * count // SPLITS
            total = _down(h, down, order, begin, end, columns, T, D, E, S, T_PAD, BLOCK_D, DOT_DTYPE, STAGES)
            tl.store(partial + split * T * D + offsets, total, mask=mask)
            tl.debug_barrier()  # every thread's stores come before the one thread's release
            if tl.atomic_add(workspace + 4 + tile, 1, sem="acq_rel", scope="gpu") == SPLITS - 1:
                tl.debug_barrier()
                tl.store(workspace + 4 + tile, 0)
                total = tl.zeros([T_PAD, BLOCK_D], tl.float32)
                for other in tl.static_range(SPLITS):
                    total += tl.load(partial + other * T * D + offsets, mask=mask, other=0, cache_modifier=".cg")
                if down_bias is not None:
                    total += tl.load(down_bias + columns, mask=columns < D, other=0).to(tl.float32)[None, :]
                tl.store(out + offsets, total.to(out.dtype.element_ty), mask=mask)
    if FIRST == 0 and LAST == 2:
        grid_reset(workspace, P)
