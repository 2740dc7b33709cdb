"""From result records to the points of trade-off curves: means and standard deviations over seeds.

Numbers alone: tables, figures and pages are made from what is found here.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from statistics import fmean, stdev

from lte.eval.flops import GFLOP
from lte.report.metrics import Metric, metric_named
from lte.report.records import Record, Run, curve_name
from lte.report.telling_apart import told_apart

DENSE, OURS = "dense", "lte"
"""What `method` says in the records of dense models and of LTE."""


@dataclass(frozen=True)
class Statistic:
    """A number over the runs that have it.

    Attributes:
        mean: of the runs.
        sd: standard deviation of a sample, `None` for one run.
        n: how many runs have the number.
    """

    mean: float
    sd: float | None
    n: int

    @property
    def spread(self) -> float:
        """The standard deviation, 0 for one run."""
        return self.sd or 0.0


@dataclass(frozen=True)
class Point:
    """One setting of a curve, over its seeds. A number that no run has is `None`.

    Attributes:
        curve: name of the curve.
        method: what the records say.
        label: of the setting, where the records have one.
        target: target sparsity, `None` where the method has none.
        value: the metric.
        sparsity: share of FFN neurons that are not computed per token.
        weight_sparsity: share of the weights of the block linears that are not read.
        gflops: per token, routers and predictors included, in units of 2^30.
        megabytes: of weights read per token at batch size 1, in units of 10^6.
        latency_ms: median decoding step at batch size 1.
        latency_ratio: the same over that of the dense model which was timed beside it.
        latency_sparsity: share of FFN neurons that were not computed in these steps.
        tokens_trained: of the training.
        runs: the records, by seed.
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
    runs: tuple[Run, ...]

    def mean(self, quantity: str) -> float | None:
        """The mean of one of the numbers above."""
        found: Statistic | None = getattr(self, quantity)
        return None if found is None else found.mean


@dataclass(frozen=True)
class Comparison:
    """All that is comparable: one task, split, model and metric.

    Attributes:
        task: name.
        split: of its data.
        model: that all methods started from.
        metric: what its values mean.
        curves: points of each curve by rising sparsity, dense models left out.
        dense: a point for each dense model.
        reference: the best of them, `None` if there is none.
        failed: runs without a finite value.
    """

    task: str
    split: str
    model: str
    metric: Metric
    curves: dict[str, tuple[Point, ...]]
    dense: tuple[Point, ...]
    reference: Point | None
    failed: tuple[Run, ...]

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


def compare_runs(
    runs: Sequence[Run],
    *,
    metric: str | None = None,
    curve: Callable[[Record], str] = curve_name,
    higher: Collection[str] = (),
    lower: Collection[str] = (),
) -> list[Comparison]:
    """Groups runs into comparisons, and their seeds into points.

    Args:
        runs: of any tasks, splits and models; each combination is a comparison of its own.
        metric: name in the records' `metrics`; `None` takes each record's main metric. Tasks without it are left out.
        curve: names the curve of a record. One that would hold a target and a seed twice is split by what differs, see
            `lte.report.telling_apart.told_apart`.
        higher: metrics that are declared as better the higher.
        lower: metrics that are declared as better the lower.

    Raises:
        ValueError: for a metric that no record has or whose direction is not known, or for runs of the same curve,
            target and seed that nothing tells apart.
    """
    groups: dict[tuple[str, ...], list[Run]] = defaultdict(list)
    for run in runs:
        record = run.record
        if metric is None or _has_metric(record, metric):
            groups[record["task"], record["split"], record["model"], metric or record["metric"]].append(run)
    if not groups:
        names = sorted({name for run in runs for name in (run.record["metric"], *(run.record.get("metrics") or ()))})
        raise ValueError(f"metric must be one that a record has, got metric={metric!r}; they have {', '.join(names)}")
    found = {key: [run for run in group if value_of(run.record, key[-1]) is not None] for key, group in groups.items()}
    failed = {key: [run for run in group if value_of(run.record, key[-1]) is None] for key, group in groups.items()}
    curves = told_apart(found, curve)
    return [
        _comparison(key, found[key], curves[key], failed[key], metric_named(key[-1], higher, lower))
        for key in sorted(groups)
    ]


