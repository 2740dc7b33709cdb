"""The comparison of methods as one web page, which needs nothing but a browser; `assets/report.js` draws its data.

Shapes: L layers, B bins of a histogram, S logged steps.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lte import __version__
from lte.files import json_ready, write_text_atomic
from lte.records import ResultRecord
from lte.report.bench import bench_data
from lte.report.curves import curve_places, field_value
from lte.report.inputs import Bench
from lte.report.methods_report import tradeoff_texts
from lte.report.page import read_asset, render_page
from lte.report.paper import paper_markers, paper_numbers, visible_markers
from lte.report.points import DENSE, Point, Tradeoff, value_of
from lte.report.tables import QUANTITIES, TextTable, csv_rows, failure_text, point_name, results_table

SCRIPTS = (
    "report_looks.js",
    "report_tables.js",
    "report_details.js",
    "report_tradeoff.js",
    "report_layers.js",
    "report_routers.js",
    "report_bench.js",
    "report.js",
)
TITLE = "What skipping neurons costs and saves"


def html_report(data: dict[str, Any]) -> str:
    """The page for what `report_data` returned."""
    # The shell knows its own style alone; report.js adds this one.
    return render_page(TITLE, read_asset("report.html"), {**data, "style": read_asset("report.css")}, SCRIPTS)


def write_html_report(
    path: str | Path, tradeoffs: Sequence[Tradeoff], benches: Sequence[Bench] = (), limit: float | None = None
) -> Path:
    """Writes the page, so that a reader never sees half a file.

    Args:
        path: of the file; folders are made if missing.
        tradeoffs: from `find_tradeoffs`; may be empty.
        benches: files of `lte bench`.
        limit: the drop for the table of fewest GFLOPs, as for `tradeoff_texts`.
    """
    write_text_atomic(path, html_report(report_data(tradeoffs, benches, limit)))
    return Path(path)


def report_data(
    tradeoffs: Sequence[Tradeoff], benches: Sequence[Bench] = (), limit: float | None = None
) -> dict[str, Any]:
    """The data of the page; a number that is not known, or not finite, is `None`.

    Args:
        tradeoffs: from `find_tradeoffs`; may be empty.
        benches: files of `lte bench`.
        limit: the drop for the table of fewest GFLOPs, as for `tradeoff_texts`.
    """
    names = [name for tradeoff in tradeoffs for name in tradeoff.curves]
    names += [marker.method for tradeoff in tradeoffs for marker in paper_markers(tradeoff)]
    measured = [bench_data(bench) for bench in benches]
    names += [row["provider"] for each in measured for group in each["latency"] for row in group["rows"]]
    ready: dict[str, Any] = json_ready(
        {
            "version": __version__,
            "places": curve_places(names),
            "histogram_unit": HISTOGRAM_UNIT,
            "paper": paper_numbers()["source"],
            "comparisons": [tradeoff_data(tradeoff, limit) for tradeoff in tradeoffs],
            "benches": measured,
        }
    )
    return ready


def tradeoff_data(tradeoff: Tradeoff, limit: float | None = None) -> dict[str, Any]:
    """One trade-off: its points with their runs, the paper's points, the tables, and what sentences say of it."""
    parts = tradeoff_texts(tradeoff, limit)
    tables = [part for part in parts if isinstance(part, TextTable)]
    markers, visible = paper_markers(tradeoff), visible_markers(tradeoff)
    metric = tradeoff.metric
    return {
        "title": f"{tradeoff.title}, {metric.name}",
        "task": tradeoff.task,
        "model": tradeoff.model,
        "metric": {"name": metric.name, "higher_is_better": metric.higher_is_better, "decimals": metric.decimals},
        "points": [_point(tradeoff, point) for point in tradeoff.points()],
        "failed": [_failed(record) for record in tradeoff.failed],
        "paper": [asdict(marker) for marker in visible],
        "paper_left_out": len(markers) - len(visible),
        "sentences": [part for part in parts if isinstance(part, str)],
        "results": _table(results_table(tradeoff)),
        "tables": [_table(table) for table in tables if table.title != tradeoff.title],
        "csv": csv_rows(tradeoff),
    }


