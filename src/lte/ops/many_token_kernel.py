"""The Triton kernel of the sparse FFN for 2 to 16 tokens, on tensor cores.

One launch per FFN, as that of `one_token_kernel`; its phases are: (0) routing; (1) gate and up of the experts that any
token needs; (2) down, whose partial sums the program of a tile adds up that arrives last, always in the same order.

Shapes: T tokens padded to T_PAD = 16, D hidden size, F = E S neurons, E experts of S neurons, P programs. All weights
are row-major [rows, D], so every tile is [rows, columns of D] with 16-byte loads along D.
"""

# Triton's own forms: a constexpr is upper case, and None arguments are compiled away.
import triton
import triton.language as tl

from lte.ops.activation_kernel import activate
from lte.ops.grid_kernels import (
    await_inputs,
    experts_of_ranks,
    grid_arrive,
    grid_finish,
    grid_wait,
    pick,
    prefetch,
    route_few,
    route_given,
    route_many,
    wait_for_masks,
)


@triton.jit
def _gate_up(
    x,
    up,
    gate,
    up_bias,
    gate_bias,
    up_scale,
    gate_scale,
    masks,
    experts,
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
    SPAN: tl.constexpr,
    ACTIVATION: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
    STAGES: tl.constexpr,
):
    """h [T, F] of the neurons first..last of those of `experts`, in blocks of up to BLOCK_N neurons, at most S.

    A block holds neurons of one expert, so that a share can have one block more than its neurons would fill. With SPAN
    a block may go on in the expert that follows in `experts`, and all but the last of a share hold as many neurons.
    One loop over blocks and columns, so that its copies never run dry between blocks.
    """
    STEPS: tl.constexpr = (D + BLOCK_K - 1) // BLOCK_K
    ks = tl.arange(0, BLOCK_K)
    rows = tl.arange(0, BLOCK_N)
    ts = tl.arange(0, T_PAD)
    a = tl.zeros([BLOCK_N, T_PAD], tl.float32)
    b = tl.zeros([BLOCK_N, T_PAD], tl.float32)
    if SPAN:
        blocks = tl.cdiv(last - first, BLOCK_N)
        width = tl.cdiv(last - first, tl.maximum(blocks, 1))
        begin_step = 0
        end_step = blocks * STEPS
    else:
        begin_step = first // BLOCK_N * STEPS
        end_step = tl.where(first < last, tl.cdiv(last, BLOCK_N), first // BLOCK_N) * STEPS
    for step in tl.range(begin_step, end_step, num_stages=STAGES):
        start = first + step // STEPS * width if SPAN else step // STEPS * BLOCK_N
        found = pick(experts, start // S - first // S)
        k = (step % STEPS) * BLOCK_K
        offsets = rows[:, None] * D + (k + ks)[None, :]
        if SPAN:
            is_first = start % S + rows < S
            expert = tl.where(is_first, found & 0xFFFF, found >> 16)[:, None]
            # What lies between the two experts, in neurons.
            jump = tl.where(is_first, 0, ((found >> 16) - (found & 0xFFFF) - 1) * S)
            base = (found & 0xFFFF) * S + start % S
            neurons = base + rows + jump
            mine = (rows < width) & (start + rows < last)
            offsets += jump.to(tl.int64)[:, None] * D
        else:
            expert = found
            base = expert * S + start % S
            neurons = base + rows
            mine = (start + rows >= first) & (start + rows < last)
        begin = base.to(tl.int64) * D
        mask = mine[:, None] & (k + ks < D)[None, :]
        u = tl.load(up + begin + offsets, mask=mask, other=0)
        if gate is not None:
            g = tl.load(gate + begin + offsets, mask=mask, other=0)
        mask_x = (ts < T)[None, :] & (k + ks < D)[:, None]
        values = tl.load(x + ts[None, :] * D + (k + ks)[:, None], mask=mask_x, other=0).to(DOT_DTYPE)
        a = tl.dot(u.to(DOT_DTYPE), values, a, input_precision="ieee")
        if gate is not None:
            b = tl.dot(g.to(DOT_DTYPE), values, b, input_precision="ieee")
        if step % STEPS == STEPS - 1:
            value = _affine_rows(a, up_scale, up_bias, neurons)
            if gate is None:
                value = activate(value, ACTIVATION)
            else:
                value *= activate(_affine_rows(b, gate_scale, gate_bias, neurons), ACTIVATION)
            active = (tl.load(masks + expert, cache_modifier=".cg").to(tl.int32) >> ts[None, :]) & 1
            value = tl.where(active != 0, value, 0.0)
            target = h + ts[None, :] * (E * S) + neurons[:, None]
            tl.store(target, value.to(h.dtype.element_ty), mask=(ts < T)[None, :] & mine[:, None])
            a = tl.zeros([BLOCK_N, T_PAD], tl.float32)
            b = tl.zeros([BLOCK_N, T_PAD], tl.float32)


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
    total,
    experts,
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
    """total [T_PAD, BLOCK_D] plus h times the rows of `experts`, those of the ranks begin..end."""
    ROWS: tl.constexpr = S if S > 16 else 16  # the least depth of tl.dot; half of it is masked for S = 8
    rows = tl.arange(0, ROWS)
    ts = tl.arange(0, T_PAD)
    mask = (rows < S)[:, None] & (columns < D)[None, :]
    offsets = rows[:, None] * D + columns[None, :]
    for rank in tl.range(begin, end, num_stages=STAGES):
        expert = pick(experts, rank - begin)
        w = tl.load(down + expert.to(tl.int64) * (S * D) + offsets, mask=mask, other=0)
        mask_h = (ts < T)[:, None] & (rows < S)[None, :]
        source = h + ts[:, None] * (E * S) + (expert * S + rows)[None, :]
        values = tl.load(source, mask=mask_h, other=0, cache_modifier=".cg").to(DOT_DTYPE)
        total = tl.dot(values, w.to(DOT_DTYPE), total, input_precision="ieee")
    return total


@triton.jit
def _prefetch_down(
    down,
    needed,
    count,
    D: tl.constexpr,
    S: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TILES: tl.constexpr,
    SPLITS: tl.constexpr,
    N: tl.constexpr,
):
    """Asks for what this program will read first of the down projection, by whole lines: of up to N experts."""
    LINE: tl.constexpr = 1024 // down.dtype.element_ty.primitive_bitwidth
    item = tl.minimum(tl.program_id(0), TILES * SPLITS - 1)
    begin = item // TILES * count // SPLITS
    end = (item // TILES + 1) * count // SPLITS
    wanted = tl.arange(0, N) < end - begin
    experts = tl.where(wanted, experts_of_ranks(needed, begin, N), 0).to(tl.int64)
    neurons = experts[:, None] * S + tl.arange(0, S)[None, :]
    lines = tl.arange(0, (BLOCK_D + LINE - 1) // LINE)
    columns = tl.minimum(item % TILES * BLOCK_D + lines * LINE, D - 1)
    prefetch(down + neurons[:, :, None] * D + columns[None, None, :])


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
    h,
    partial,
    counters,
    masks,
    out,
    threshold,
    T,
    D: tl.constexpr,
    E: tl.constexpr,
    S: tl.constexpr,
    P: tl.constexpr,
    E_PAD: tl.constexpr,
    AT_ONCE: tl.constexpr,
    T_PAD: tl.constexpr,
    T_ROUTE: tl.constexpr,
    R: tl.constexpr,
    LOCAL: tl.constexpr,
    LOCAL_DOWN: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SHARE: tl.constexpr,
    SPAN: tl.constexpr,
    PREFETCH: tl.constexpr,
    SPLITS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
    ROUTER_AS: tl.constexpr,
    ROUTER_DTYPE: tl.constexpr,
    STAGES: tl.constexpr,
    DOWN_STAGES: tl.constexpr,
    DEPENDENT: tl.constexpr,
    FIRST: tl.constexpr,
    LAST: tl.constexpr,
):
    """out [T, D] of x [T, D]; h [T, F] and partial [SPLITS, T, D] of any content, counters and masks of a `Workspace`.

    The counters hold one per tile of columns from the fifth on.
    """
    program = tl.program_id(0)
    if DEPENDENT:
        await_inputs(router, D, E, P, R)
    tag = tl.load(counters + 2)
    if FIRST == 0:
        if logits is None:
            if T_ROUTE <= 8:
                route_few(x, router, router_bias, masks, tag, threshold, T, D, E, T_ROUTE, P, R, BLOCK_R, ROUTER_AS)
            else:
                route_many(
                    x,
                    router,
                    router_bias,
                    masks,
                    tag,
                    threshold,
                    T,
                    D,
                    E,
                    T_PAD,
                    P,
                    R,
                    BLOCK_R,
                    ROUTER_AS,
                    ROUTER_DTYPE,
                )
        else:
            route_given(logits, masks, tag, threshold, T, E, T_PAD, P, R)
    if LAST >= 1:
        needed = wait_for_masks(masks, tag, E, E_PAD, AT_ONCE, FIRST < 1)
        count = tl.sum((needed != 0).to(tl.int32), 0)
    if FIRST <= 1 and LAST >= 1:
        shares = count * (S // SHARE)
        first = program * shares // P * SHARE
        experts = experts_of_ranks(needed, first // S, LOCAL)
        if SPAN:
            # Behind the last expert there is none; its neurons are nobody's, but biases and scales are read for them.
            experts |= tl.minimum(experts_of_ranks(needed, first // S + 1, LOCAL), E - 1) << 16
        _gate_up(
            x, up, gate, up_bias, gate_bias, up_scale, gate_scale, masks, experts, h,
            first, (program + 1) * shares // P * SHARE, T,
            D, E, S, T_PAD, BLOCK_N, BLOCK_K, SPAN, ACTIVATION, DOT_DTYPE, STAGES,
        )  # fmt: skip
    TILES: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    if FIRST < 2 and LAST == 2:
        grid_arrive(counters)
        if PREFETCH:
            _prefetch_down(down, needed, count, D, S, BLOCK_D, TILES, SPLITS, PREFETCH)
        grid_wait(counters, P)
    if LAST == 2:
        ts = tl.arange(0, T_PAD)
        for item in tl.range(program, TILES * SPLITS, P, num_stages=1):
            tile = item % TILES
            split = item // TILES
            columns = tile * BLOCK_D + tl.arange(0, BLOCK_D)
            mask = (ts < T)[:, None] & (columns < D)[None, :]
            offsets = ts[:, None] * D + columns[None, :]
            begin = split * count // SPLITS
            end = (split + 1) * count // SPLITS
            total = tl.zeros([T_PAD, BLOCK_D], tl.float32)
            for rank in tl.range(begin, end, LOCAL_DOWN, num_stages=1):
                some = experts_of_ranks(needed, rank, LOCAL_DOWN)
                until = tl.minimum(rank + LOCAL_DOWN, end)
                total = _down(
                    h, down, total, some, rank, until, columns, T, D, E, S, T_PAD, BLOCK_D, DOT_DTYPE, DOWN_STAGES
                )  # fmt: skip
            tl.store(partial + split * T * D + offsets, total, mask=mask)
            tl.debug_barrier()  # every thread's stores come before the one thread's release
            if tl.atomic_add(counters + 4 + tile, 1, sem="acq_rel", scope="gpu") == SPLITS - 1:
                tl.debug_barrier()
                tl.store(counters + 4 + tile, 0)
                total = tl.zeros([T_PAD, BLOCK_D], tl.float32)
                for other in tl.static_range(SPLITS):
                    total += tl.load(partial + other * T * D + offsets, mask=mask, other=0, cache_modifier=".cg")
                if down_scale is not None:
                    total *= tl.load(down_scale + columns, mask=columns < D, other=0)[None, :]
                if down_bias is not None:
                    total += tl.load(down_bias + columns, mask=columns < D, other=0).to(tl.float32)[None, :]
                tl.store(out + offsets, total.to(out.dtype.element_ty), mask=mask)
    if LAST == 2:
        grid_finish(counters, P)