def _has_metric(record: Record, metric: str) -> bool:
    return metric == record["metric"] or metric in (record.get("metrics") or {})


def value_of(record: Record, metric: str) -> float | None:
    """A record's value of a metric; `None` if it was not finite."""
    value = record["value"] if metric == record["metric"] else record["metrics"][metric]
    return value if value is not None and math.isfinite(value) else None


def _comparison(
    key: tuple[str, ...], runs: Sequence[Run], names: Sequence[str], failed: Sequence[Run], metric: Metric
) -> Comparison:
    by_point: dict[tuple[str, str, str, float], list[Run]] = defaultdict(list)
    for run, name in zip(runs, names, strict=True):
        record = run.record
        target = -1.0 if record["target_sparsity"] is None else record["target_sparsity"]
        by_point[name, record["method"], record.get("label") or "", target].append(run)
    points = [_point(place[0], found, metric) for place, found in sorted(by_point.items())]
    reference, dense = _dense(points, metric)
    curves: dict[str, list[Point]] = defaultdict(list)
    for point in points:
        if point.method != DENSE:
            curves[point.curve].append(_with_weight_sparsity(point, reference))
    task, split, model, _ = key
    ordered = {name: tuple(sorted(curves[name], key=_by_sparsity)) for name in sorted(curves)}
    return Comparison(task, split, model, metric, ordered, dense, reference, tuple(failed))


def _by_sparsity(point: Point) -> tuple[float, float]:
    return point.mean("sparsity") or 0.0, point.target or 0.0


def _dense(points: Sequence[Point], metric: Metric) -> tuple[Point | None, tuple[Point, ...]]:
    """The best dense point, and all of them."""
    found = [point for point in points if point.method == DENSE]
    if not found:
        return None, ()
    best = (max if metric.higher_is_better else min)(found, key=lambda point: point.value.mean)
    dense = [_with_weight_sparsity(point, best) for point in found]
    return dense[found.index(best)], tuple(dense)


def _with_weight_sparsity(point: Point, reference: Point | None) -> Point:
    """A weight sparsity that the records lack is the share of the dense model's FLOPs that a point saves."""
    dense = None if reference is None else reference.mean("gflops")
    if point.weight_sparsity is not None or point.gflops is None or not dense:
        return point
    flops = point.gflops
    spread = None if flops.sd is None else flops.sd / dense
    return replace(point, weight_sparsity=Statistic(1 - flops.mean / dense, spread, flops.n))


def _point(curve: str, runs: Sequence[Run], metric: Metric) -> Point:
    runs = sorted(runs, key=lambda run: (str(type(run.record["seed"])), run.record["seed"]))
    _check_seeds(curve, runs)
    records = [run.record for run in runs]
    value = statistic(value_of(record, metric.name) for record in records)
    assert value is not None

    def over_runs(name: str, unit: float = 1.0) -> Statistic | None:
        return statistic(None if record.get(name) is None else record[name] / unit for record in records)

    return Point(
        curve=curve,
        method=records[0]["method"],
        label=records[0].get("label"),
        target=records[0]["target_sparsity"],
        value=value,
        sparsity=over_runs("sparsity"),
        weight_sparsity=over_runs("weight_sparsity"),
        gflops=over_runs("flops_per_token", GFLOP),
        megabytes=over_runs("bytes_per_token", 1e6),
        latency_ms=over_runs("latency_ms"),
        latency_ratio=statistic(map(_latency_ratio, records)),
        latency_sparsity=over_runs("latency_sparsity"),
        tokens_trained=over_runs("tokens_trained"),
        runs=tuple(runs),
    )


def _latency_ratio(record: Record) -> float | None:
    ours, dense = record.get("latency_ms"), record.get("latency_dense_ms")
    return None if ours is None or not dense else ours / dense


def _check_seeds(curve: str, runs: Sequence[Run]) -> None:
    seeds = [run.record["seed"] for run in runs]
    twice = [run for run in runs if seeds.count(run.record["seed"]) > 1]
    if not twice:
        return
    target = runs[0].record["target_sparsity"]
    at = "no target" if target is None else f"{target:g}"
    raise ValueError(
        f"records of one curve must differ in target sparsity or seed, got seeds {seeds} for {curve!r} at {at} in "
        f"{', '.join(run.source for run in twice)}, which nothing tells apart; leave out one of each"
    )
