"""The comparison of methods as one web page, which needs nothing but a browser; `assets/report.js` draws its data.

Shapes: L layers, B bins of a histogram, S logged steps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from lte import __version__
from lte.files import json_ready, write_text_atomic
from lte.records import ResultRecord
from lte.report.bench import bench_data
from lte.report.curves import field_text, flat_fields
from lte.report.inputs import Bench
from lte.report.methods_report import tradeoff_texts
from lte.report.overview import goal, labels, main_curves, overview, pareto_front, rivals
from lte.report.page import pack_json, read_asset, render_page, without_places
from lte.report.palette import colour_names
from lte.report.paper import paper_numbers, paper_points
from lte.report.points import Point, Tradeoff, value_of
from lte.report.tables import TextTable, csv_rows, failure_text, point_name, results_table

SCRIPTS = ("charts.js", "report_tables.js", "report_task.js", "report_inside.js", "report.js")
TITLE = "What skipping neurons costs and saves"


def html_report(data: dict[str, Any]) -> str:
    """The page for what `report_data` returned; what is large in it is packed."""
    comparisons = [{"name": each["name"], "packed": pack_json(each)} for each in data["comparisons"]]
    packed = {**data, "comparisons": comparisons, "benches": pack_json(data["benches"]) if data["benches"] else None}
    return render_page(TITLE, read_asset("report.html"), packed, SCRIPTS, styles=("report.css",))


def write_html_report(
    path: str | Path, tradeoffs: Sequence[Tradeoff], benches: Sequence[Bench] = (), limit: float | None = None
) -> Path:
    """Writes the page, so that a reader never sees half a file.

    Args:
        path: of the file; folders are made if missing.
        tradeoffs: from `find_tradeoffs`; may be empty.
        benches: files of `lte bench`.
        limit: the loss of quality that is the goal; `None` takes the metric's own.
    """
    write_text_atomic(path, html_report(report_data(tradeoffs, benches, limit)))
    return Path(path)


def report_data(
    tradeoffs: Sequence[Tradeoff], benches: Sequence[Bench] = (), limit: float | None = None
) -> dict[str, Any]:
    """The data of the page that `write_html_report` writes.

    A number that is not known, or not finite, is `None`, and no path is absolute.
    """
    measured = [bench_data(bench) for bench in benches]
    methods = [point.method for tradeoff in tradeoffs for point in tradeoff.points()]
    providers = [row["provider"] for each in measured for group in each["latency"] for row in group["rows"]]
    records = [record for each in tradeoffs for point in each.points() for record in point.records]
    records += [record for each in tradeoffs for record in each.failed]
    named = zip(tradeoffs, labels(tradeoffs), strict=True)
    ready: dict[str, Any] = json_ready(
        {
            "version": __version__,
            "colours": colour_names([*methods, *providers]),
            "histogram_unit": HISTOGRAM_UNIT,
            "paper": paper_numbers()["source"],
            "overview": overview(tradeoffs, limit),
            "comparisons": [{"name": name, **tradeoff_data(tradeoff, limit)} for tradeoff, name in named],
            "benches": measured,
            "files": sorted({*(record.source for record in records), *(bench.source for bench in benches)}),
        }
    )
    return without_places(ready)


AXES = {"bytes": "megabytes", "flops": "gflops", "sparsity": "sparsity", "time": "latency_ratio"}
"""What a cost is called on the page, and the quantity of a `Point`."""


def tradeoff_data(tradeoff: Tradeoff, limit: float | None = None) -> dict[str, Any]:
    """One trade-off: its points with their runs, the paper's points, the tables, and what sentences say of it."""
    parts = tradeoff_texts(tradeoff, limit)
    tables = [part for part in parts if isinstance(part, TextTable)]
    metric, points = tradeoff.metric, tradeoff.points()
    main = set(main_curves(tradeoff).values())
    fronts = {axis: pareto_front(tradeoff, quantity, axis == "sparsity") for axis, quantity in AXES.items()}
    rows = csv_rows(tradeoff)
    place = {id(point): index for index, point in enumerate(points)}
    return {
        "title": f"{tradeoff.title}, {metric.name}",
        "metric": {"name": metric.name, "higher_is_better": metric.higher_is_better, "decimals": metric.decimals},
        "goal": goal(tradeoff, limit),
        "points": [_point(tradeoff, point, point.curve in main) for point in points],
        "rivals": rivals(tradeoff),
        "fronts": {axis: [place[id(point)] for point in front] for axis, front in fronts.items()},
        "failed": [
            {"name": each.label or each.method, "why": failure_text(each), **run_data(each, None)}
            for each in tradeoff.failed
        ],
        "paper": paper_points(tradeoff),
        "sentences": [part for part in parts if isinstance(part, str)],
        "results": _table(results_table(tradeoff)),
        "tables": [_table(table) for table in tables if table.title != tradeoff.title],
        "csv": [[*rows[0]], *([*row.values()] for row in rows)] if rows else [],
    }


