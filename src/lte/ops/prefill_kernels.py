"""Triton kernels of the sparse FFN for many tokens, where time is FLOPs and the traffic of activations.

`skinny_product_kernel`: a dense product of few tokens, whose time is still the bytes of the weight.

`masked_activation_kernel`: the intermediate activations from dense products, zero where an expert is off.

`list_tokens_kernel`, `grouped_kernel`: the intermediate activations of the active experts alone. The first writes for
every expert the list of its tokens; the second computes tiles of one expert and BLOCK_T of its tokens.

Shapes: T tokens, D hidden size, F = E S neurons, E experts of S neurons, P programs.
"""

# Triton's own forms: a constexpr is upper case, and None arguments are compiled away.
import triton
import triton.language as tl

from lte.ops.activation_kernel import activate


@triton.jit
def _active(logits, bias, threshold, tokens, experts, T, E: tl.constexpr, STRIDE: tl.constexpr):
    """Boolean [tokens, experts] from logits [T, E], or from products [T, E] and a bias [E]; False outside."""
    inside = (tokens < T)[:, None] & (experts < E)[None, :]
    values = tl.load(logits + tokens.to(tl.int64)[:, None] * STRIDE + experts[None, :], mask=inside, other=0)
    values = values.to(tl.float32)
    if bias is not None:
        values += tl.load(bias + experts, mask=experts < E, other=0).to(tl.float32)[None, :]
    return (values > threshold) & inside


@triton.jit
def _load_bias(values, bias, neurons, mask):
    """values plus bias at neurons, which has one dimension less than values."""
    if bias is not None:
        values += tl.load(bias + neurons, mask=mask, other=0).to(tl.float32)[None]
    return values


@triton.jit(do_not_specialize=["T"])
def skinny_product_kernel(
    x,
    weight,
    out,
    T,
    N: tl.constexpr,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    X_FIRST: tl.constexpr,
    STAGES: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
):
    """out [T, N] = x [T, K] times the transpose of weight [N, K], for T <= BLOCK_T.

    A program takes ROWS <= BLOCK_N rows of the weight and all of K, so that every weight is read once and every sum has
    one order. The weight is the first factor of the tensor cores unless X_FIRST: asynchronous warp-group products have
    64 rows at least, which a weight has at any number of tokens.
    """
    local = tl.arange(0, BLOCK_N)
    rows = tl.program_id(0) * ROWS + local
    tokens = tl.arange(0, BLOCK_T)
    ks = tl.arange(0, BLOCK_K)
    n_on = (rows < N) & (local < ROWS)
    t_on = tokens < T
    w_rows = weight + rows.to(tl.int64)[:, None] * K
    x_rows = x + tokens[:, None] * K
    total = tl.zeros([BLOCK_T, BLOCK_N] if X_FIRST else [BLOCK_N, BLOCK_T], tl.float32)
    for k in tl.range(0, K, BLOCK_K, num_stages=STAGES):
        # Whole blocks of K need no mask along K, the usual case.
        k_on = (k + ks < K) if K % BLOCK_K != 0 else (ks < BLOCK_K)
        w = tl.load(w_rows + (k + ks)[None, :], mask=n_on[:, None] & k_on[None, :], other=0).to(DOT_DTYPE)
        values = tl.load(x_rows + (k + ks)[None, :], mask=t_on[:, None] & k_on[None, :], other=0).to(DOT_DTYPE)
        if X_FIRST:
            total = tl.dot(values, w.T, total, input_precision="ieee")
        else:
            total = tl.dot(w, values.T, total, input_precision="ieee")
    sums = total if X_FIRST else total.T
    places = tokens.to(tl.int64)[:, None] * N + rows[None, :]
    tl.store(out + places, sums.to(out.dtype.element_ty), mask=t_on[:, None] & n_on[None, :])


