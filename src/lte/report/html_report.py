"""The comparison of methods as one web page, which needs nothing but a browser."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lte.eval.results import write_text_atomic
from lte.report.inputs import Bench
from lte.report.page import read_asset, render_page
from lte.report.page_data import page_data
from lte.report.tradeoff import Comparison

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
    """The page for what `page_data` returned."""
    # The shell knows its own style alone; report.js adds this one.
    return render_page(TITLE, read_asset("report.html"), {**data, "style": read_asset("report.css")}, SCRIPTS)


def write_html_report(
    path: str | Path, comparisons: Sequence[Comparison], benches: Sequence[Bench] = (), limit: float | None = None
) -> Path:
    """Writes the page, so that a reader never sees half a file.

    Args:
        path: of the file; folders are made if missing.
        comparisons: from `compare_runs`; may be empty.
        benches: files of `lte bench`.
        limit: the drop for the table of fewest GFLOPs, as for `comparison_texts`.
    """
    path = Path(path)
    write_text_atomic(path, html_report(page_data(comparisons, benches, limit)))
    return path
