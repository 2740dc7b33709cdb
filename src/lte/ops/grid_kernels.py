"""What the decode kernels share: a barrier over the whole grid, the routing, and the list of needed experts.

Shapes: T tokens padded to T_PAD (1, or 16 for tensor cores), D hidden size, E experts; P programs in the grid.
"""

# Triton's own forms: a constexpr is upper case, and None arguments are compiled away.
import triton
import triton.language as tl


@triton.jit
def grid_sync(counter, P: tl.constexpr):
    """Waits until all P programs are here, which must all run at once; what they stored before is seen afterwards.

    `counter` starts at zero; `grid_reset` makes it zero again.
    """
    tl.debug_barrier()  # every thread's stores come before the one thread's release
    tl.atomic_add(counter, 1, sem="release", scope="gpu")
    arrived = 0
    while arrived < P:
        # Each thread acquires for itself. An atomic in its place would slow down those that have yet to arrive.
        arrived = tl.inline_asm_elementwise(
            "ld.acquire.gpu.global.s32 $0, [$1];", "=r,l", [counter.to(tl.int64)], tl.int32, is_pure=False, pack=1
        )
    tl.debug_barrier()


@triton.jit
def grid_reset(workspace, P: tl.constexpr):
    """Zeroes the three counters at `workspace`; called by each program once it has passed both barriers."""
    if tl.atomic_add(workspace + 2, 1, sem="relaxed", scope="gpu") == P - 1:
        tl.store(workspace + tl.arange(0, 4), tl.zeros([4], tl.int32))


@triton.jit
def round_to_weight(products, router):
    """fp32 products rounded to the dtype of the router's weight, so that they are those of every other path."""
    return products.to(router.dtype.element_ty).to(tl.float32)


@triton.jit
def store_masks(masks, experts, on, products, bias, threshold, T, T_PAD: tl.constexpr):
    """Bit t of masks[e]: whether expert e is active for token t. products [experts, T_PAD], without bias."""
    if bias is not None:
        products += tl.load(bias + experts, mask=on, other=0).to(tl.float32)[:, None]
    ts = tl.arange(0, T_PAD)
    active = (products > threshold) & (ts < T)[None, :]
    tl.store(masks + experts, tl.sum(active.to(tl.int32) << ts[None, :], 1), mask=on)


@triton.jit
def route_given(logits, masks, threshold, T, E: tl.constexpr, T_PAD: tl.constexpr, P: tl.constexpr, R: tl.constexpr):
    """masks [E] from logits [T, E], R experts or fewer by each program."""
    experts = tl.program_id(0) + P * tl.arange(0, R)
    ts = tl.arange(0, T_PAD)
    on = experts < E
    mask = on[:, None] & (ts < T)[None, :]
    values = tl.load(logits + ts[None, :] * E + experts[:, None], mask=mask, other=0)
    store_masks(masks, experts, on, values, None, threshold, T, T_PAD)


@triton.jit
def route_one(
    x,
    router,
    bias,
    masks,
    threshold,
    D: tl.constexpr,
    E: tl.constexpr,
    P: tl.constexpr,
    R: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """masks [E] of one token, R experts or fewer by each program."""
    experts = tl.program_id(0) + P * tl.arange(0, R)
    on = experts < E
    ks = tl.arange(0, BLOCK_R)
    rows = experts.to(tl.int64)[:, None] * D
    total = tl.zeros([R, BLOCK_R], tl.float32)
    for k in tl.range(0, D, BLOCK_R):
        k_mask = k + ks < D
        w = tl.load(router + rows + (k + ks)[None, :], mask=on[:, None] & k_mask[None, :], other=0)
        values = tl.load(x + k + ks, mask=k_mask, other=0).to(tl.float32)
        total += w.to(tl.float32) * values[None, :]
    products = round_to_weight(tl.sum(total, 1)[:, None], router)
    store_masks(masks, experts, on, products, bias, threshold, 1, 1)


@triton.jit
def route_many(
    x,
    router,
    bias,
    masks,
    threshold,
    T,
    D: tl.constexpr,
    E: tl.constexpr,
    T_PAD: tl.constexpr,
    P: tl.constexpr,
    R: tl.constexpr,
    BLOCK_R: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
):
    """As `route_one` for more tokens, on tensor cores; R is at least 16."""
    experts = tl.program_id(0) + P * tl.arange(0, R)
    on = experts < E
    ks = tl.arange(0, BLOCK_R)
    ts = tl.arange(0, T_PAD)
    rows = experts.to(tl.int64)[:, None] * D
    products = tl.zeros([R, T_PAD], tl.float32)
    for k in tl.range(0, D, BLOCK_R):
        k_mask = k + ks < D
        w = tl.load(router + rows + (k + ks)[None, :], mask=on[:, None] & k_mask[None, :], other=0)
        mask_x = (ts < T)[None, :] & k_mask[:, None]
        values = tl.load(x + ts[None, :] * D + (k + ks)[:, None], mask=mask_x, other=0)
        products = tl.dot(w.to(DOT_DTYPE), values.to(DOT_DTYPE), products, input_precision="ieee")
    store_masks(masks, experts, on, round_to_weight(products, router), bias, threshold, T, T_PAD)


@triton.jit
def list_needed(masks, order, E: tl.constexpr, E_PAD: tl.constexpr):
    """Writes the experts that any token needs to `order` [E], in their order; returns how many.

    Every program writes the same list, so that it reads what it wrote itself and no second barrier is needed.
    """
    ids = tl.arange(0, E_PAD)
    needed = (tl.load(masks + ids, mask=ids < E, other=0, cache_modifier=".cg") != 0).to(tl.int32)
    tl.store(order + tl.cumsum(needed, 0) - 1, ids, mask=needed != 0)
    tl.debug_barrier()
    return tl.sum(needed, 0)
