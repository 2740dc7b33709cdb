"""What the decode kernels share: a barrier over the whole grid, the routing, and finding the needed experts.

The programs hand the routing to each other as one 64-bit number per expert: which tokens it is active for, in the
lowest 16 bits, under a tag that no launch before had.

Shapes: T tokens padded to T_PAD (1, or 16 for tensor cores), D hidden size, E experts; P programs in the grid.
"""

# Triton's own forms: a constexpr is upper case, and None arguments are compiled away.
import triton
import triton.language as tl


def _wait_for_tags(count: int) -> tl.constexpr:
    """Assembly that reads numbers until each has its tag in the upper 48 bits.

    Operands are `count` numbers, then as many addresses, then as many tags. All are asked for at once: one after the
    other they would take a way to the L2 cache and back each.
    """
    reads = "\n".join(f"    ld.relaxed.gpu.global.b64 ${i}, [${count + i}];" for i in range(count))
    checks = "\n".join(
        f"    shr.u64 %tag0, ${i}, 16;\n    setp.ne{'.or' * (i > 0)}.u64 %waiting0, %tag0, ${2 * count + i}"
        f"{', %waiting0' * (i > 0)};"
        for i in range(count)
    )
    return tl.constexpr(f"""
{{
    .reg .pred %waiting<1>;
    .reg .b64 %tag<1>;
    again:
{reads}
{checks}
    @%waiting0 bra again;
}}
""")


def _operands(count: int) -> tl.constexpr:
    return tl.constexpr(",".join(["=&l"] * count + ["l"] * 2 * count))


_WAIT_1, _WAIT_2, _WAIT_4, _WAIT_8 = (_wait_for_tags(count) for count in (1, 2, 4, 8))
_OPERANDS_1, _OPERANDS_2, _OPERANDS_4, _OPERANDS_8 = (_operands(count) for count in (1, 2, 4, 8))

# The first thread waits until the number at $1 is $2 or more.
_WAIT_FOR_ALL = tl.constexpr("""
{
    .reg .pred %waiting<1>;
    .reg .b32 %seen<1>;
    mov.u32 %seen0, %tid.x;
    setp.ne.u32 %waiting0, %seen0, 0;
    @%waiting0 bra done;
    again:
    ld.acquire.gpu.global.s32 %seen0, [$1];
    setp.lt.s32 %waiting0, %seen0, $2;
    @%waiting0 bra again;
    done:
    mov.b32 $0, 0;
}
""")

# Asks for the line of memory at $1 in the L2 cache; $0 is nothing.
_PREFETCH = tl.constexpr("prefetch.global.L2 [$1]; mov.b32 $0, 0;")


@triton.jit
def prefetch(addresses):
    """Asks for the lines of memory at `addresses` in the L2 cache, without waiting for them."""
    tl.inline_asm_elementwise(_PREFETCH, "=r,l", [addresses.to(tl.int64)], tl.int32, is_pure=False, pack=1)


