"""From result records to the points of trade-off curves, means over seeds, and to numbers between the points.

Between neighbouring points a curve is linear, and beyond the measured ones there is nothing, as in Tables 1 and 2 of
the paper.

Numbers alone: tables, figures and pages are made from what is found here.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from statistics import fmean, stdev

import numpy as np

from lte.config import GFLOP
from lte.records import ResultRecord
from lte.report.curves import curve_name, told_apart
from lte.report.metrics import Metric, metric_named

DENSE, OURS = "dense", "lte"
"""What `method` says in the records of dense models and of LTE."""


@dataclass(frozen=True)
class Statistic:
    """A number over the `n` runs that have it; `sd`, the standard deviation of a sample, is `None` for one run."""

    mean: float
    sd: float | None
    n: int

    @property
    def spread(self) -> float:
        """The standard deviation, 0 for one run."""
        return self.sd or 0.0


@dataclass(frozen=True)
class Point:
    """One setting of a curve, over the records of its seeds. A number that no run has is `None`.

    Attributes:
        target: target sparsity, `None` where the method has none.
        value: the metric.
        sparsity: share of FFN neurons that are not computed per token.
        weight_sparsity: share of the weights of the block linears that are not read.
        gflops: per token, routers and predictors included, in units of 2^30.
        megabytes: of weights read per token at batch size 1, in units of 10^6.
        latency_ms: median decoding step at batch size 1.
        latency_ratio: the same over that of the dense model which was timed beside it.
        latency_sparsity: share of FFN neurons that were not computed in these steps.
    """

    curve: str
    method: str
    label: str | None
    target: float | None
    value: Statistic
    sparsity: Statistic | None
    weight_sparsity: Statistic | None
    gflops: Statistic | None
    megabytes: Statistic | None
    latency_ms: Statistic | None
    latency_ratio: Statistic | None
    latency_sparsity: Statistic | None
    tokens_trained: Statistic | None
    records: tuple[ResultRecord, ...]

    @property
    def is_rounded(self) -> bool:
        """Whether its weights were rounded before they were measured, to 8 or 4 bits say."""
        return any(record.get("weights", "native") != "native" for record in self.records)

    def mean(self, quantity: str) -> float | None:
        """The mean of one of the numbers above."""
        found: Statistic | None = getattr(self, quantity)
        return None if found is None else found.mean


@dataclass(frozen=True)
class Tradeoff:
    """Quality against cost where records are comparable: one task, split, metric, and model that methods started from.

    Attributes:
        curves: points of each curve by rising sparsity, dense models left out.
        dense: a point for each dense model.
        reference: the best of them whose weights nobody rounded, `None` if there is none.
        failed: records of runs without a finite value.
    """

    task: str
    split: str
    model: str
    metric: Metric
    curves: dict[str, tuple[Point, ...]]
    dense: tuple[Point, ...]
    reference: Point | None
    failed: tuple[ResultRecord, ...]

    @property
    def title(self) -> str:
        """The task, its split where the name is another, and the model."""
        return f"{self.task}, {self.split}: {self.model}"

    def points(self) -> list[Point]:
        """Dense models first, then all curves."""
        return [*self.dense, *(point for points in self.curves.values() for point in points)]

    def drop(self, point: Point) -> float | None:
        """How much worse than the dense reference a point is, in the metric's unit; `None` without a reference."""
        return None if self.reference is None else self.metric.drop(point.value.mean, self.reference.value.mean)

    def share(self, point: Point, quantity: str) -> float | None:
        """A mean as a share of the dense reference's; `None` where one of both is not known."""
        dense = None if self.reference is None else self.reference.mean(quantity)
        mean = point.mean(quantity)
        return None if mean is None or not dense else mean / dense


def statistic(values: Iterable[float | None]) -> Statistic | None:
    """Mean and standard deviation of the values that are finite numbers; `None` if there are none."""
    found = [value for value in values if value is not None and math.isfinite(value)]
    return Statistic(fmean(found), stdev(found) if len(found) > 1 else None, len(found)) if found else None


def find_tradeoffs(
    records: Sequence[ResultRecord],
    *,
    metric: str | None = None,
    curve: Callable[[ResultRecord], str] = curve_name,
    higher: Collection[str] = (),
    lower: Collection[str] = (),
) -> list[Tradeoff]:
    """Groups records into trade-offs, and their seeds into points.

    Args:
        records: of any tasks, splits and models; each combination is a trade-off of its own.
        metric: name in the records' `metrics`; `None` takes each record's main metric. Tasks without it are left out.
        curve: names the curve of a record. One that would hold a target and a seed twice is split by what differs, see
            `lte.report.curves.told_apart`.
        higher: metrics that are declared as better the higher.
        lower: metrics that are declared as better the lower.

    Raises:
        ValueError: for a metric that no record has or whose direction is not known, or for runs of the same curve,
            target and seed that nothing tells apart.
    """
    groups: dict[tuple[str, ...], list[ResultRecord]] = defaultdict(list)
    for record in records:
        if metric is None or metric in (record.metric, *(record.metrics or ())):
            groups[record.task, record.split, record.model, metric or record.metric].append(record)
    if not groups:
        names = sorted({name for record in records for name in (record.metric, *(record.metrics or ()))})
        raise ValueError(f"metric must be one that a record has, got metric={metric!r}; they have {', '.join(names)}")
    found = {key: [each for each in group if value_of(each, key[-1]) is not None] for key, group in groups.items()}
    failed = {key: [each for each in group if value_of(each, key[-1]) is None] for key, group in groups.items()}
    curves = told_apart(found, curve)
    return [
        _tradeoff(key, zip(curves[key], found[key], strict=True), failed[key], metric_named(key[-1], higher, lower))
        for key in sorted(groups)
    ]


