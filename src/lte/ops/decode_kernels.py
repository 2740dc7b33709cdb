"""Triton kernels of the sparse FFN for few tokens, where time is the bytes of weights that are read.

`gate_up_kernel` computes the intermediate activations of the active experts and marks the experts that any
token needs; `down_kernel` multiplies those by the down projection. `route_kernel` is a router of its own for
cases where every sub-tile's computing its expert's logits again costs more than a launch.

Shapes: T tokens padded to T_PAD (1, or 16 for tensor cores), D hidden size, F = E S neurons, E experts of S.
All weights are row-major [rows, D], so every tile is [rows, columns of D] with 16-byte loads along D.
"""

# Triton's own forms: a constexpr is upper case, and None arguments are compiled away.
import triton
import triton.language as tl

from lte.ops.activations import activate


@triton.jit
def _project(
    x,
    first,
    second,
    rows,
    row_mask,
    begin,
    end,
    T,
    D: tl.constexpr,
    T_PAD: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
    STAGES: tl.constexpr,
):
    """x[:, begin:end] times rows of `first` and of `second` (or None): [T_PAD, BLOCK_N] fp32 each.

    One token multiplies and adds elementwise and sums once at the end; more tokens use tensor cores.
    """
    ks = tl.arange(0, BLOCK_K)
    offsets = rows[:, None] * D + ks[None, :]
    a = tl.zeros([BLOCK_N, BLOCK_K] if T_PAD == 1 else [BLOCK_N, T_PAD], tl.float32)
    b = a
    for k in tl.range(begin, end, BLOCK_K, num_stages=STAGES):
        k_mask = k + ks < end
        mask = row_mask[:, None] & k_mask[None, :]
        w = tl.load(first + offsets + k, mask=mask, other=0)
        if second is not None:
            v = tl.load(second + offsets + k, mask=mask, other=0)
        if T_PAD == 1:
            values = tl.load(x + k + ks, mask=k_mask, other=0).to(tl.float32)[None, :]
            a += w.to(tl.float32) * values
            if second is not None:
                b += v.to(tl.float32) * values
        else:
            ts = tl.arange(0, T_PAD)
            mask_x = (ts < T)[None, :] & k_mask[:, None]
            values = tl.load(x + ts[None, :] * D + (k + ks)[:, None], mask=mask_x, other=0).to(DOT_DTYPE)
            a = tl.dot(w.to(DOT_DTYPE), values, a, input_precision="ieee")
            if second is not None:
                b = tl.dot(v.to(DOT_DTYPE), values, b, input_precision="ieee")
    if T_PAD == 1:
        a = tl.sum(a, 1)[:, None]
        b = tl.sum(b, 1)[:, None]
    return tl.trans(a), tl.trans(b)


@triton.jit(do_not_specialize=["T"])
def route_kernel(
    x,
    router,
    logits,
    T,
    D: tl.constexpr,
    E: tl.constexpr,
    T_PAD: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PARTS: tl.constexpr,
    PDL: tl.constexpr,
):
    """Logits of BLOCK_E experts over one of PARTS shares of D, without bias, to logits [PARTS, T, E].

    The consumer adds up the parts: so there are programs enough for a GPU, and no atomics.
    """
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    SHARE: tl.constexpr = (D + PARTS * BLOCK_K - 1) // (PARTS * BLOCK_K) * BLOCK_K
    part = tl.program_id(1)
    experts = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    ts = tl.arange(0, T_PAD)
    on = experts < E
    begin = part * SHARE
    end = tl.minimum(begin + SHARE, D)
    values, _ = _project(x, router, None, experts, on, begin, end, T, D, T_PAD, BLOCK_E, BLOCK_K, tl.float32, 1)
    offsets = (part * T + ts)[:, None] * E + experts[None, :]
    tl.store(logits + offsets, values, mask=(ts < T)[:, None] & on[None, :])


@triton.jit
def _own_logits(x, row, T, D: tl.constexpr, T_PAD: tl.constexpr, BLOCK_R: tl.constexpr):
    """The products of x with one router row: [T_PAD] fp32."""
    ks = tl.arange(0, BLOCK_R)
    ts = tl.arange(0, T_PAD)
    total = tl.zeros([T_PAD, BLOCK_R], tl.float32)
    for k in tl.range(0, D, BLOCK_R):
        k_mask = k + ks < D
        w = tl.load(row + k + ks, mask=k_mask, other=0).to(tl.float32)
        mask = (ts < T)[:, None] & k_mask[None, :]
        values = tl.load(x + ts[:, None] * D + (k + ks)[None, :], mask=mask, other=0)
        total += values.to(tl.float32) * w[None, :]
    return tl.sum(total, 1)