@triton.jit(do_not_specialize=["T"])
def masked_activation_kernel(
    gate,
    up,
    gate_bias,
    up_bias,
    logits,
    router_bias,
    h,
    threshold,
    T,
    E: tl.constexpr,
    S: tl.constexpr,
    STRIDE: tl.constexpr,
    LOGIT_STRIDE: tl.constexpr,
    H_STRIDE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
    ACTIVATION: tl.constexpr,
    SKIP: tl.constexpr,
):
    """h [T, F] = act(gate + b) * (up + b) where active, else 0; gate and up have row stride STRIDE, h has H_STRIDE.

    A program takes BLOCK_T tokens and BLOCK_E experts: BLOCK_E S neurons are contiguous in every tensor, and one logit
    decides on S of them. With SKIP the products of inactive experts are not read, but the reads of the others wait for
    the logits.
    """
    COLUMNS: tl.constexpr = (E + BLOCK_E - 1) // BLOCK_E
    tokens = tl.program_id(0) // COLUMNS * BLOCK_T + tl.arange(0, BLOCK_T)
    experts = tl.program_id(0) % COLUMNS * BLOCK_E + tl.arange(0, BLOCK_E)
    active = _active(logits, router_bias, threshold, tokens, experts, T, E, LOGIT_STRIDE)[:, :, None]
    neurons = experts[:, None] * S + tl.arange(0, S)[None, :]
    inside = (tokens < T)[:, None, None] & (neurons < E * S)[None]
    rows = tokens.to(tl.int64)[:, None, None]
    wanted = inside & active if SKIP else inside
    value = tl.load(up + (rows * STRIDE + neurons[None]), mask=wanted, other=0).to(tl.float32)
    value = _load_bias(value, up_bias, neurons, neurons < E * S)
    if gate is None:
        value = activate(value, ACTIVATION)
    else:
        factor = tl.load(gate + (rows * STRIDE + neurons[None]), mask=wanted, other=0).to(tl.float32)
        value *= activate(_load_bias(factor, gate_bias, neurons, neurons < E * S), ACTIVATION)
    # Not a product: what an inactive expert would compute must not matter, even if it is not finite.
    value = tl.where(active, value, 0.0)
    tl.store(h + (rows * H_STRIDE + neurons[None]), value.to(h.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["T"])
def list_tokens_kernel(
    logits,
    router_bias,
    counts,
    lists,
    threshold,
    T,
    E: tl.constexpr,
    FIRST: tl.constexpr,
    LOGIT_STRIDE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """lists [E, T]: the tokens of each expert from FIRST on, counts [E] of them; counts is zero before.

    Programs append in the order in which they come: it may differ from run to run. No result depends on it, as every
    token is a row of its own in `grouped_kernel`.
    """
    COLUMNS: tl.constexpr = (E - FIRST + BLOCK_E - 1) // BLOCK_E
    tokens = tl.program_id(0) // COLUMNS * BLOCK_T + tl.arange(0, BLOCK_T)
    experts = FIRST + tl.program_id(0) % COLUMNS * BLOCK_E + tl.arange(0, BLOCK_E)
    active = _active(logits, router_bias, threshold, tokens, experts, T, E, LOGIT_STRIDE)
    ones = active.to(tl.int32)
    begin = tl.atomic_add(counts + experts, tl.sum(ones, 0), mask=experts < E, sem="relaxed")
    slots = begin[None, :] + tl.cumsum(ones, 0) - 1
    tl.store(lists + experts.to(tl.int64)[None, :] * T + slots, tokens[:, None] + 0 * slots, mask=active)


@triton.jit
def _products(
    x, w_rows, tokens, t_on, n_on, D: tl.constexpr, BLOCK_T: tl.constexpr, N: tl.constexpr,
    BLOCK_K: tl.constexpr, STAGES: tl.constexpr, DOT_DTYPE: tl.constexpr,
):  # fmt: skip
    """fp32 [BLOCK_T, N]: rows `tokens` of x times the weight rows at the pointers w_rows [N]."""
    ks = tl.arange(0, BLOCK_K)
    x_rows = x + tokens.to(tl.int64) * D
    total = tl.zeros([BLOCK_T, N], tl.float32)
    for k in tl.range(0, D, BLOCK_K, num_stages=STAGES):
        # Whole blocks of K need no mask along D, the usual case.
        k_on = (k + ks < D) if D % BLOCK_K != 0 else (ks < BLOCK_K)
        values = tl.load(x_rows[:, None] + (k + ks)[None, :], mask=t_on[:, None] & k_on[None, :], other=0)
        w = tl.load(w_rows[:, None] + (k + ks)[None, :], mask=n_on[:, None] & k_on[None, :], other=0)
        total = tl.dot(values.to(DOT_DTYPE), w.to(DOT_DTYPE).T, total, input_precision="ieee")
    return total


@triton.jit(do_not_specialize=["T"])
def grouped_kernel(
    x,
    gate,
    up,
    gate_bias,
    up_bias,
    counts,
    lists,
    h,
    T,
    D: tl.constexpr,
    E: tl.constexpr,
    S: tl.constexpr,
    P: tl.constexpr,
    E_PAD: tl.constexpr,
    N: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ACTIVATION: tl.constexpr,
    STAGES: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
):
    """h [T, F] of the pairs of token and expert in `lists`; the rest of h stays as it is.

    P programs share the tiles, as many as the lists need: BLOCK_T tokens of one expert each, its gate and up rows
    interleaved into N = 2 S columns (N = S without a gate, at least 16), so that a gate and an up value of one neuron
    lie in neighbouring registers of one thread.
    """
    SIDES: tl.constexpr = 1 if gate is None else 2
    ids = tl.arange(0, E_PAD)
    tiles = tl.cdiv(tl.load(counts + ids, mask=ids < E, other=0), BLOCK_T)
    ends = tl.cumsum(tiles, 0)
    total = tl.sum(tiles, 0)
    columns = tl.arange(0, N)
    n_on = columns < SIDES * S
    local = tl.arange(0, N // SIDES)
    for tile in tl.range(tl.program_id(0), total, P):
        expert = tl.sum((ends <= tile).to(tl.int32), 0)
        first = tl.sum(tl.where(ids == expert, ends - tiles, 0), 0)
        slots = (tile - first) * BLOCK_T + tl.arange(0, BLOCK_T)
        t_on = slots < tl.load(counts + expert)
        tokens = tl.load(lists + expert.to(tl.int64) * T + slots, mask=t_on, other=0)
        offsets = (expert * S + columns // SIDES).to(tl.int64) * D
        w_rows = up + offsets if gate is None else tl.where(columns % 2 == 0, gate + offsets, up + offsets)
        products = _products(x, w_rows, tokens, t_on, n_on, D, BLOCK_T, N, BLOCK_K, STAGES, DOT_DTYPE)
        neurons = expert * S + local
        mask = local < S
        if gate is None:
            value = activate(_load_bias(products, up_bias, neurons, mask), ACTIVATION)
        else:
            factor, value = tl.split(tl.reshape(products, [BLOCK_T, N // 2, 2]))
            value = _load_bias(value, up_bias, neurons, mask)
            value *= activate(_load_bias(factor, gate_bias, neurons, mask), ACTIVATION)
        places = tokens.to(tl.int64)[:, None] * (E * S) + neurons[None, :]
        tl.store(h + places, value.to(h.dtype.element_ty), mask=t_on[:, None] & mask[None, :])
