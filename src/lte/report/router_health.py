"""The health of a model's routers as tables, for the terminal and for Markdown files.

Shapes: L layers, E experts, K histogram bins.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from rich.table import Table
from rich.text import Text

from lte.eval.sparsity import Measurement
from lte.report.tables import markdown_table

HEALTH_COLUMNS = ("layer", "active", "dead", "always on", "near tau", "scores 0 to 1")
_BARS = "▁▂▃▄▅▆▇█"
_EMPTY = "·"


def histogram_text(shares: Sequence[float], width: int = 10) -> str:
    """A histogram [K] as `width` characters: `·` for an empty bin, the highest bar full.

    Bars grow with the square root of the share, so that small bins show beside large ones.

    Raises:
        ValueError: if `width` does not lie in [1, K].
    """
    if not 1 <= width <= len(shares):
        raise ValueError(f"width must lie in [1, {len(shares)}], the number of bins, got width={width}")
    size = len(shares) / width
    merged = [sum(shares[round(i * size) : round((i + 1) * size)]) for i in range(width)]
    peak = max(merged) or 1.0
    return "".join(
        _BARS[max(0, math.ceil(len(_BARS) * math.sqrt(share / peak)) - 1)] if share > 0 else _EMPTY for share in merged
    )


def router_health_rows(measurement: Measurement) -> list[tuple[str, ...]]:
    """One row of text per layer, in the order of `HEALTH_COLUMNS`."""
    columns = zip(
        measurement.active_fraction,
        measurement.dead_experts,
        measurement.always_on_experts,
        measurement.near_threshold,
        measurement.score_histogram,
        measurement.expert_use,
        strict=True,
    )
    return [
        _health_row(str(layer), active, dead, always_on, near, scores, len(use))
        for layer, (active, dead, always_on, near, scores, use) in enumerate(columns)
    ]


def router_health_totals(measurement: Measurement) -> tuple[str, ...]:
    """The row of text for all layers together, in the order of `HEALTH_COLUMNS`."""
    layers = len(measurement.active_fraction)
    experts = sum(len(use) for use in measurement.expert_use)
    counts = sum(measurement.dead_experts), sum(measurement.always_on_experts)
    histogram = [sum(shares) / layers for shares in zip(*measurement.score_histogram, strict=True)]
    near = sum(measurement.near_threshold) / layers
    return _health_row("all", 1 - measurement.sparsity, *counts, near, histogram, experts)


def _health_row(
    name: str, active: float, dead: int, always_on: int, near: float, scores: Sequence[float], experts: int
) -> tuple[str, ...]:
    shares = f"{100 * active:.1f}%", f"{dead}/{experts}", f"{always_on}/{experts}", f"{100 * near:.1f}%"
    return (name, *shares, histogram_text(scores))


def router_health_table(measurement: Measurement) -> Table:
    """The router health of a model for the terminal, a row per layer and one for all.

    Counts of dead experts are red where there are any.
    """
    table = Table(
        title=f"Router health: {100 * measurement.sparsity:.2f}% of the FFN neurons skipped, "
        f"{measurement.tokens} tokens",
        title_justify="left",
        caption=f"tau = {measurement.threshold:g}; near: within 0.1 of it; bars: square roots",
        caption_justify="left",
    )
    for name in HEALTH_COLUMNS:
        table.add_column(name, justify="left" if name.startswith("scores") else "right", no_wrap=True)
    for row, dead in zip(router_health_rows(measurement), measurement.dead_experts, strict=True):
        styles = ["", "", "red" if dead else "", "", "", ""]
        table.add_row(*(Text(cell, style) for cell, style in zip(row, styles, strict=True)))
    table.add_section()
    table.add_row(*router_health_totals(measurement))
    return table


def router_health_markdown(measurement: Measurement) -> str:
    """The router health of a model as a Markdown table, a row per layer and one for all."""
    rows = [*router_health_rows(measurement), router_health_totals(measurement)]
    return markdown_table(HEALTH_COLUMNS, rows, numbers=HEALTH_COLUMNS[:-1])