@triton.jit
def _given_logits(logits, expert, T, E: tl.constexpr, T_PAD: tl.constexpr, PARTS: tl.constexpr):
    """The sum over the parts of logits[:, :, expert]: [T_PAD] fp32."""
    ts = tl.arange(0, T_PAD)
    total = tl.load(logits + ts * E + expert, mask=ts < T, other=0)
    for part in tl.static_range(1, PARTS):
        total += tl.load(logits + (part * T + ts) * E + expert, mask=ts < T, other=0)
    return total


@triton.jit(do_not_specialize=["T"])
def gate_up_kernel(
    x,
    up,
    gate,
    up_bias,
    gate_bias,
    up_scale,
    gate_scale,
    down_scale,
    router,
    router_bias,
    logits,
    h,
    union,
    counters,
    threshold,
    T,
    D: tl.constexpr,
    E: tl.constexpr,
    S: tl.constexpr,
    T_PAD: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PARTS: tl.constexpr,
    COUNTERS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    """h [T, F] of BLOCK_N neurons of one expert for all tokens, and union [E]: whether any token needs it.

    h stays unwritten where no token needs the expert. With `router` each program computes its expert's logits
    from its row (the sub-tiles of an expert do the same sums in the same order, so they agree); else `logits`
    [PARTS, T, E] hold them. The first program zeroes the counters of `down_kernel`, so nobody else must.
    """
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    program = tl.program_id(0)
    expert = program // (S // BLOCK_N)
    part = program % (S // BLOCK_N)
    if router is not None:
        values = _own_logits(x, router + expert.to(tl.int64) * D, T, D, T_PAD, BLOCK_R)
    else:
        values = _given_logits(logits, expert, T, E, T_PAD, PARTS)
    if router_bias is not None:
        values += tl.load(router_bias + expert).to(tl.float32)
    ts = tl.arange(0, T_PAD)
    active = (values > threshold) & (ts < T)
    needed = tl.max(active.to(tl.int32), 0)
    if part == 0:
        tl.store(union + expert, needed)
    if program == 0:
        tl.store(counters + tl.arange(0, COUNTERS), tl.zeros([COUNTERS], tl.int32))
    if needed > 0:
        rows = tl.arange(0, BLOCK_N)
        base = expert.to(tl.int64) * S + part * BLOCK_N
        second = None if gate is None else gate + base * D
        u, g = _project(x, up + base * D, second, rows, rows < BLOCK_N, 0, D, T, D, T_PAD, BLOCK_N, BLOCK_K, DOT_DTYPE, STAGES)  # fmt: skip  # noqa: E501
        neurons = base + rows
        u = _affine(u, up_scale, up_bias, neurons)
        if gate is None:
            value = activate(u, ACTIVATION)
        else:
            value = activate(_affine(g, gate_scale, gate_bias, neurons), ACTIVATION) * u
        if down_scale is not None:
            value *= tl.load(down_scale + neurons)[None, :]
        value = tl.where(active[:, None], value, 0.0)
        tl.store(h + ts[:, None] * (E * S) + neurons[None, :], value.to(h.dtype.element_ty), mask=(ts < T)[:, None])


@triton.jit
def _affine(values, scale, bias, neurons):
    """values [T_PAD, BLOCK_N] times scale plus bias, each [F] or None."""
    if scale is not None:
        values *= tl.load(scale + neurons)[None, :]
    if bias is not None:
        values += tl.load(bias + neurons).to(tl.float32)[None, :]
    return values


@triton.jit
def _find(ranks, ids, rank):
    """The id whose rank is `rank`; 0 if there is none."""
    return tl.sum(tl.where(ranks == rank, ids, 0), 0)


@triton.jit
def _accumulate(
    h,
    down,
    ranks,
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
    """h times the rows of the active experts of ranks begin..end: [T_PAD, BLOCK_D] fp32."""
    ROWS: tl.constexpr = S if S > 16 else 16  # the least depth of tl.dot; half of it is masked for S = 8
    ids = tl.arange(0, ranks.shape[0])
    rows = tl.arange(0, ROWS)
    ts = tl.arange(0, T_PAD)
    mask = (rows < S)[:, None] & (columns < D)[None, :]
    offsets = rows[:, None] * D + columns[None, :]
    total = tl.zeros([ROWS, BLOCK_D] if T_PAD == 1 else [T_PAD, BLOCK_D], tl.float32)
    expert = _find(ranks, ids, begin)
    for rank in tl.range(begin, end, num_stages=STAGES):
        w = tl.load(down + expert.to(tl.int64) * (S * D) + offsets, mask=mask, other=0)
        neurons = expert * S + rows
        if T_PAD == 1:
            values = tl.load(h + neurons, mask=rows < S, other=0).to(tl.float32)
        else:
            mask_h = (ts < T)[:, None] & (rows < S)[None, :]
            values = tl.load(h + ts[:, None] * (E * S) + neurons[None, :], mask=mask_h, other=0).to(DOT_DTYPE)
        expert = _find(ranks, ids, rank + 1)  # while the loads are under way
        if T_PAD == 1:
            total += w.to(tl.float32) * values[:, None]
        else:
            total = tl.dot(values, w.to(DOT_DTYPE), total, input_precision="ieee")
    return tl.sum(total, 0)[None, :] if T_PAD == 1 else total


@triton.jit
def _sum_partials(partial, columns, T, D: tl.constexpr, T_PAD: tl.constexpr, SPLITS: tl.constexpr):
    """The sum over the splits of partial [SPLITS, T, D] in a fixed order: [T_PAD, BLOCK_D] fp32."""
    column_mask = columns < D
    if T_PAD == 1:
        splits = tl.arange(0, SPLITS)
        values = tl.load(
            partial + splits[:, None] * D + columns[None, :], mask=column_mask[None, :], other=0, cache_modifier=".cg"
        )
        return tl.sum(values, 0)[None, :]
    else:
        ts = tl.arange(0, T_PAD)
        mask = (ts < T)[:, None] & column_mask[None, :]
        total = tl.zeros([T_PAD, columns.shape[0]], tl.float32)
        for split in tl.static_range(SPLITS):
            offsets = (split * T + ts)[:, None] * D + columns[None, :]
            total += tl.load(partial + offsets, mask=mask, other=0, cache_modifier=".cg")
        return total


@triton.jit(do_not_specialize=["T"])
def down_kernel(
    h,
    union,
    down,
    bias,
    partial,
    counters,
    out,
    T,
    D: tl.constexpr,
    E: tl.constexpr,
    S: tl.constexpr,
    E_PAD: tl.constexpr,
    T_PAD: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SPLITS: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    """out [T, D] = h W_down over the active experts, which are dealt out evenly over SPLITS programs per tile.

    The program of a tile that arrives last adds up the partial sums, always in the same order.
    """
    if PDL:
        tl.extra.cuda.gdc_wait()
    tile = tl.program_id(0)
    split = tl.program_id(1)
    ids = tl.arange(0, E_PAD)
    needed = tl.load(union + ids, mask=ids < E, other=0)
    count = tl.sum(needed, 0)
    ranks = tl.where(needed > 0, tl.cumsum(needed, 0) - 1, -1)
    columns = tile * BLOCK_D + tl.arange(0, BLOCK_D)
    ts = tl.arange(0, T_PAD)
    mask = (ts < T)[:, None] & (columns < D)[None, :]
    offsets = ts[:, None] * D + columns[None, :]
    begin = split * count // SPLITS
    end = (split + 1) * count // SPLITS
    total = _accumulate(h, down, ranks, begin, end, columns, T, D, E, S, T_PAD, BLOCK_D, DOT_DTYPE, STAGES)
    last = True
    if SPLITS > 1:
        tl.store(partial + split * T * D + offsets, total, mask=mask)
        tl.debug_barrier()  # every thread's stores come before the one thread's release
        last = tl.atomic_add(counters + tile, 1, sem="acq_rel", scope="gpu") == SPLITS - 1
    if last:
        if SPLITS > 1:
            total = _sum_partials(partial, columns, T, D, T_PAD, SPLITS)
        if bias is not None:
            total += tl.load(bias + columns, mask=columns < D, other=0).to(tl.float32)[None, :]
        tl.store(out + offsets, total.to(out.dtype.element_ty), mask=mask)