def _point(tradeoff: Tradeoff, point: Point) -> dict[str, Any]:
    return {
        "curve": point.curve,
        "name": point_name(point),
        "method": point.method,
        "target": point.target,
        "is_dense": point.method == DENSE,
        "is_reference": point is tradeoff.reference,
        "drop": tradeoff.drop(point),
        **{name: (found := getattr(point, name)) and asdict(found) for name in QUANTITIES},
        "runs": [run_data(record, value_of(record, tradeoff.metric.name)) for record in point.records],
    }


def _failed(record: ResultRecord) -> dict[str, Any]:
    return {"name": record.label or record.method, "why": failure_text(record), **run_data(record, None)}


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
        "eta": final_eta(record),
        "routing": routing_data(record),
        "history": history_data(record),
    }


def final_eta(record: ResultRecord) -> float | None:
    """The weight of the efficiency loss at the end of a run; `None` where the record does not say it.

    The record's own `eta`, else the one that its settings fix, else the last in its training log that is not 0: entries
    of frozen routers, and of a training without this loss, have 0.
    """
    logged = [entry.get("eta") for entry in _list(record.log) if isinstance(entry, Mapping)]
    for eta in (record.eta, field_value(record, "config.train.eta"), *filter(None, reversed(logged))):
        if _is_number(eta):
            return float(eta)
    return None


def routing_data(record: ResultRecord) -> dict[str, Any] | None:
    """What was measured of the routers; `None` where the record has no active fractions.

    Returns:
        `active_fraction` [L]; `threshold`; where they were measured `histogram` [L, B] in units of `HISTOGRAM_UNIT`,
        and `experts`, `dead` (no token uses them) and `always_on` (every token does), [L] each, else `None`.
    """
    measurement = record.measurement
    if not isinstance(measurement, Mapping) or not _list(measurement.get("active_fraction")):
        return None
    histogram, use = (_layers(measurement.get(name)) for name in ("score_histogram", "expert_use"))
    return {
        "active_fraction": [_rounded(share) for share in measurement["active_fraction"]],
        "threshold": measurement.get("threshold"),
        "tokens": measurement.get("tokens"),
        "histogram": [[_units(share) for share in layer] for layer in histogram] or None,
        "experts": [len(layer) for layer in use] or None,
        "dead": [sum(share == 0 for share in layer) for layer in use] or None,
        "always_on": [sum(share == 1 for share in layer) for layer in use] or None,
    }


def history_data(record: ResultRecord) -> dict[str, Any] | None:
    """Active fractions over training, at `MOST_STEPS` evenly spaced steps at most; `None` where there are none.

    Returns:
        `step` [S], `stage` [S], `active_fraction` [S, L].
    """
    history = record.layer_history
    if not isinstance(history, Mapping):
        return None
    steps, shares = _list(history.get("step")), _layers(history.get("active_fraction"))
    if not steps or len(steps) != len(shares):
        return None
    count = len(steps)
    # The first, the last, and evenly spaced ones between.
    kept = [round(place * (count - 1) / (MOST_STEPS - 1)) for place in range(MOST_STEPS)]
    kept = kept if count > MOST_STEPS else list(range(count))
    stages = _list(history.get("stage"))
    stages = stages if len(stages) == len(steps) else [None] * len(steps)
    return {
        "step": [steps[place] for place in kept],
        "stage": [stages[place] for place in kept],
        "active_fraction": [[_rounded(share, 3) for share in shares[place]] for place in kept],
    }


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _layers(value: Any) -> list[list[Any]]:
    """A list of lists; empty where it is another thing."""
    rows = _list(value)
    return rows if all(isinstance(row, list) and row for row in rows) else []


def _units(share: Any) -> int | None:
    return round(share / HISTOGRAM_UNIT) if _is_number(share) else None


def _rounded(share: Any, digits: int = 4) -> float | None:
    return round(share, digits) if _is_number(share) else None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
