"""Everything that the page of a report shows, as one JSON-ready dict; `assets/report.js` draws it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from lte import __version__
from lte.report.bench_data import bench_data
from lte.report.comparison_report import comparison_texts
from lte.report.comparison_tables import TextTable, csv_rows, point_name, results_table
from lte.report.curve_places import curve_places
from lte.report.inputs import Bench
from lte.report.paper import paper_markers, paper_numbers, visible_markers
from lte.report.records import Run
from lte.report.run_data import HISTOGRAM_UNIT, run_data
from lte.report.tradeoff import DENSE, Comparison, Point, Statistic, value_of

QUANTITIES = ("value", "sparsity", "weight_sparsity", "gflops", "megabytes", "latency_ms", "latency_ratio")


def page_data(
    comparisons: Sequence[Comparison], benches: Sequence[Bench] = (), limit: float | None = None
) -> dict[str, Any]:
    """The data of the page; a number that is not known, or not finite, is `None`.

    Args:
        comparisons: from `compare_runs`; may be empty.
        benches: files of `lte bench`.
        limit: the drop for the table of fewest GFLOPs, as for `comparison_texts`.
    """
    names = [name for comparison in comparisons for name in comparison.curves]
    names += [marker.method for comparison in comparisons for marker in paper_markers(comparison)]
    measured = [bench_data(bench) for bench in benches]
    names += [row["provider"] for each in measured for group in each["latency"] for row in group["rows"]]
    data = {
        "version": __version__,
        "places": curve_places(names),
        "histogram_unit": HISTOGRAM_UNIT,
        "paper": paper_numbers()["source"],
        "comparisons": [comparison_data(comparison, limit) for comparison in comparisons],
        "benches": measured,
    }
    return _finite(data)


def comparison_data(comparison: Comparison, limit: float | None = None) -> dict[str, Any]:
    """One comparison: its points with their runs, the paper's points, the tables, and what sentences say of it."""
    parts = comparison_texts(comparison, limit)
    tables = [part for part in parts if isinstance(part, TextTable)]
    markers, visible = paper_markers(comparison), visible_markers(comparison)
    metric = comparison.metric
    return {
        "title": f"{comparison.title}, {metric.name}",
        "task": comparison.task,
        "model": comparison.model,
        "metric": {"name": metric.name, "higher_is_better": metric.higher_is_better, "decimals": metric.decimals},
        "points": [_point(comparison, point) for point in comparison.points()],
        "failed": [_failed(run) for run in comparison.failed],
        "paper": [asdict(marker) for marker in visible],
        "paper_left_out": len(markers) - len(visible),
        "sentences": [part for part in parts if isinstance(part, str)],
        "results": _table(results_table(comparison)),
        "tables": [_table(table) for table in tables if table.title != comparison.title],
        "csv": csv_rows(comparison),
    }


def _point(comparison: Comparison, point: Point) -> dict[str, Any]:
    return {
        "curve": point.curve,
        "name": point_name(point),
        "method": point.method,
        "target": point.target,
        "is_dense": point.method == DENSE,
        "is_reference": point is comparison.reference,
        "drop": comparison.drop(point),
        **{name: _statistic(getattr(point, name)) for name in QUANTITIES},
        "runs": [run_data(run, value_of(run.record, comparison.metric.name)) for run in point.runs],
    }


def _failed(run: Run) -> dict[str, Any]:
    record = run.record
    why = record.get("failure") or "the value is not finite"
    return {"name": record.get("label") or record["method"], "why": why, **run_data(run, None)}


def _statistic(found: Statistic | None) -> dict[str, Any] | None:
    return None if found is None else asdict(found)


def _table(table: TextTable) -> dict[str, Any]:
    return {
        "title": table.title,
        "header": list(table.header),
        "rows": [list(row) for row in table.rows],
        "left": table.left,
    }


def _finite(data: Any) -> Any:
    """JSON as it is, but for numbers that JSON does not have, which are not known."""
    if isinstance(data, Mapping):
        return {str(name): _finite(value) for name, value in data.items()}
    if isinstance(data, list | tuple):
        return [_finite(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data