@triton.jit
def await_inputs(router, D: tl.constexpr, E: tl.constexpr, P: tl.constexpr, R: tl.constexpr):
    """Waits for the kernel before this one, which still runs where this is a programmatic dependent launch.

    Meanwhile the rows of the router that this program needs are fetched into the L2 cache: what the kernel before
    writes is seen there all the same. From then on the kernel after this one may begin as programs of this one end.
    """
    if router is not None:
        LINE: tl.constexpr = 1024 // router.dtype.element_ty.primitive_bitwidth
        lines = tl.arange(0, triton.next_power_of_2((D + LINE - 1) // LINE))
        experts = tl.minimum(tl.program_id(0) + P * tl.arange(0, R), E - 1)
        columns = tl.minimum(lines * LINE, D - 1)
        prefetch(router + experts.to(tl.int64)[:, None] * D + columns[None, :])
    tl.extra.cuda.gdc_wait()
    tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def grid_arrive(counters):
    """Says that this program is here; what it stored before is seen by those that `grid_wait` lets go on.

    counters[0] starts at zero; `grid_finish` makes it zero again.
    """
    tl.debug_barrier()  # every thread's stores come before the one thread's release
    tl.atomic_add(counters, 1, sem="release", scope="gpu")


@triton.jit
def grid_wait(counters, P: tl.constexpr):
    """Waits until all P programs have come to `grid_arrive`; all must run at once."""
    # One thread reads for its program: more of them would be in the way of those that have yet to arrive.
    tl.inline_asm_elementwise(_WAIT_FOR_ALL, "=r,l,r", [counters.to(tl.int64), P], tl.int32, is_pure=False, pack=1)
    tl.debug_barrier()


@triton.jit
def grid_sync(counters, P: tl.constexpr):
    """Waits until all P programs are here, which must all run at once; what they stored before is seen afterwards."""
    grid_arrive(counters)
    grid_wait(counters, P)


@triton.jit
def grid_finish(counters, P: tl.constexpr):
    """Zeroes the barrier's counter and gives the next launch another tag, once every program is past the barrier."""
    if tl.atomic_add(counters + 1, 1, sem="relaxed", scope="gpu") == P - 1:
        tl.store(counters, 0)
        tl.store(counters + 1, 0)
        tl.store(counters + 2, tl.load(counters + 2) + 1)


@triton.jit
def rounded(values, ROUTER_AS: tl.constexpr):
    """The router's weights, or its products, in fp32 rounded to the dtype in which they count on every other path."""
    return values.to(ROUTER_AS).to(tl.float32)


@triton.jit
def load_bias(bias, experts, on):
    """bias [experts], to be asked for before the products, which take as long; zeros for `None`."""
    values = experts * 0.0
    if bias is not None:
        values = tl.load(bias + experts, mask=on, other=0).to(tl.float32)
    return values


@triton.jit
def store_masks(masks, tag, experts, on, products, biases, threshold, T, T_PAD: tl.constexpr):
    """Bit t of masks[e]: whether expert e is active for token t; the tag above. products [experts, T_PAD]."""
    ts = tl.arange(0, T_PAD)
    active = (products + biases[:, None] > threshold) & (ts < T)[None, :]
    bits = tl.sum(active.to(tl.int32) << ts[None, :], 1)
    tl.store(masks + experts, (tag.to(tl.int64) << 16) | bits, mask=on)


@triton.jit
def route_given(
    logits, masks, tag, threshold, T, E: tl.constexpr, T_PAD: tl.constexpr, P: tl.constexpr, R: tl.constexpr
):
    """masks [E] from logits [T, E], R experts or fewer by each program."""
    experts = tl.program_id(0) + P * tl.arange(0, R)
    ts = tl.arange(0, T_PAD)
    on = experts < E
    mask = on[:, None] & (ts < T)[None, :]
    values = tl.load(logits + ts[None, :] * E + experts[:, None], mask=mask, other=0)
    store_masks(masks, tag, experts, on, values, load_bias(None, experts, on), threshold, T, T_PAD)


@triton.jit
def route_one(
    x,
    router,
    bias,
    masks,
    tag,
    threshold,
    D: tl.constexpr,
    E: tl.constexpr,
    P: tl.constexpr,
    R: tl.constexpr,
    BLOCK_R: tl.constexpr,
    ROUTER_AS: tl.constexpr,
):
    """masks [E] of one token, R experts or fewer by each program."""
    experts = tl.program_id(0) + P * tl.arange(0, R)
    on = experts < E
    ks = tl.arange(0, BLOCK_R)
    rows = experts.to(tl.int64)[:, None] * D
    biases = load_bias(bias, experts, on)
    total = tl.zeros([R, BLOCK_R], tl.float32)
    for k in tl.range(0, D, BLOCK_R):
        k_mask = k + ks < D
        w = tl.load(router + rows + (k + ks)[None, :], mask=on[:, None] & k_mask[None, :], other=0)
        values = tl.load(x + k + ks, mask=k_mask, other=0).to(tl.float32)
        total += rounded(w, ROUTER_AS) * values[None, :]
    products = rounded(tl.sum(total, 1)[:, None], ROUTER_AS)
    store_masks(masks, tag, experts, on, products, biases, threshold, 1, 1)


@triton.jit
def route_few(
    x,
    router,
    bias,
    masks,
    tag,
    threshold,
    T,
    D: tl.constexpr,
    E: tl.constexpr,
    T_ROUTE: tl.constexpr,
    P: tl.constexpr,
    R: tl.constexpr,
    BLOCK_R: tl.constexpr,
    ROUTER_AS: tl.constexpr,
):
    """As `route_one` for T tokens, padded to T_ROUTE.

    Without tensor cores: a program has so few experts that the sum over D would be one long chain of dependent
    products, which takes longer than these do for up to 8 tokens.
    """
    experts = tl.program_id(0) + P * tl.arange(0, R)
    on = experts < E
    ks = tl.arange(0, BLOCK_R)
    ts = tl.arange(0, T_ROUTE)
    rows = experts.to(tl.int64)[:, None] * D
    biases = load_bias(bias, experts, on)
    total = tl.zeros([R, T_ROUTE, BLOCK_R], tl.float32)
    for k in tl.range(0, D, BLOCK_R, num_stages=4):
        k_mask = k + ks < D
        w = tl.load(router + rows + (k + ks)[None, :], mask=on[:, None] & k_mask[None, :], other=0)
        mask_x = (ts < T)[:, None] & k_mask[None, :]
        values = tl.load(x + ts[:, None] * D + (k + ks)[None, :], mask=mask_x, other=0)
        total += rounded(w, ROUTER_AS)[:, None, :] * values.to(tl.float32)[None, :, :]
    products = rounded(tl.sum(total, 2), ROUTER_AS)
    store_masks(masks, tag, experts, on, products, biases, threshold, T, T_ROUTE)


@triton.jit
def route_many(
    x,
    router,
    bias,
    masks,
    tag,
    threshold,
    T,
    D: tl.constexpr,
    E: tl.constexpr,
    T_PAD: tl.constexpr,
    P: tl.constexpr,
    R: tl.constexpr,
    BLOCK_R: tl.constexpr,
    ROUTER_AS: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
):
    """As `route_one` for more tokens, on tensor cores; R is at least 16."""
    experts = tl.program_id(0) + P * tl.arange(0, R)
    on = experts < E
    ks = tl.arange(0, BLOCK_R)
    ts = tl.arange(0, T_PAD)
    rows = experts.to(tl.int64)[:, None] * D
    biases = load_bias(bias, experts, on)
    products = tl.zeros([R, T_PAD], tl.float32)
    for k in tl.range(0, D, BLOCK_R, num_stages=4):
        k_mask = k + ks < D
        w = tl.load(router + rows + (k + ks)[None, :], mask=on[:, None] & k_mask[None, :], other=0)
        mask_x = (ts < T)[None, :] & k_mask[:, None]
        values = tl.load(x + ts[None, :] * D + (k + ks)[:, None], mask=mask_x, other=0)
        products = tl.dot(w.to(ROUTER_AS).to(DOT_DTYPE), values.to(DOT_DTYPE), products, input_precision="ieee")
    store_masks(masks, tag, experts, on, rounded(products, ROUTER_AS), biases, threshold, T, T_PAD)


@triton.jit
def wait_for_masks(masks, tag, E: tl.constexpr, E_PAD: tl.constexpr, AT_ONCE: tl.constexpr, WAIT: tl.constexpr):
    """masks [E_PAD] once every program has stored its own, zero beyond E; a thread reads AT_ONCE of them at a time.

    Mask and tag are one number, so that the wait needs no barrier: what carries the tag is this launch's mask.
    """
    ids = tl.arange(0, E_PAD)
    source = masks + tl.minimum(ids, E - 1)
    if WAIT:
        arguments = [source.to(tl.int64), tag.to(tl.int64)]
        if AT_ONCE == 1:
            words = tl.inline_asm_elementwise(_WAIT_1, _OPERANDS_1, arguments, tl.int64, is_pure=False, pack=1)
        elif AT_ONCE == 2:
            words = tl.inline_asm_elementwise(_WAIT_2, _OPERANDS_2, arguments, tl.int64, is_pure=False, pack=2)
        elif AT_ONCE == 4:
            words = tl.inline_asm_elementwise(_WAIT_4, _OPERANDS_4, arguments, tl.int64, is_pure=False, pack=4)
        else:
            words = tl.inline_asm_elementwise(_WAIT_8, _OPERANDS_8, arguments, tl.int64, is_pure=False, pack=8)
    else:
        words = tl.load(source)
    return tl.where(ids < E, (words & 0xFFFF).to(tl.int32), 0)


@triton.jit
def experts_of_ranks(masks, first, N: tl.constexpr):
    """The needed experts of the ranks first..first + N among all needed: [N]; masks [E_PAD] of `wait_for_masks`."""
    up_to = tl.cumsum((masks != 0).to(tl.int32), 0)
    ranks = first + tl.arange(0, N)
    return tl.sum((up_to[None, :] <= ranks[:, None]).to(tl.int32), 1)


@triton.jit
def pick(values, index):
    """values[index] of a small tensor."""
    return tl.sum(tl.where(tl.arange(0, values.shape[0]) == index, values, 0), 0)
