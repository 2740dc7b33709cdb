"""All trade-offs at a glance: what each method loses on each task where all read at most as many bytes."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

from lte.report.envelope import at_most
from lte.report.page import without_places
from lte.report.points import OURS, Point, Tradeoff

SHARES = (0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
"""Of the dense model's bytes: at each of them methods are compared."""
HALF = 0.5
GGUF_ENDING = re.compile(r"([.-](i?q\d\w*|b?f(16|32)))?\.gguf$", re.IGNORECASE)
"""Of a model's file, with the format of its weights: `.Q4_K_M.gguf`."""


def goal(tradeoff: Tradeoff, limit: float | None = None) -> float:
    """The loss of quality that is small enough: `limit`, else what the paper allows for the metric."""
    return tradeoff.metric.small_drop if limit is None else limit


def main_curves(tradeoff: Tradeoff) -> dict[str, str]:
    """The curve that stands for each method: other curves of it, of other settings, are its variants.

    It is the one that is named as the method, or begins so, of these the one of most runs, then that of fewest bytes.
    """
    curves: dict[str, list[str]] = defaultdict(list)
    for name, points in tradeoff.curves.items():
        curves[points[0].method].append(name)

    def rank(name: str) -> tuple[bool, int, bool, float, str]:
        points = tradeoff.curves[name]
        fewest = min((point.mean("megabytes") or float("inf") for point in points), default=0.0)
        is_named = name.split(",")[0] == points[0].method
        return not is_named, -sum(point.value.n for point in points), "," in name, fewest, name

    return {method: min(names, key=rank) for method, names in curves.items()}


def loss_at(tradeoff: Tradeoff, points: Sequence[Point], share: float) -> tuple[float, Point] | None:
    """The least quality that a curve loses with at most a share of the dense reference's bytes, and the point that it
    is of or near; `None` where the curve was not measured with that few.
    """
    dense = None if tradeoff.reference is None else tradeoff.reference.mean("megabytes")
    if tradeoff.reference is None or not dense:
        return None
    reference = tradeoff.reference.value.mean
    # The dense model's own bytes are a sum of floating-point numbers, too.
    found = at_most(points, share * dense * (1 + 1e-9))
    losses = [(tradeoff.metric.drop(value, reference), point) for point, value in found]
    return min(losses, key=lambda pair: pair[0], default=None)


def rivals(tradeoff: Tradeoff, most: int = 3) -> list[str]:
    """The methods beside LTE that lose least: by their places at each of `SHARES`, behind those that reach it."""
    curves = {method: tradeoff.curves[name] for method, name in main_curves(tradeoff).items() if method != OURS}
    places: dict[str, int] = dict.fromkeys(curves, 0)
    for share in SHARES[:-1]:
        found = {method: loss_at(tradeoff, points, share) for method, points in curves.items()}
        losses = sorted(each[0] for each in found.values() if each is not None)
        for method, each in found.items():
            places[method] += len(curves) if each is None else losses.index(each[0])
    return sorted(places, key=lambda method: (places[method], method))[:most]


def pareto_front(tradeoff: Tradeoff, quantity: str, larger_is_cheaper: bool = False) -> list[Point]:
    """The points of main curves that no other beats in both quality and a cost, by rising quality lost."""
    main = set(main_curves(tradeoff).values())
    points = [each for each in tradeoff.points() if each.curve in main or each is tradeoff.reference]
    sign = -1 if larger_is_cheaper else 1
    known = [
        (tradeoff.drop(each) or 0.0, sign * cost, each) for each in points if (cost := each.mean(quantity)) is not None
    ]
    found: list[Point] = []
    cheapest = float("inf")
    for _, cost, point in sorted(known, key=lambda item: item[:2]):
        if cost < cheapest:
            found.append(point)
            cheapest = cost
    return found


def labels(tradeoffs: Sequence[Tradeoff]) -> list[str]:
    """What each trade-off is called: its task, and the split, model and metric where tasks are not enough."""
    found = [without_places(each.task) for each in tradeoffs]
    longer = [without_places(f"{each.task}, {each.split}") for each in tradeoffs]
    models = [without_places(f"{each.task}: {GGUF_ENDING.sub('', each.model)}") for each in tradeoffs]
    longest = [f"{name}, {each.metric.name}" for name, each in zip(models, tradeoffs, strict=True)]
    for names in (longer, models, longest, [f"{name} ({place})" for place, name in enumerate(longest, 1)]):
        found = [names[place] if found.count(name) > 1 else name for place, name in enumerate(found)]
    return found