def _point(tradeoff: Tradeoff, point: Point, is_main: bool) -> dict[str, Any]:
    settings = {name: point.records[0][name] for name in ("method", "tokens_trained", "method_config", "config")}
    return {
        # The curve of a method needs no more than its name.
        "name": point.method if is_main and point.label in (None, point.method) else point_name(point),
        "curve": point.curve,
        "method": point.method,
        "target": point.target,
        "is_dense": point in tradeoff.dense,
        "is_reference": point is tradeoff.reference,
        "is_main": is_main,
        "group": Path(point.records[0].source).parent.name,
        "lost": tradeoff.drop(point),
        "value": asdict(point.value),
        "costs": {axis: _cost(tradeoff, point, quantity) for axis, quantity in AXES.items()},
        "settings": {name: field_text(value) for name, value in flat_fields(settings)},
        "runs": [run_data(record, value_of(record, tradeoff.metric.name)) for record in point.records],
    }


def _cost(tradeoff: Tradeoff, point: Point, quantity: str) -> float | None:
    """A cost as a share of the dense model's; weights that are left out neuron by neuron are no neurons skipped."""
    if quantity in ("megabytes", "gflops"):
        return tradeoff.share(point, quantity)
    found = point.mean(quantity)
    share = tradeoff.share(point, "megabytes")
    return None if quantity == "sparsity" and found == 0 and share is not None and share < 0.99 else found


def _table(table: TextTable) -> dict[str, Any]:
    return {name: getattr(table, name) for name in ("title", "header", "rows", "left")}


# Histograms are whole numbers of this part of all scores: most of a page is histograms.
HISTOGRAM_UNIT = 1e-4
# A picture shows no more steps than this, and a page has one such map for each run.
MOST_STEPS = 60
_DETAILS = ("command", "hardware", "git_commit", "versions", "wall_time_s", "tokens_trained", "method_config", "config")


def run_data(record: ResultRecord, value: float | None) -> dict[str, Any]:
    """One run, and its value of the trade-off's metric: where it comes from, its routers, its layers over training."""
    return {
        "source": record.source,
        "seed": record.seed,
        "value": value,
        **{name: record[name] for name in _DETAILS},
        "routing": routing_data(record),
        "history": history_data(record),
    }


def routing_data(record: ResultRecord) -> dict[str, Any] | None:
    """What was measured of the routers; `None` where the record has no active fractions.

    Returns:
        `active_fraction` [L]; `threshold`; where they were measured `histogram` [L, B] in units of `HISTOGRAM_UNIT`,
        and `experts`, `dead` (no token uses them) and `always_on` (every token does), [L] each, else `None`.
    """
    measurement = record.measurement if isinstance(record.measurement, Mapping) else {}
    active, histogram = (_numbers(measurement.get(name)) for name in ("active_fraction", "score_histogram"))
    if active.ndim != 1 or not active.size:
        return None
    use = measurement.get("expert_use") or []
    found: dict[str, Any] = json_ready(
        {
            "active_fraction": active.round(4),
            "threshold": measurement.get("threshold"),
            "tokens": measurement.get("tokens"),
            "histogram": np.nan_to_num(histogram / HISTOGRAM_UNIT).round().astype(int) if histogram.ndim == 2 else None,
            "experts": [len(layer) for layer in use] or None,
            "dead": [sum(share == 0 for share in layer) for layer in use] or None,
            "always_on": [sum(share == 1 for share in layer) for layer in use] or None,
        }
    )
    return found


def history_data(record: ResultRecord) -> dict[str, Any] | None:
    """Active fractions over training, at `MOST_STEPS` evenly spaced steps at most; `None` where there are none.

    Returns:
        `step` [S], `active_fraction` [S, L].
    """
    history = record.layer_history if isinstance(record.layer_history, Mapping) else {}
    steps, shares = (_numbers(history.get(name)) for name in ("step", "active_fraction"))
    if shares.ndim != 2 or steps.shape != shares.shape[:1]:
        return None
    # The first, the last, and evenly spaced ones between.
    kept = np.unique(np.linspace(0, len(steps) - 1, MOST_STEPS).round().astype(int))
    found: dict[str, Any] = json_ready({"step": steps[kept], "active_fraction": shares[kept].round(3)})
    return found


def _numbers(value: Any) -> np.ndarray:
    """Lists of numbers, not a number where one is not known; empty where it is another thing."""
    try:
        return np.array([] if value is None else value, dtype=float)
    except (TypeError, ValueError):
        return np.array([])
