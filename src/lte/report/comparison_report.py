"""The comparison of methods as a folder: Markdown, CSV, and a figure for each task."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Sequence
from pathlib import Path

from lte.eval.results import write_text_atomic
from lte.report.comparison_tables import (
    TextTable,
    cheapest_table,
    commands_table,
    csv_rows,
    envelope_table,
    failed_table,
    latency_texts,
    paper_table,
    question_texts,
    reference_text,
    results_table,
)
from lte.report.envelope import envelope_sentences, lte_standings
from lte.report.paper import paper_numbers
from lte.report.tradeoff import Comparison

_LEGEND = """\
Means over seeds, ± one standard deviation of a sample; `-` is a number that the records do not have. Drop: how much
worse than the reference, negative where better. FLOPs and bytes: of the block linears per token at batch size 1,
routers and predictors included, as shares of the reference's. Latency: median decoding step, as a share of that of the
dense model timed beside it. GFLOPs: 1 G = 2^30. Tokens: of the training. `report.csv` holds all numbers unrounded."""


def comparison_texts(comparison: Comparison, limit: float | None = None) -> list[str | TextTable]:
    """All tables and sentences of a comparison, in their order.

    Args:
        comparison: what they are of.
        limit: the drop for the table of fewest GFLOPs; `None` takes the metric's own.
    """
    standings = lte_standings(comparison)
    parts: list[str | TextTable | None] = [failed_table(comparison)]
    if comparison.points():
        allowed = comparison.metric.small_drop if limit is None else limit
        texts = [reference_text(comparison), *latency_texts(comparison), *question_texts(comparison)]
        parts = [results_table(comparison), *texts, *parts]
        parts.append(cheapest_table(comparison, allowed))
        parts += envelope_sentences(comparison, standings)
        parts += [envelope_table(comparison, standings) if standings else None, paper_table(comparison, limit)]
    return [part for part in parts if part is not None]


def write_comparison_report(
    folder: str | Path, comparisons: Sequence[Comparison], limit: float | None = None
) -> list[Path]:
    """Writes `report.csv`, a figure for each comparison, and `report.md`, which is written last.

    Args:
        folder: where to; made if missing.
        comparisons: at least one.
        limit: as for `comparison_texts`.

    Returns:
        The files.

    Raises:
        ValueError: if there is no comparison.
    """
    from lte.report.canvas import save_figure  # matplotlib is slow to load
    from lte.report.comparison import curve_styles, tradeoff_figure

    if not comparisons:
        raise ValueError("comparisons must hold at least one, got none")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    styles = curve_styles(name for comparison in comparisons for name in comparison.curves)
    files, parts = [folder / "report.csv"], ["# Methods compared", _LEGEND]
    write_text_atomic(files[0], _csv_text(comparisons))
    for comparison in comparisons:
        parts += [f"## {comparison.title}, {comparison.metric.name}"]
        if comparison.points():
            files.append(folder / f"{_file_name(comparison, comparisons)}.png")
            save_figure(tradeoff_figure(comparison, styles), files[-1])
            parts.append(f"![{comparison.metric.name} against sparsity, GFLOPs, bytes and latency]({files[-1].name})")
        parts += _markdown(comparison, limit)
    files.append(folder / "report.md")
    write_text_atomic(files[-1], "\n\n".join(parts) + "\n")
    return files


def _markdown(comparison: Comparison, limit: float | None) -> list[str]:
    parts = []
    for part in [*comparison_texts(comparison, limit), commands_table(comparison)]:
        if isinstance(part, TextTable):
            heading = [] if part.title == comparison.title else [f"### {part.title}"]
            parts += [*heading, part.markdown()]
        elif part is not None:
            parts.append(part)
    if paper_table(comparison, limit) is not None:
        parts.append(f"The paper: {paper_numbers()['source']}.")
    return parts


def _csv_text(comparisons: Sequence[Comparison]) -> str:
    rows = [row for comparison in comparisons for row in csv_rows(comparison)]
    text = io.StringIO()
    if rows:
        writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return text.getvalue()


def _file_name(comparison: Comparison, comparisons: Sequence[Comparison]) -> str:
    """Task, split and metric, and the model where there are several."""
    names = [comparison.task, comparison.split, comparison.metric.name]
    if len({each.model for each in comparisons}) > 1:
        names.insert(0, comparison.model)
    return re.sub(r"[^A-Za-z0-9.]+", "-", "-".join(dict.fromkeys(names))).strip("-")
