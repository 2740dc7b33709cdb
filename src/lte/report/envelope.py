"""Where LTE is on the upper envelope of all methods, quality against bytes saved, and where it is not."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from lte.report.points import OURS, Point, Tradeoff, interpolate


@dataclass(frozen=True)
class Standing:
    """How a point of LTE stands against the best other method that reads at most as many bytes.

    Attributes:
        saving: share of the dense reference's bytes that the point saves.
        ffn_saving: the same bytes as a share of those of the dense FFNs, so that routers count against it; `None` where
            the records do not tell these, and of rounded weights, which save bytes of attention, too.
        rival: name of the other curve, `None` if no other method was measured with that few bytes.
        rival_value: its metric there.
        behind: how much better the rival is, in the metric's unit; negative where LTE is better.
        sd: standard deviation of that difference, from both spreads over seeds; 0 for single seeds.
    """

    point: Point
    saving: float
    ffn_saving: float | None
    sd: float
    rival: str | None = None
    rival_value: float | None = None
    behind: float | None = None

    @property
    def on_envelope(self) -> bool:
        """Whether no other method is better by more than one standard deviation."""
        return self.behind is None or self.behind <= self.sd


def lte_standings(tradeoff: Tradeoff) -> list[Standing]:
    """Each measured point of LTE against the best other method at the same bytes per token, or fewer.

    The others are the methods that are not LTE, dense models among them: measured points with at most as many bytes,
    and values interpolated between neighbouring points. Nothing is extrapolated.

    Returns:
        By curve and rising saving; empty without a dense reference or LTE points with known bytes.
    """
    found: list[Standing] = []
    others = [[point for point in points if point.method != OURS] for points in tradeoff.curves.values()]
    rivals = [*others, *([point] for point in tradeoff.dense)]
    ffn_share = dense_ffn_share(tradeoff)
    for points in tradeoff.curves.values():
        standings = [_standing(tradeoff, point, rivals, ffn_share) for point in points if point.method == OURS]
        found += sorted((each for each in standings if each is not None), key=lambda each: each.saving)
    return found


def dense_ffn_share(tradeoff: Tradeoff) -> float | None:
    """Share of the FFNs in the dense reference's bytes; `None` where no record of LTE tells it.

    Records count 2 FLOPs and 2 bytes per weight, and 4 bytes per weight of a router, so LTE reads 2 FLOPs - bytes
    without its routers. What it reads less than the dense model is its sparsity's share of the FFNs, all layers being
    as wide as each other.
    """
    dense = None if tradeoff.reference is None else tradeoff.reference.mean("megabytes")
    ours = [point for point in tradeoff.points() if point.method == OURS and not point.is_rounded]
    records = [record for point in ours for record in point.records]
    known = [
        (each.sparsity, each.flops_per_token, each.bytes_per_token)
        for each in records
        if each.sparsity and each.flops_per_token and each.bytes_per_token
    ]
    if not dense or not known:
        return None
    sparsity, flops, weights = max(known, key=lambda each: each[0])
    share = (1 - (2 * flops - weights) / (dense * 1e6)) / sparsity
    return share if 0 < share <= 1 else None


def _standing(
    tradeoff: Tradeoff, point: Point, rivals: Sequence[Sequence[Point]], ffn_share: float | None
) -> Standing | None:
    share, megabytes = tradeoff.share(point, "megabytes"), point.mean("megabytes")
    if share is None or megabytes is None:
        return None
    own, saving = point.value, 1 - share
    ffn_saving = None if ffn_share is None or point.is_rounded else saving / ffn_share
    alone = Standing(point, saving, ffn_saving, own.spread)
    standings = []
    for rival, value in (pair for points in rivals for pair in at_most(points, megabytes)):
        behind, sd = tradeoff.metric.drop(own.mean, value), math.hypot(own.spread, rival.value.spread)
        standings.append(Standing(point, saving, ffn_saving, sd, rival.curve, value, behind))
    # A rival that is clearly better comes before one that is better on average, but not clearly so.
    return max(standings, key=lambda standing: (not standing.on_envelope, standing.behind), default=alone)


def at_most(points: Sequence[Point], megabytes: float) -> list[tuple[Point, float]]:
    """A curve's measured points with at most so many bytes, and the curve at exactly so many.

    Returns:
        The point whose spread and seeds count, between two points the nearer one, and the value.
    """
    known = [(point.megabytes.mean, point) for point in points if point.megabytes is not None]
    found = [(point, point.value.mean) for size, point in known if size <= megabytes]
    value = interpolate(points, "megabytes", megabytes, "value")
    if value is not None:
        found.append((min(known, key=lambda pair: abs(pair[0] - megabytes))[1], value))
    return found
