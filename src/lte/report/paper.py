"""The paper's own numbers beside ours, where the task is the same; model and setting are not."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from lte.report.overview import goal
from lte.report.points import Cheapest, Point, Tradeoff, cheapest_within, interpolate
from lte.settings import read_yaml

PAPER_FILE = Path(__file__).with_name("paper.yaml")


class PaperRow(NamedTuple):
    """A number of the paper and ours, as texts: where it stands, what it is, and `-` where no points of ours reach."""

    where: str
    what: str
    paper: str
    ours: str


@cache
def paper_numbers() -> Mapping[str, Any]:
    """What `paper.yaml` holds."""
    return read_yaml(PAPER_FILE)


def paper_rows(tradeoff: Tradeoff, limit: float | None = None) -> list[PaperRow]:
    """The paper's numbers for a trade-off's task and metric, with ours in the same form.

    Args:
        tradeoff: ours.
        limit: the drop for GLUE, where the paper names none; `None` takes the metric's own. Table 1 has its own drop.
    """
    numbers, task, metric = paper_numbers(), tradeoff.task, tradeoff.metric.name
    found = _table1(numbers["table1"], tradeoff)
    if (task, metric) == (numbers["table2"]["task"], numbers["table2"]["metric"]):
        found += [_table2(numbers["table2"], row, tradeoff) for row in numbers["table2"]["rows"]]
    if task in numbers["glue"]["tasks"]:
        found += [_glue(numbers["glue"], row, tradeoff, goal(tradeoff, limit)) for row in numbers["glue"]["rows"]]
    return [*found, *_latency(numbers["latency"], tradeoff)]


def paper_points(tradeoff: Tradeoff) -> list[dict[str, Any]]:
    """The paper's points for a trade-off's task and metric, beside our dense reference; none without one.

    A point of Table 1 stands at the drop that it is said to stay within, at the share of the dense GFLOPs that it
    takes; one of Table 2 at its perplexity, and at the FLOPs that its weight sparsity leaves.

    Returns:
        `label`, `lost`, and `costs`: `flops` as a share of the dense model's, and `sparsity` where it is known.
    """
    reference, task, metric = tradeoff.reference, tradeoff.task, tradeoff.metric
    if reference is None or reference.gflops is None:
        return []
    first, second = paper_numbers()["table1"], paper_numbers()["table2"]
    found: list[tuple[Mapping[str, Any], float, dict[str, float | None]]] = []
    place = first["tasks"].get(task)
    for row in first["rows"] if place and place["metric"] == metric.name else ():
        if task in row["gflops"]:
            flops, sparsity = row["gflops"][task] / first["dense_gflops"], row.get("sparsity", {}).get(task)
            found.append((row, place["drop"], {"flops": flops, "sparsity": sparsity}))
    for row in second["rows"] if (task, metric.name) == (second["task"], second["metric"]) else ():
        lost = metric.drop(row["value"], reference.value.mean)
        found.append((row, lost, {"flops": 1 - row["weight_sparsity"]}))
    names = paper_numbers()["names"]
    return [{"label": f"{names[row['method']]} (paper)", "lost": lost, "costs": costs} for row, lost, costs in found]


def _table1(table: Mapping[str, Any], tradeoff: Tradeoff) -> list[PaperRow]:
    place = table["tasks"].get(tradeoff.task)
    if place is None or place["metric"] != tradeoff.metric.name:
        return []
    found = []
    for row in table["rows"]:
        gflops = row["gflops"].get(tradeoff.task)
        what = f"{row['label']}, {table['model']}: GFLOPs at a drop of at most {place['drop']:g} {place['metric']}"
        paper = "-" if gflops is None else f"{gflops:.2f} ({_percent(gflops / table['dense_gflops'])} of dense)"
        ours = "-"
        if best := _best(tradeoff, row, place["drop"]):
            name, cheapest = best
            share = "" if cheapest.share is None else f" ({_percent(cheapest.share)} of dense)"
            ours = f"{cheapest.gflops:.4f}{share}, {name}"
        found.append(PaperRow(table["where"], what, paper, ours))
    return found


def _best(tradeoff: Tradeoff, row: Mapping[str, Any], limit: float) -> tuple[str, Cheapest] | None:
    """The curve of a row's method that needs the fewest GFLOPs, and what it needs."""
    pairs = [(name, cheapest_within(tradeoff, points, limit)) for name, points in _curves(tradeoff, row)]
    found = [(name, cheapest) for name, cheapest in pairs if cheapest is not None]
    return min(found, key=lambda pair: pair[1].gflops, default=None)


def _curves(tradeoff: Tradeoff, row: Mapping[str, Any]) -> list[tuple[str, Sequence[Point]]]:
    """Our curves of a row's method, with the points alone that have its pattern."""
    found: list[tuple[str, Sequence[Point]]] = []
    for name, points in tradeoff.curves.items():
        own = [point for point in points if point.method == row["method"]]
        if "pattern" in row:
            own = [point for point in own if (point.records[0].method_config or {}).get("pattern") == row["pattern"]]
        if own and row.get("relu", "relu" in name.lower()) == ("relu" in name.lower()):
            found.append((name, own))
    return found


def _lowest(tradeoff: Tradeoff, row: Mapping[str, Any], x: str, at: float, y: str, form: Callable[[float], str]) -> str:
    """The lowest value between points of our curves of a row's method, and whose it is; `-` if none reaches there."""
    pairs = [(interpolate(points, x, at, y), name) for name, points in _curves(tradeoff, row)]
    known = [(value, name) for value, name in pairs if value is not None]
    return ", ".join((form(min(known)[0]), min(known)[1])) if known else "-"


def _table2(table: Mapping[str, Any], row: Mapping[str, Any], tradeoff: Tradeoff) -> PaperRow:
    at = row["weight_sparsity"]
    ours = _lowest(tradeoff, row, "weight_sparsity", at, "value", tradeoff.metric.format)
    what = f"{row['label']}, {table['model']}: perplexity with {_percent(at)} of the weights not read"
    return PaperRow(table["where"], what, f"{row['value']:.2f}", ours)


def _glue(table: Mapping[str, Any], row: Mapping[str, Any], tradeoff: Tradeoff, limit: float) -> PaperRow:
    what = f"{row['label']}, {table['model']}: FFN sparsity that keeps the quality"
    best = _best(tradeoff, row, limit)
    ours = "-"
    if best is not None and best[1].sparsity is not None:
        ours = f"{_percent(best[1].sparsity)} at a drop of at most {limit:g}, {best[0]}"
    return PaperRow(table["where"], what, row["statement"], ours)


def _latency(table: Mapping[str, Any], tradeoff: Tradeoff) -> list[PaperRow]:
    """Nothing where no latency of ours is known, or not at which sparsity it was timed."""
    if all(point.latency_ratio is None or point.latency_sparsity is None for point in tradeoff.points()):
        return []
    at = table["sparsity"]
    ours = _lowest(tradeoff, table, "latency_sparsity", at, "latency_ratio", _percent)
    what = f"{table['label']}, {table['model']}: latency over dense at about {_percent(at)} sparsity"
    return [PaperRow(table["where"], what, f"about {_percent(table['latency_ratio'])}", ours)]


def _percent(share: float) -> str:
    return f"{100 * share:.3g}%"
