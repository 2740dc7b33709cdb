"""Numbers between the measured points of a curve: the form of the paper's Tables 1 and 2.

Linear between neighbouring measured points, and never beyond them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from lte.report.tradeoff import Comparison, Point


@dataclass(frozen=True)
class Cheapest:
    """The fewest FLOPs of a curve at a drop that is allowed.

    Attributes:
        gflops: per token, in units of 2^30.
        sparsity: FFN sparsity there, `None` if one of the two points lacks it.
        share: of the dense reference's FLOPs, `None` if they are not known.
        lowest_measured: whether no point with fewer FLOPs was measured, so that fewer may do.
    """

    gflops: float
    sparsity: float | None
    share: float | None
    lowest_measured: bool


def cheapest_within(comparison: Comparison, points: Sequence[Point], limit: float) -> Cheapest | None:
    """The fewest GFLOPs per token at which a curve drops by at most `limit` below the dense reference.

    Args:
        comparison: that the points are of.
        points: of one curve.
        limit: in the metric's unit, inclusive.

    Returns:
        `None` if no measured point is that good, or without a dense reference or FLOPs.
    """
    if comparison.reference is None:
        return None
    ordered = sorted((point for point in points if point.gflops is not None), key=lambda point: _gflops(point))
    drops = [comparison.drop(point) or 0.0 for point in ordered]
    first = next((i for i, drop in enumerate(drops) if drop <= limit), None)
    if first is None:
        return None
    good = ordered[first]
    if first == 0:
        return _cheapest(comparison, good, good, 0.0, lowest_measured=True)
    share = (limit - drops[first]) / (drops[first - 1] - drops[first])
    return _cheapest(comparison, good, ordered[first - 1], share, lowest_measured=False)


def _cheapest(comparison: Comparison, good: Point, cheap: Point, share: float, *, lowest_measured: bool) -> Cheapest:
    """`share` of the way from a point that is good enough to one that is cheaper."""
    gflops = _gflops(good) + share * (_gflops(cheap) - _gflops(good))
    ends = good.mean("sparsity"), cheap.mean("sparsity")
    sparsity = None if ends[0] is None or ends[1] is None else ends[0] + share * (ends[1] - ends[0])
    dense = comparison.reference.mean("gflops") if comparison.reference else None
    return Cheapest(gflops, sparsity, gflops / dense if dense else None, lowest_measured)


def _gflops(point: Point) -> float:
    return point.mean("gflops") or 0.0


def interpolate(points: Sequence[Point], x: str, at: float, y: str) -> float | None:
    """The mean of `y` where the mean of `x` is `at`, `None` outside of the measured points.

    Args:
        points: of one curve; those that lack one of both numbers are passed over.
        x: quantity of a point, by its name there.
        at: the place.
        y: another quantity.
    """
    pairs = sorted(
        (px, py) for point in points if (px := point.mean(x)) is not None and (py := point.mean(y)) is not None
    )
    for px, py in pairs:
        if px == at:
            return py
    for (left, low), (right, high) in pairwise(pairs):
        if left < at < right:
            return low + (at - left) / (right - left) * (high - low)
    return None