def overview(tradeoffs: Sequence[Tradeoff], limit: float | None = None) -> dict[str, Any]:
    """The heat map of tasks and methods, and the sentence above it.

    Returns:
        `methods`, LTE first, then by how many tasks they are compared on; `rows`, a task each with its `goal` and
        `cells`: by method a list with an object or `None` for each of `shares`: `lost`, `sd`, `seeds`, `met`, `point`
        (its place in `Tradeoff.points`); `share`, the one to begin with; `sentence`.
    """
    rows: list[dict[str, Any]] = []
    for place, (tradeoff, name) in enumerate(zip(tradeoffs, labels(tradeoffs), strict=True)):
        cells = {
            method: [_cell(tradeoff, tradeoff.curves[curve], share, goal(tradeoff, limit)) for share in SHARES]
            for method, curve in main_curves(tradeoff).items()
        }
        row = {"comparison": place, "name": name, "metric": tradeoff.metric.name, "goal": goal(tradeoff, limit)}
        if any(any(each) for each in cells.values()):
            rows.append({**row, "cells": cells})
    rows.sort(key=lambda row: (-len(row["cells"]), row["name"]))
    count = Counter(method for row in rows for method in row["cells"])
    methods = sorted(count, key=lambda method: (method != OURS, -count[method], method))
    share = _first_share(rows, methods)
    return {"methods": methods, "rows": rows, "shares": SHARES, "share": share, "sentence": main_result(rows, share)}


def _cell(tradeoff: Tradeoff, points: Sequence[Point], share: float, limit: float) -> dict[str, Any] | None:
    found = loss_at(tradeoff, points, share)
    if found is None:
        return None
    lost, point = found
    place = next(place for place, each in enumerate(tradeoff.points()) if each is point)
    return {"lost": lost, "met": lost <= limit, "sd": point.value.sd, "seeds": point.value.n, "point": place}


def _first_share(rows: Sequence[dict[str, Any]], methods: Sequence[str]) -> float:
    """Half of the bytes, or more where LTE, or without it no method, was measured with that few."""
    cells = [row["cells"][methods[0]] for row in rows if methods[0] in row["cells"]]
    known = [share for place, share in enumerate(SHARES) if share >= HALF and any(row[place] for row in cells)]
    return min(known, default=HALF)


def main_result(rows: Sequence[dict[str, Any]], share: float) -> str:
    """The outcome of the overview in a sentence, whichever way it went."""
    place, part = SHARES.index(share), "half" if share == HALF else f"{100 * share:.0f}%"
    found: dict[str, Cells] = defaultdict(dict)
    for row in rows:
        for method, cells in row["cells"].items():
            if cells[place]:
                found[method][row["name"]] = cells[place] | {"goal": row["goal"], "metric": row["metric"]}
    if not found:
        return "No method can be compared here: no result with known bytes stands beside a dense model's."
    ours = found.pop(OURS, {})
    shared = {
        method: {task: cell for task, cell in cells.items() if not ours or task in ours}
        for method, cells in found.items()
    }
    start = f"Reading at most {part} of the dense model's weight bytes{_of_lte(ours, len(rows) == 1)}"
    return start + _of_others(ours, {method: cells for method, cells in shared.items() if cells}, len(rows) == 1)


Cells = dict[str, dict[str, Any]]
"""The cells of a method by task."""


def _of_lte(ours: Cells, is_one: bool) -> str:
    if not ours:
        return ", where LTE was not measured"
    seeds = sorted({cell["seeds"] for cell in ours.values()})
    said = f"{' to '.join(map(str, dict.fromkeys((seeds[0], seeds[-1]))))} seed{'s' * (seeds[-1] > 1)}"
    if not is_one:
        return f", LTE loses no more quality than the goal allows on {_met(ours)} tasks ({said})"
    ((task, cell),) = ours.items()
    spread = "" if cell["sd"] is None else f" ± {cell['sd']:.3g}"
    return (
        f", LTE loses {cell['lost']:.3g}{spread} {cell['metric']} on {task} ({said}), which "
        f"{'meets' if cell['met'] else 'misses'} the goal of at most {cell['goal']:g}"
    )


def _of_others(ours: Cells, others: dict[str, Cells], is_one: bool) -> str:
    if not others:
        return "; no other method was measured with that few."

    def rank(method: str) -> tuple[int, float, float]:
        cells = others[method].values()
        return (
            sum(cell["met"] for cell in cells),
            -len(cells),
            -sum(cell["lost"] / (cell["goal"] or 1.0) for cell in cells),
        )

    best = max(others, key=rank)
    name = best.replace("_", " ")
    if not ours:
        return f", {name} does best: it stays within the goal on {_met(others[best])} tasks."
    if is_one:
        (cell,) = others[best].values()
        return f"; {name}, the best other method, loses {cell['lost']:.3g}."
    least = sum(
        all(cells[task]["lost"] >= cell["lost"] for cells in others.values() if task in cells)
        for task, cell in ours.items()
    )
    within = f"of the others {name} does best, within the goal on {_met(others[best])}"
    return f", and on {least} no other method loses less; {within}."


def _met(cells: Cells) -> str:
    return f"{sum(cell['met'] for cell in cells.values())} of {len(cells)}"
