"""Triton kernels of prompt lookup: what to propose, and what stays of it, one launch each.

Each is one program, since the time of a text of usual length is that of the launches: plain PyTorch takes about sixty.

Shapes: K tokens proposed at most, R rows for K + 1 of them, GRAM tokens of the longest match. A text lies behind GRAM
places that hold no tokens, so that the token of place p is `text[p + GRAM]`; `state` is how many of its tokens are
known and whether it has ended.

`trust` says for matches of 1, 2, 3 and COPIED or more tokens how often what followed was what the model wrote next, as
a share of SURE where later matches count more; then which of these the last match was (-1 for none) and the token that
followed. All matches count, proposed or not.
"""

# Triton's own forms: a constexpr is upper case.
import triton
import triton.language as tl

# Above the place of any token: 2 matched tokens weigh more than 1 anywhere.
FAR = tl.constexpr(2**40)
# Tokens of a match that mostly comes from text that is being copied, and goes on as that does.
COPIED = tl.constexpr(4)
SURE = tl.constexpr(4096)
# Three in ten: a pass over two tokens takes 1.22 to 1.27 times as long as one over one (results/speculation).
TRUSTED = tl.constexpr(1229)


@triton.jit
def propose_kernel(
    text,
    state,
    first,
    tokens,
    positions,
    starts,
    offered,
    trust,
    GRAM: tl.constexpr,
    K: tl.constexpr,
    R: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """What followed the last tokens where they stood before, in the longest match of up to GRAM tokens.

    Of several, the first if it has at least COPIED tokens, otherwise the last. A match of 1, 2, 3, COPIED tokens gives
    1, 1, 3, K of them, and K at most: the longer it is, the more of them stay, and passes of 2, 4 and 8 tokens have
    kernels. It gives none while less than TRUSTED of such matches were right.
    Writes `offered`, how many these are, and tokens, positions and starts [K + 1] of a pass over the last known token
    and them; what is beyond them begins after its position; and of `trust` what the match was. `first` is where the
    text begins.
    """
    last = tl.load(state) - 1
    bests = tl.zeros([BLOCK], tl.int64)
    for begin in tl.range(0, last, BLOCK):
        places = begin + tl.arange(0, BLOCK).to(tl.int64)
        alike = places < last
        matched = tl.zeros([BLOCK], tl.int64)
        for back in tl.static_range(GRAM):
            token = tl.load(text + last + GRAM - back)
            alike &= tl.load(text + places + GRAM - back, mask=places < last, other=-2) == token
            matched += alike.to(tl.int64)
        ordered = tl.where(matched >= COPIED, FAR - 1 - places, places)
        bests = tl.maximum(bests, tl.where(matched > 0, matched * FAR + ordered, 0))
    best = tl.max(bests, 0)
    length, ordered = best // FAR, best % FAR
    place = tl.where(length >= COPIED, FAR - 1 - ordered, ordered)
    kind = tl.minimum(length, COPIED) - 1
    wanted = tl.where(length >= COPIED, K, tl.where(length == 3, 3, 1))
    trusted = tl.load(trust + kind, mask=best > 0, other=0) >= TRUSTED
    count = tl.where(trusted, tl.minimum(tl.minimum(last - place, wanted), K), 0)
    tl.store(trust + COPIED, kind)
    tl.store(trust + COPIED + 1, tl.load(text + GRAM + place + 1, mask=best > 0, other=-1))
    rows = tl.arange(0, R).to(tl.int64)
    found = tl.load(text + GRAM + tl.where(rows == 0, last, place + rows), mask=rows <= count, other=0)
    tl.store(tokens + rows, found, mask=rows <= K)
    tl.store(positions + rows, last + rows, mask=rows <= K)
    tl.store(starts + rows, tl.where(rows <= count, tl.load(first), last + rows + 1), mask=rows <= K)
    tl.store(offered, count)


@triton.jit(do_not_specialize=["longest", "num_ends"])
def keep_kernel(
    chosen,
    tokens,
    offered,
    text,
    state,
    ends,
    message,
    trust,
    longest,
    num_ends,
    GRAM: tl.constexpr,
    K: tl.constexpr,
    R: tl.constexpr,
):
    """Keeps what the model chose [K + 1] after the last token and each proposed one, up to its first other choice.

    Or up to a token of `ends`, or to a text of `longest` tokens; nothing after the text's end. Writes the text, its
    state and `message` [K + 3]: the chosen tokens, how many stay, and whether the text has ended. And notes in `trust`
    whether the last match was right.
    """
    kind = tl.load(trust + COPIED)
    right = tl.load(chosen) == tl.load(trust + COPIED + 1)
    before = tl.load(trust + kind, mask=kind >= 0, other=0)
    tl.store(trust + kind, (7 * before + tl.where(right, SURE, 0)) // 8, mask=kind >= 0)
    rows = tl.arange(0, R)
    choices = tl.load(chosen + rows, mask=rows <= K, other=-1)
    following = tl.load(tokens + rows + 1, mask=rows < K, other=-1)
    count, known, over = tl.load(offered), tl.load(state), tl.load(state + 1)
    right = (choices == following) & (rows < count)
    kept = tl.min(tl.where(right, R, rows), 0).to(tl.int64) + 1
    ending = rows < 0
    for index in tl.range(0, num_ends):
        ending |= choices == tl.load(ends + index)
    end = tl.min(tl.where(ending & (rows <= K), rows, R), 0).to(tl.int64)
    ended = (over > 0) | (end < kept)
    kept = tl.minimum(tl.minimum(kept, end + 1), longest - known)
    kept = tl.where(over > 0, 0, kept)
    tl.store(text + known + GRAM + rows, choices, mask=rows < kept)
    ended |= known + kept >= longest
    tl.store(state, known + kept)
    tl.store(state + 1, ended.to(tl.int64))
    tl.store(message + rows, choices, mask=rows <= K)
    tl.store(message + K + 1, kept)
    tl.store(message + K + 2, ended.to(tl.int64))
