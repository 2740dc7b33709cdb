"""The tradeoff of methods as a folder: Markdown, CSV, and a figure for each task."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from lte.bench.rows import csv_text
from lte.files import write_text_atomic
from lte.report.envelope import lte_standings
from lte.report.overview import goal, overview
from lte.report.paper import paper_numbers
from lte.report.points import Tradeoff
from lte.report.tables import (
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

_LEGEND = """\
Means over seeds, ± one standard deviation of a sample; `-` is a number that the records do not have. Drop: how much
worse than the reference, negative where better. FLOPs and bytes: of the block linears per token at batch size 1,
routers and predictors included, as shares of the reference's. Latency: median decoding step, as a share of that of the
dense model timed beside it. GFLOPs: 1 G = 2^30. Tokens: of the training. `report.csv` holds all numbers unrounded."""


def tradeoff_texts(tradeoff: Tradeoff, limit: float | None = None) -> list[str | TextTable]:
    """All tables and sentences of a trade-off, in their order.

    Args:
        tradeoff: what they are of.
        limit: the drop for the table of fewest GFLOPs; `None` takes the metric's own.
    """
    failed, standings = failed_table(tradeoff), lte_standings(tradeoff)
    parts: list[str | TextTable | None] = [failed]
    if tradeoff.points():
        texts = [reference_text(tradeoff), *latency_texts(tradeoff), *question_texts(tradeoff)]
        parts = [results_table(tradeoff), *texts, failed, cheapest_table(tradeoff, goal(tradeoff, limit))]
        parts += [overview([tradeoff], limit)["sentence"], envelope_table(tradeoff, standings) if standings else None]
        parts.append(paper_table(tradeoff, limit))
    return [part for part in parts if part is not None]


def write_methods_report(folder: str | Path, tradeoffs: Sequence[Tradeoff], limit: float | None = None) -> list[Path]:
    """Writes `report.csv`, a figure for each tradeoff, and `report.md`, which is written last.

    Args:
        folder: where to; made if missing.
        tradeoffs: at least one.
        limit: as for `tradeoff_texts`.

    Returns:
        The files.

    Raises:
        ValueError: if there is no tradeoff.
    """
    from lte.report.figures import save_figure, tradeoff_figure  # matplotlib is slow to load

    if not tradeoffs:
        raise ValueError("tradeoffs must hold at least one, got none")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    files, parts = [folder / "report.csv"], ["# Methods compared", _LEGEND]
    rows = [row for tradeoff in tradeoffs for row in csv_rows(tradeoff)]
    write_text_atomic(files[0], csv_text(rows, tuple(rows[0])) if rows else "")
    for tradeoff in tradeoffs:
        parts += [f"## {tradeoff.title}, {tradeoff.metric.name}"]
        if tradeoff.points():
            files.append(folder / f"{_file_name(tradeoff, tradeoffs)}.png")
            save_figure(tradeoff_figure(tradeoff, limit), files[-1])
            parts.append(f"![{tradeoff.metric.name} lost against the share of bytes that is read]({files[-1].name})")
        parts += _markdown(tradeoff, limit)
    files.append(folder / "report.md")
    write_text_atomic(files[-1], "\n\n".join(parts) + "\n")
    return files


def _markdown(tradeoff: Tradeoff, limit: float | None) -> list[str]:
    parts = []
    for part in [*tradeoff_texts(tradeoff, limit), commands_table(tradeoff)]:
        if isinstance(part, TextTable):
            heading = [] if part.title == tradeoff.title else [f"### {part.title}"]
            parts += [*heading, part.markdown()]
        elif part is not None:
            parts.append(part)
    if paper_table(tradeoff, limit) is not None:
        parts.append(f"The paper: {paper_numbers()['source']}.")
    return parts


def _file_name(tradeoff: Tradeoff, tradeoffs: Sequence[Tradeoff]) -> str:
    """Task, split and metric, and the model where there are several."""
    names = [tradeoff.task, tradeoff.split, tradeoff.metric.name]
    if len({each.model for each in tradeoffs}) > 1:
        names.insert(0, tradeoff.model)
    return re.sub(r"[^A-Za-z0-9.]+", "-", "-".join(dict.fromkeys(names))).strip("-")