def value_of(record: ResultRecord, metric: str) -> float | None:
    """A record's value of a metric; `None` if it was not finite."""
    value = record.value if metric == record.metric else (record.metrics or {})[metric]
    return value if value is not None and math.isfinite(value) else None


def _tradeoff(
    key: tuple[str, ...], named: Iterable[tuple[str, ResultRecord]], failed: Sequence[ResultRecord], metric: Metric
) -> Tradeoff:
    by_point: dict[tuple[str, str, str, float], list[ResultRecord]] = defaultdict(list)
    for name, record in named:
        target = -1.0 if record.target_sparsity is None else record.target_sparsity
        by_point[name, record.method, record.label or "", target].append(record)
    points = [_point(place[0], found, metric) for place, found in sorted(by_point.items())]
    best = (max if metric.higher_is_better else min)(
        (point for point in points if point.method == DENSE and not point.is_rounded),
        key=lambda point: point.value.mean,
        default=None,
    )
    known = [_with_weight_sparsity(point, best) for point in points]
    reference = None if best is None else known[points.index(best)]
    dense = tuple(point for point in known if point.method == DENSE)
    curves: dict[str, list[Point]] = defaultdict(list)
    for point in sorted(known, key=lambda point: (point.curve, point.mean("sparsity") or 0.0, point.target or 0.0)):
        if point.method != DENSE:
            curves[point.curve].append(point)
    task, split, model, _ = key
    ordered = {name: tuple(found) for name, found in curves.items()}
    return Tradeoff(task, split, model, metric, ordered, dense, reference, tuple(failed))


def _with_weight_sparsity(point: Point, reference: Point | None) -> Point:
    """A weight sparsity that the records lack is the share of the dense model's FLOPs that a point saves."""
    dense = None if reference is None else reference.mean("gflops")
    if point.weight_sparsity is not None or point.gflops is None or not dense:
        return point
    flops = point.gflops
    spread = None if flops.sd is None else flops.sd / dense
    return replace(point, weight_sparsity=Statistic(1 - flops.mean / dense, spread, flops.n))


def _point(curve: str, records: Sequence[ResultRecord], metric: Metric) -> Point:
    records = sorted(records, key=lambda record: (str(type(record.seed)), record.seed))
    _check_seeds(curve, records)
    value = statistic(value_of(record, metric.name) for record in records)
    assert value is not None
    numbers = {
        quantity: statistic(None if record[name] is None else record[name] / unit for record in records)
        for quantity, (name, unit) in _FIELDS.items()
    }
    timed = [(each.latency_ms, each.latency_dense_ms) for each in records]
    numbers["latency_ratio"] = statistic(own / dense for own, dense in timed if own is not None and dense)
    first = records[0]
    return Point(curve, first.method, first.label, first.target_sparsity, value, records=tuple(records), **numbers)


# The field of a record that holds a quantity, and its unit.
_FIELDS = {
    **{name: (name, 1) for name in ("sparsity", "weight_sparsity", "latency_ms", "latency_sparsity", "tokens_trained")},
    "gflops": ("flops_per_token", GFLOP),
    "megabytes": ("bytes_per_token", 1e6),
}


def _check_seeds(curve: str, records: Sequence[ResultRecord]) -> None:
    seeds, target = [record.seed for record in records], records[0].target_sparsity
    if twice := [record.source for record in records if seeds.count(record.seed) > 1]:
        at = "no target" if target is None else f"{target:g}"
        raise ValueError(
            f"records of one curve must differ in target sparsity or seed, got seeds {seeds} for {curve!r} at {at} in "
            f"{', '.join(twice)}, which nothing tells apart; leave out one of each"
        )


@dataclass(frozen=True)
class Cheapest:
    """The fewest FLOPs of a curve at a drop that is allowed: per token in units of 2^30, and as a share of dense.

    `sparsity` is that of the FFN there; `lowest_measured`, that no point with fewer FLOPs was measured: fewer may do.
    """

    gflops: float
    sparsity: float | None
    share: float | None
    lowest_measured: bool


def cheapest_within(tradeoff: Tradeoff, points: Sequence[Point], limit: float) -> Cheapest | None:
    """The fewest GFLOPs per token at which a curve drops by at most `limit` below the dense reference.

    Args:
        tradeoff: that the points are of.
        points: of one curve.
        limit: in the metric's unit, inclusive.

    Returns:
        `None` if no measured point is that good, or without a dense reference or FLOPs.
    """
    if tradeoff.reference is None:
        return None
    ordered = sorted((point for point in points if point.gflops), key=lambda point: point.mean("gflops") or 0.0)
    drops = [tradeoff.drop(point) or 0.0 for point in ordered]
    first = next((i for i, drop in enumerate(drops) if drop <= limit), None)
    if first is None:
        return None
    good, cheap = ordered[first], ordered[max(first - 1, 0)]
    way = (limit - drops[first]) / (drops[first - 1] - drops[first]) if first else 0.0

    def between(quantity: str) -> float | None:
        start, end = good.mean(quantity), cheap.mean(quantity)
        return None if start is None or end is None else start + way * (end - start)

    gflops, dense = between("gflops") or 0.0, tradeoff.reference.mean("gflops")
    return Cheapest(gflops, between("sparsity"), gflops / dense if dense else None, lowest_measured=first == 0)


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
    if not pairs or not pairs[0][0] <= at <= pairs[-1][0]:
        return None
    return float(np.interp(at, *np.array(pairs).T))
