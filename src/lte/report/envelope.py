"""Where LTE is on the upper envelope of all methods, quality against bytes saved, and where it is not."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from lte.report.interpolation import interpolate
from lte.report.tradeoff import OURS, Comparison, Point


@dataclass(frozen=True)
class Standing:
    """How a point of LTE stands against the best other method that reads at most as many bytes.

    Attributes:
        curve: name of LTE's curve.
        point: of it.
        saving: share of the dense reference's bytes that the point saves.
        rival: name of the other curve, `None` if no other method was measured with that few bytes.
        rival_value: its metric there.
        behind: how much better the rival is, in the metric's unit; negative where LTE is better.
        sd: standard deviation of that difference, from both spreads over seeds; 0 for single seeds.
        seeds: the smaller number of seeds of both.
    """

    curve: str
    point: Point
    saving: float
    rival: str | None
    rival_value: float | None
    behind: float | None
    sd: float
    seeds: int

    @property
    def on_envelope(self) -> bool:
        """Whether no other method is better by more than one standard deviation."""
        return self.behind is None or self.behind <= self.sd


@dataclass(frozen=True)
class _Rival:
    name: str
    value: float
    sd: float
    seeds: int


def lte_standings(comparison: Comparison) -> list[Standing]:
    """Each measured point of LTE against the best other method at the same bytes per token, or fewer.

    The others are the methods that are not LTE, dense models among them: measured points with at most as many bytes,
    and values interpolated between neighbouring points. Nothing is extrapolated.

    Returns:
        By curve and rising saving; empty without a dense reference or LTE points with known bytes.
    """
    found: list[Standing] = []
    others = [[point for point in points if point.method != OURS] for points in comparison.curves.values()]
    rivals = [*others, *([point] for point in comparison.dense)]
    for name, points in comparison.curves.items():
        standings = [_standing(comparison, name, point, rivals) for point in points if point.method == OURS]
        found += sorted((each for each in standings if each is not None), key=lambda each: each.saving)
    return found


def _standing(comparison: Comparison, name: str, point: Point, rivals: Sequence[Sequence[Point]]) -> Standing | None:
    share, megabytes = comparison.share(point, "megabytes"), point.mean("megabytes")
    if share is None or megabytes is None:
        return None
    own, drop = point.value, comparison.metric.drop
    standings = [
        Standing(
            curve=name,
            point=point,
            saving=1 - share,
            rival=rival.name,
            rival_value=rival.value,
            behind=drop(own.mean, rival.value),
            sd=math.hypot(own.spread, rival.sd),
            seeds=min(own.n, rival.seeds),
        )
        for points in rivals
        for rival in _at_most(points, megabytes)
    ]
    if not standings:
        return Standing(name, point, 1 - share, None, None, None, own.spread, own.n)
    # A rival that is clearly better comes before one that is better on average, but not clearly so.
    return max(standings, key=lambda standing: (not standing.on_envelope, standing.behind))


def _at_most(points: Sequence[Point], megabytes: float) -> list[_Rival]:
    """A curve's measured points with at most so many bytes, and the curve at exactly so many.

    Between two points it has the spread and the seeds of the nearer one.
    """
    known = [point for point in points if point.megabytes is not None]
    found = [
        _Rival(point.curve, point.value.mean, point.value.spread, point.value.n)
        for point in known
        if (point.mean("megabytes") or 0.0) <= megabytes
    ]
    value = interpolate(known, "megabytes", megabytes, "value")
    if value is not None:
        nearest = min(known, key=lambda point: abs((point.mean("megabytes") or 0.0) - megabytes))
        found.append(_Rival(nearest.curve, value, nearest.value.spread, nearest.value.n))
    return found


def envelope_sentences(comparison: Comparison, standings: Sequence[Standing]) -> list[str]:
    """What the standings say, a sentence for each curve of LTE, and one about seeds where there is one seed alone."""
    if not standings:
        return ["No point of LTE with known bytes beside a dense model: nothing is said of the envelope."]
    found = []
    for name in dict.fromkeys(standing.curve for standing in standings):
        own = [standing for standing in standings if standing.curve == name]
        found.append(_sentence(comparison, name, own))
    if any(standing.seeds < 2 for standing in standings):
        found.append("Where one side has a single seed, its standard deviation counts as 0.")
    return found


def _sentence(comparison: Comparison, name: str, standings: Sequence[Standing]) -> str:
    compared = [standing for standing in standings if standing.rival is not None]
    alone = [standing for standing in standings if standing.rival is None]
    parts = []
    on = [standing for standing in compared if standing.on_envelope]
    if on:
        parts.append(f"on the upper envelope of all methods, within one standard deviation, at {_savings(on)}")
    elif compared:
        parts.append("nowhere on the upper envelope of all methods")
    for standing in compared:
        if not standing.on_envelope and standing.behind is not None:
            by = comparison.metric.format(standing.behind)
            parts.append(f"at {_savings([standing])} {standing.rival} is better by {by} {comparison.metric.name}")
    if alone:
        parts.append(f"at {_savings(alone)} no other method was measured with as few")
    return f"{name}: {'; '.join(parts)}."


def _savings(standings: Sequence[Standing]) -> str:
    return f"{', '.join(f'{100 * standing.saving:.1f}%' for standing in standings)} of the bytes saved"
