"""Tables of `lte bench` for the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.table import Table

Row = dict[str, Any]


def latency_table(rows: Sequence[Row], copy_gb_per_s: float) -> Table:
    """All result rows; a line between groups of the same benchmark, batch and number of tokens."""
    table = Table(
        title=f"{rows[0].get('model', 'model')}, {rows[0]['dtype']}, {rows[0]['hardware']}" if rows else "no rows",
        caption="x dense: over the fastest dense provider timed beside it; of copy: share of the "
        f"{copy_gb_per_s:.0f} GB/s at which this machine copies memory; FFN times are per layer",
        title_justify="left",
        caption_justify="left",
    )
    for name in ("benchmark", "batch", "tokens", "provider", "sparsity", "ms", "p20 - p80", "x dense"):
        table.add_column(name, justify="left" if name in ("benchmark", "provider") else "right", no_wrap=True)
    for name in ("MB", "GB/s", "of copy", "path", "time split"):
        table.add_column(
            name, justify="left" if name in ("path", "time split") else "right", no_wrap=name != "time split"
        )
    previous = None
    for row in rows:
        group = (row["benchmark"], row["batch"], row["tokens"])
        if previous not in (None, group):
            table.add_section()
        previous = group
        table.add_row(*_cells(row))
    return table


def _cells(row: Row) -> list[str]:
    ratio, phases = row.get("ratio_to_dense"), row.get("phase_ms") or {}
    dense = row.get("setting") is None
    own = " own" if row.get("setting") == "own" else ""
    return [
        row["benchmark"],
        str(row["batch"]),
        str(row["tokens"]),
        row["provider"],
        "-" if dense else f"{100 * row['sparsity']:.1f}%{own}",
        f"{row['median_ms']:.4f}",
        f"{row['p20_ms']:.4f} - {row['p80_ms']:.4f}",
        "" if ratio is None else f"{ratio:.3f}",
        f"{row['bytes'] / 1e6:.1f}",
        f"{row['gb_per_s']:.0f}",
        f"{100 * row['share_of_copy']:.0f}%",
        row.get("path") or "",
        ", ".join(f"{name} {time:.4f}" for name, time in phases.items()),
    ]


def union_report(rows: Sequence[dict[str, Any]]) -> Table:
    """The share of experts that a batch needs, beside that of independent tokens."""
    table = Table(title="Experts that at least one of a batch's tokens needs", title_justify="left")
    for name in ("batch", "union", "if independent", "union sparsity"):
        table.add_column(name, justify="right")
    for row in rows:
        shares = (row["union"], row["independent"], 1 - row["union"])
        table.add_row(str(row["batch"]), *(f"{100 * share:.1f}%" for share in shares))
    return table


def break_even_report(rows: Sequence[dict[str, Any]]) -> Table:
    """The batch from which the sparse path is not faster than the fastest dense provider."""
    table = Table(title="Break-even batch", title_justify="left")
    for name in ("benchmark", "sparsity", "latency over dense by batch", "break-even"):
        table.add_column(name, justify="right" if name == "sparsity" else "left")
    for row in rows:
        setting = row["setting"] if row["setting"] == "own" else f"{100 * float(row['setting']):g}%"
        pairs = zip(row["batches"], row["ratios"], strict=True)
        found = row["break_even"]
        last = f"none up to {row['batches'][-1]}" if found is None else str(found)
        table.add_row(row["benchmark"], setting, ", ".join(f"{b}: {ratio:.3f}" for b, ratio in pairs), last)
    return table
