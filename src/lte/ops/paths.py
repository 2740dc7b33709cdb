"""Which way a sparse FFN is computed on a GPU: by a table of measured break-even points.

- decode: the kernel of few tokens, which reads the weights of the experts that any token needs (`lte.ops.decode`).
- masked: dense products of all experts, those that are off set to zero (`lte.ops.prefill`).
- grouped: gate and up for the tokens of each expert alone, and a dense down product; all are dense for experts that are
  always on (`lte.ops.prefill`).

The time of decode follows the union: the share of experts that at least one of T tokens needs. Of a trained model it is
known (`ExpectedUse`); otherwise tokens count as choosing independently, all experts alike: with an active fraction a it
is then 1 - (1 - a)^T. The time of grouped follows a itself.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from lte.config import check_fraction
from lte.ops.arguments import MAX_TOKENS

Path = Literal["decode", "masked", "grouped"]


@dataclass(frozen=True, kw_only=True)
class BreakEven:
    """Where the other paths are faster than masked; the limits hold for the row's range of tokens.

    Attributes:
        tokens: the last number of tokens of the range, which begins after the previous row's.
        decode: decode is faster up to this union, 1 for always, 0 for never.
        grouped: grouped is faster up to this active fraction, 0 for never; what is always on counts `CORE_COST`.
    """

    tokens: int
    decode: float = 0.0
    grouped: float = 0.0


class FfnKind(NamedTuple):
    """What the times of an FFN depend on, beyond tokens and routing.

    Attributes:
        arch: compute capability as one number, 90 for an H100 (`lte.ops.launch.architecture`).
        dtype_bytes: bytes of a weight: 1 for int8.
        gated: whether the FFN has a gate projection.
        weight_bytes: bytes of all its weights.
    """

    arch: int
    dtype_bytes: int
    gated: bool
    weight_bytes: int


# A share of the experts takes about 1.3 times as long in the grouped path as in a dense FFN, whose gate and up take two
# thirds of that (results/recorded_routing/h200_50.json, h200_80.json, 2,048 tokens). The core itself is not measured.
CORE_COST = 0.5

# Rows by tokens; beyond the last row its limits hold on. An architecture without rows takes those of the next older, an
# FFN those of the measured one of the nearest size. What was never measured is decode for one token (int8: for as many
# as it takes) and masked otherwise.
# `benchmarks/prefill.py` prints the rows of a machine.
Table = Mapping[FfnKind, tuple[BreakEven, ...]]
UNMEASURED = (BreakEven(tokens=1, decode=1.0), BreakEven(tokens=2**31))
# Masked expands int8 weights at every call: it reads one byte, writes two and reads two where decode reads one at most.
UNMEASURED_INT8 = (BreakEven(tokens=MAX_TOKENS, decode=1.0), BreakEven(tokens=2**31))
MEASURED: dict[FfnKind, tuple[BreakEven, ...]] = {
    # LLaMA2-7B's widths in bf16. One token on an H100: results/prefill_few_tokens_again.json. From 2 to 16 tokens on an
    # H200: results/recorded_routing/h200_50.json and h200_80.json, on a line through the two. On an H100, whose memory
    # is slower, decode is faster up to 0.86, 0.89, 0.86 and 0.75 (prefill_few_tokens.json); the lower limits are right
    # for both. Above 64 tokens on an H200: prefill.json.
    FfnKind(90, 2, True, 2 * 3 * 4096 * 11008): (
        BreakEven(tokens=1, decode=0.99),
        BreakEven(tokens=3, decode=0.77),
        BreakEven(tokens=4, decode=0.78),
        BreakEven(tokens=8, decode=0.69),
        BreakEven(tokens=16, decode=0.6),
        BreakEven(tokens=511),
        BreakEven(tokens=1023, grouped=0.37),
        BreakEven(tokens=2047, grouped=0.43),
        BreakEven(tokens=2**31, grouped=0.46),
    ),
    # Qwen2.5-1.5B's: results/prefill_qwen_1_5b.json on an H200.
    FfnKind(90, 2, True, 2 * 3 * 1536 * 8960): (
        BreakEven(tokens=1, decode=0.97),
        BreakEven(tokens=3, decode=0.68),
        BreakEven(tokens=4, decode=0.7),
        BreakEven(tokens=8, decode=0.65),
        BreakEven(tokens=16, decode=0.38),
        BreakEven(tokens=511),
        BreakEven(tokens=1023, grouped=0.28),
        BreakEven(tokens=2047, grouped=0.42),
        BreakEven(tokens=2**31, grouped=0.54),
    ),
    # SmolLM2-135M's: results/prefill_smollm2.json on an H100.
    FfnKind(90, 2, True, 2 * 3 * 576 * 1536): (
        BreakEven(tokens=1, decode=0.18),
        BreakEven(tokens=2, decode=0.04),
        BreakEven(tokens=2047),
        BreakEven(tokens=2**31, grouped=0.3),
    ),
}


def last_tokens(table: Table = MEASURED) -> set[int]:
    """Numbers of tokens after which the next number may take another path, beyond those that decode takes."""
    return {row.tokens for rows in table.values() for row in rows}


@dataclass(frozen=True)
class ExpectedUse:
    """What measurements let expect of the use of an FFN's experts.

    Attributes:
        active: share of the experts that a token needs.
        texts: by numbers of tokens, in order: the share that any of so many tokens needs, each of another text.
        row: the same of tokens in a row of one text, which choose more alike.
    """

    active: float
    texts: tuple[tuple[int, float], ...] = ()
    row: tuple[tuple[int, float], ...] = ()

    def union(self, tokens: int, in_a_row: bool = False) -> float:
        """The share of experts that any of T tokens needs: that of the next larger number that is known.

        Where there is none for tokens in a row it is that of different texts; and where there is none, that of tokens
        which choose independently, all experts alike.
        """
        known = (*(self.row if in_a_row else ()), *self.texts) if tokens > 1 else ()
        found = next((share for most, share in known if tokens <= most), None)
        return expected_union(tokens, self.active) if found is None else found


def expected_uses(measurement: Mapping[str, Any] | None, layers: int) -> list[ExpectedUse | None]:
    """What a model's measurement lets expect of each of its layers, `None` where it says nothing of them.

    Args:
        measurement: the field `lte_measurement` of its config, `lte.eval.models.measurement_summary`.
        layers: how many FFNs it has.
    """
    measurement = measurement or {}
    active, unions = measurement.get("active_fraction") or [], measurement.get("union_fraction") or {}
    if len(active) != layers:
        return [None] * layers

    def of(kind: str, layer: int) -> tuple[tuple[int, float], ...]:
        shares = unions.get(kind) or {}
        return tuple(sorted((int(tokens), each[layer]) for tokens, each in shares.items() if len(each) == layers))

    return [ExpectedUse(share, of("texts", layer), of("row", layer)) for layer, share in enumerate(active)]


def expected_union(tokens: int, active_fraction: float) -> float:
    """The share of experts that at least one of T tokens needs, if tokens choose independently."""
    return 1 - (1 - active_fraction) ** tokens


def break_even(ratios: Mapping[float, float], limit: float = 1.0) -> float:
    """The share up to which a path's time is at most `limit` times that of masked.

    Args:
        ratios: measured time over that of masked, by share of experts (union or active fraction).
        limit: of the ratio.

    Returns:
        The first crossing, between two measured shares by a straight line, rounded down to a percent; 0 if already
        the least share is above the limit, 1 if none is.
    """
    before: tuple[float, float] | None = None
    for share, ratio in sorted(ratios.items()):
        if ratio > limit:
            if before is None:
                return 0.0
            crossing = before[0] + (share - before[0]) * (limit - before[1]) / (ratio - before[1])
            return math.floor(100 * crossing) / 100
        before = share, ratio
    return 0.0 if before is None else 1.0 if before[0] > 0.99 else math.floor(100 * before[0]) / 100


def propose_rows(points: Iterable[BreakEven]) -> tuple[BreakEven, ...]:
    """Rows from limits measured at single numbers of tokens: between two of them the lower limits hold.

    Raises:
        ValueError: if there is no point.
    """
    ordered = sorted(points, key=lambda point: point.tokens)
    if not ordered:
        raise ValueError("points must hold at least one measurement, got none")
    rows: list[BreakEven] = []
    for point, before in zip(ordered, [None, *ordered], strict=False):
        if before is not None and point.tokens > before.tokens + 1:
            low = BreakEven(
                tokens=point.tokens - 1,
                decode=min(point.decode, before.decode),
                grouped=min(point.grouped, before.grouped),
            )
            rows.append(low)
        rows.append(point)
    return tuple(_merge(rows))


def _merge(rows: list[BreakEven]) -> list[BreakEven]:
    """Neighbouring rows of equal limits become one."""
    merged: list[BreakEven] = []
    for row in rows:
        if merged and (merged[-1].decode, merged[-1].grouped) == (row.decode, row.grouped):
            merged.pop()
        merged.append(row)
    return merged


def _find(kind: FfnKind, tokens: int, table: Table) -> tuple[BreakEven, FfnKind | None]:
    """The row for some tokens, and the kind that it was measured on."""
    nearest: FfnKind | None = None
    for known in table:
        fits = (known.dtype_bytes, known.gated) == (kind.dtype_bytes, kind.gated) and known.arch <= kind.arch
        if fits and (nearest is None or _distance(known, kind) < _distance(nearest, kind)):
            nearest = known
    unmeasured = UNMEASURED_INT8 if kind.dtype_bytes == 1 else UNMEASURED
    rows = unmeasured if nearest is None else table[nearest]
    return next((row for row in rows if tokens <= row.tokens), rows[-1]), nearest


def _distance(known: FfnKind, kind: FfnKind) -> tuple[int, float]:
    """How much older a GPU is, and the larger FFN's bytes over the smaller one's."""
    ratio = known.weight_bytes / kind.weight_bytes
    return kind.arch - known.arch, max(ratio, 1 / ratio)


def choose_path(
    kind: FfnKind,
    tokens: int,
    active_fraction: float | None = None,
    table: Table = MEASURED,
    *,
    union: float | None = None,
    core: float = 0.0,
) -> Path:
    """The fastest path by the table.

    Args:
        kind: of the FFN.
        tokens: T.
        active_fraction: expected share of experts that a token needs; `None` if unknown, which counts as all for
            more than one token, and is decode for one.
        table: break-even points.
        union: expected share of experts that any of the tokens needs; `None` for tokens that choose independently.
        core: share of experts that are always on, which the active fraction includes.

    Raises:
        ValueError: for tokens below 1 or an active fraction outside [0, 1].
    """
    if tokens < 1:
        raise ValueError(f"tokens must be at least 1, got tokens={tokens}")
    if active_fraction is None and tokens == 1:
        return "decode"
    fraction = 1.0 if active_fraction is None else active_fraction
    check_fraction("active_fraction", fraction, upper_closed=True)
    row, _ = _find(kind, tokens, table)
    if row.decode and (expected_union(tokens, fraction) if union is None else union) <= row.decode:
        return "decode"
    return "grouped" if row.grouped and fraction - (1 - CORE_COST) * core <= row.grouped else "masked"


_WORDS: dict[Path, str] = {
    "decode": "one kernel reads the experts that any token needs and no others",
    "masked": "all experts are computed by dense products, and those that are off are set to zero",
    "grouped": "gate and up are computed for the tokens of each expert alone; down is a dense product",
}


def explain_path(
    kind: FfnKind,
    tokens: int,
    active_fraction: float | None = None,
    table: Table = MEASURED,
    *,
    union: float | None = None,
    core: float = 0.0,
) -> str:
    """What `choose_path` takes for the same arguments and why, in words."""
    path = choose_path(kind, tokens, active_fraction, table, union=union, core=core)
    row, source = _find(kind, tokens, table)
    if active_fraction is None:
        expected = "The share of active experts is unknown" + (" and counts as 100%" if tokens > 1 else "")
    else:
        union = expected_union(tokens, active_fraction) if union is None else union
        expected = f"{active_fraction:.0%} of the experts active per token, {union:.0%} for any of {tokens}"
        if core:
            expected += f", {core:.0%} always on, which count {CORE_COST:g} for grouped"
    limits = [f"decode {_wins(row.decode, 'needed by any token')}", f"grouped {_wins(row.grouped, 'active per token')}"]
    where = "no measurement for this kind"
    if source is not None:
        where = f"measured on sm_{source.arch} with {_megabytes(source)}"
    gated = "gated" if kind.gated else "plain"
    what = f"sm_{kind.arch}, {kind.dtype_bytes} bytes per weight, {gated}, {_megabytes(kind)}"
    plural = "token" if tokens == 1 else "tokens"
    return f"{tokens} {plural} ({what}): {path}: {_WORDS[path]}. {expected}; {', '.join(limits)} ({where})."


def _megabytes(kind: FfnKind) -> str:
    return f"{kind.weight_bytes / 1e6:.3g} MB of weights"


def _wins(limit: float, what: str) -> str:
    if limit in (0, 1):
        return "always wins" if limit else "never wins"
    return f"wins up to {limit:.0%} of the experts {what}"
