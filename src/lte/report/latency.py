"""Figures of `lte bench`: latency against sparsity with the bandwidth line, and prefill against the prompt's length.

Drawn from result rows alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator, PercentFormatter

from lte.report.canvas import BLACK, BLUE, GREEN, GREY, ORANGE, PINK, SKY, YELLOW, new_figure, plain_axes

Row = dict[str, Any]
_OURS = ((BLUE, "o"), (GREEN, "s"))
_OTHERS = ((PINK, "^"), (YELLOW, "v"))
_DENSE = ((ORANGE, "-"), (ORANGE, "--"), (ORANGE, ":"), (YELLOW, "-."))
_SETTINGS = (BLUE, GREEN, SKY, PINK, YELLOW, BLACK)
_TITLES = {"ffn": "FFN", "decode": "decoding step", "prefill": "prefill"}

# Eager and compiled steps are too far apart for one.
MOST_ON_A_LINEAR_AXIS = 8


def latency_figure(rows: Sequence[Row]) -> Figure:
    """A panel for each batch of the benchmarks `ffn` and `decode`, and one for prefill.

    In the panels of a batch: median latency against the measured sparsity, bars from the 20th to the 80th percentile;
    dense providers as horizontal lines; in black the time that the bytes of each sparsity need at the measured copy
    bandwidth. In that of prefill: latency over that of the fastest dense provider against the prompt's length.

    Raises:
        ValueError: if there are no rows.
    """
    if not rows:
        raise ValueError("rows must hold at least one result, got none")
    keys = _distinct((row["benchmark"], row["batch"]) for row in rows if row["benchmark"] != "prefill")
    prefill = [row for row in rows if row["benchmark"] == "prefill"]
    count = len(keys) + bool(prefill)
    columns = min(3, count)
    lines = -(-count // columns)
    figure, grid = new_figure(5 * columns, 4.2 * lines, lines, columns, squeeze=False)
    axes = list(grid.flat)
    for axis, (benchmark, batch) in zip(axes, keys, strict=False):
        found = [row for row in rows if (row["benchmark"], row["batch"]) == (benchmark, batch)]
        _draw_sparsities(axis, found)
        axis.set_title(f"{_TITLES[benchmark]}, batch {batch}", fontsize=11)
    if prefill:
        _draw_lengths(axes[len(keys)], prefill)
    for axis in axes[count:]:
        axis.remove()
    first = rows[0]
    figure.suptitle(f"{first.get('model', 'model')}, {first['dtype']}, {first['hardware']}", fontsize=12)
    return figure


def _draw_sparsities(axis: Axes, rows: Sequence[Row]) -> None:
    dense = [row for row in rows if row.get("setting") is None]
    for row, (colour, dash) in zip(dense, _DENSE, strict=False):
        label = f"{row['provider']}: {row['median_ms']:.3g} ms"
        axis.axhline(row["median_ms"], color=colour, linestyle=dash, linewidth=1.4, label=label)
    names = _distinct(row["provider"] for row in rows if row.get("setting") is not None)
    ours = [name for name in names if name.startswith("lte")]
    others = [name for name in names if name not in ours]
    for name, (colour, marker) in [*zip(ours, _OURS, strict=False), *zip(others, _OTHERS, strict=False)]:
        _draw_provider(axis, sorted((r for r in rows if r["provider"] == name), key=_sparsity), colour, marker)
    if ours:
        line = sorted((row for row in rows if row["provider"] == ours[-1]), key=_sparsity)
        times = [row["bandwidth_ms"] for row in line]
        label = "bytes at the copy bandwidth"
        axis.plot([_sparsity(row) for row in line], times, "--", color=BLACK, linewidth=1.2, label=label)
    axis.set(xlabel="FFN sparsity", ylabel="latency (ms)", xlim=(-0.02, 1.02))
    slowest, fastest = max(row["median_ms"] for row in rows), min(row["median_ms"] for row in rows)
    if slowest > MOST_ON_A_LINEAR_AXIS * fastest:
        axis.set_yscale("log")
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axis.yaxis.set_minor_locator(NullLocator())
    else:
        axis.set_ylim(0, 1.1 * slowest)
    axis.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axis.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2, frameon=False)
    plain_axes(axis)


def _draw_provider(axis: Axes, rows: Sequence[Row], colour: str, marker: str) -> None:
    x, y = [_sparsity(row) for row in rows], [row["median_ms"] for row in rows]
    low = [row["median_ms"] - row["p20_ms"] for row in rows]
    high = [row["p80_ms"] - row["median_ms"] for row in rows]
    axis.errorbar(
        x, y, yerr=(low, high), color=colour, marker=marker, markersize=4, linewidth=1.6, label=rows[0]["provider"]
    )
    for row in rows:
        if row["setting"] == "own":
            axis.annotate("own routing", (_sparsity(row), row["median_ms"]), fontsize=7, color=colour)


def _draw_lengths(axis: Axes, rows: Sequence[Row]) -> None:
    ours = [row for row in rows if row["provider"].startswith("lte")]
    for setting, colour in zip(_distinct(row["setting"] for row in ours), _SETTINGS, strict=False):
        line = sorted((row for row in ours if row["setting"] == setting), key=lambda row: row["tokens"])
        label = "own routing" if setting == "own" else f"sparsity {100 * float(setting):g}%"
        ratios = [row["ratio_to_dense"] or float("nan") for row in line]
        axis.plot([row["tokens"] for row in line], ratios, "o-", color=colour, markersize=4, label=label)
    axis.axhline(1.0, color=GREY, linewidth=1.0, linestyle="--")
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.set(xlabel="tokens", ylabel="latency over the fastest dense")
    axis.set_ylim(0, 1.2 * max(1.0, *(row["ratio_to_dense"] or 0.0 for row in ours)))
    axis.set_title(f"prefill, {'whole model' if rows[0].get('scope') == 'model' else 'FFN'}", fontsize=11)
    axis.legend(fontsize=7)
    plain_axes(axis)


def _sparsity(row: Row) -> float:
    return row["sparsity"]


def _distinct(values: Iterable[Any]) -> list[Any]:
    return list(dict.fromkeys(values))
