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
_WIDTH = 10


def histogram_text(shares: Sequence[float]) -> str:
    """A histogram [K] as 10 characters: `·` for an empty bin, the highest bar full.

    Bars grow with the square root of the share, so that small bins show beside large ones.
    """
    size = len(shares) / _WIDTH
    merged = [sum(shares[round(i * size) : round((i + 1) * size)]) for i in range(_WIDTH)]
    peak = max(merged) or 1.0
    return "".join(
        _BARS[max(0, math.ceil(len(_BARS) * math.sqrt(share / peak)) - 1)] if share > 0 else _EMPTY for share in merged
    )


def router_health_rows(measurement: Measurement) -> list[tuple[str, ...]]:
    """A row of text per layer and one for all together, in the order of `HEALTH_COLUMNS`."""
    layers, experts = len(measurement.active_fraction), [len(use) for use in measurement.expert_use]
    fields = ("active_fraction", "dead_experts", "always_on_experts", "near_threshold", "score_histogram")
    columns = zip(map(str, range(layers)), *(getattr(measurement, name) for name in fields), experts, strict=True)
    near_all = sum(measurement.near_threshold) / layers
    scores_all = [sum(shares) / layers for shares in zip(*measurement.score_histogram, strict=True)]
    counts = sum(measurement.dead_experts), sum(measurement.always_on_experts)
    totals = ("all", 1 - measurement.sparsity, *counts, near_all, scores_all, sum(experts))
    return [
        (name, f"{100 * active:.1f}%", f"{dead}/{n}", f"{on}/{n}", f"{100 * near:.1f}%", histogram_text(scores))
        for name, active, dead, on, near, scores, n in (*columns, totals)
    ]


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
    *layers, total = router_health_rows(measurement)
    for row, dead in zip(layers, measurement.dead_experts, strict=True):
        table.add_row(*row[:2], Text(row[2], "red" if dead else ""), *row[3:])
    table.add_section()
    table.add_row(*total)
    return table


def router_health_markdown(measurement: Measurement) -> str:
    """The router health of a model as a Markdown table, a row per layer and one for all."""
    return markdown_table(HEALTH_COLUMNS, router_health_rows(measurement), numbers=HEALTH_COLUMNS[:-1])
