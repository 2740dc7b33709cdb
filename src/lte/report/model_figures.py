"""Figures of one model: the health of its routers, the curves of its training, and its times in `lte bench`.

Drawn from measurements, training logs and result rows alone.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from itertools import cycle
from typing import Any

from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from lte.eval.sparsity import Measurement
from lte.report.bench import bench_title, setting_words
from lte.report.figures import GREY, logarithmic_values, new_figure
from lte.report.palette import RAMP, colour_names, light


def router_health_figure(measurement: Measurement) -> Figure:
    """How many experts each layer uses, beside the histogram of its router scores, with tau as a dashed line."""
    layers = len(measurement.active_fraction)
    height = min(9.0, 2.6 + 0.16 * layers)
    figure, (left, right) = new_figure(10, height, 1, 2, sharey=True, width_ratios=(1, 1.25))
    _draw_active_fractions(left, measurement)
    # Square-root colours let small shares show.
    look = {"cmap": "cividis_r", "norm": PowerNorm(0.5, vmin=0), "aspect": "auto", "interpolation": "nearest"}
    image = right.imshow(measurement.score_histogram, extent=(0, 1, layers - 0.5, -0.5), **look)
    right.axvline(measurement.threshold, color="white", linewidth=1.6, linestyle="--")
    right.set_xlabel(f"router score (active above tau = {measurement.threshold:g}, dashed)")
    right.grid(visible=False)
    right.set_title("Router scores", fontsize=11)
    right.tick_params(labelleft=False)
    bar = figure.colorbar(image, ax=right, label="share of the layer's scores")
    bar.ax.yaxis.set_major_formatter(lambda share, _: f"{100 * share:g}%")
    figure.suptitle(
        f"{measurement.sparsity:.1%} of the FFN neurons skipped, {measurement.tokens:,} tokens", fontsize=12
    )
    figure.legend(loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    return figure


def _draw_active_fractions(axis: Axes, measurement: Measurement) -> None:
    layers = range(len(measurement.active_fraction))
    experts = [len(use) for use in measurement.expert_use]
    mean, label = 1 - measurement.sparsity, "active, mean over tokens"
    axis.barh(layers, measurement.active_fraction, color=light("on"), alpha=0.6, height=0.8, label=label)
    label = f"active, all layers: {mean:.1%}"
    axis.axvline(mean, color=light("ink"), linestyle="--", linewidth=1.4, label=label)
    for counts, colour, marker, text in (
        (measurement.dead_experts, light("less"), "X", "never active"),
        (measurement.always_on_experts, light("ink"), "o", "always active"),
    ):
        # Layers without such experts get no marker: a column of zeros would hide the few that have some.
        found = [(n / e, layer) for n, e, layer in zip(counts, experts, layers, strict=True) if n]
        x, y = zip(*found, strict=True) if found else ((), ())
        label = f"{text}: {sum(counts)} of {sum(experts)} experts"
        axis.plot(x, y, marker, color=colour, markersize=5, markeredgewidth=0, label=label)
    axis.set(xlim=(0, 1.02), xlabel="share of the layer's experts", ylabel="layer")
    axis.set_title("Experts in use", fontsize=11)
    axis.xaxis.set_major_formatter(PercentFormatter(1.0))
    axis.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=12))


def training_curves_figure(log_history: Sequence[dict[str, Any]]) -> Figure:
    """Task loss, KL, active fraction against its target, router losses, and eta, over the steps of both stages.

    A curve that is zero throughout was not part of the training and gets no panel.

    Args:
        log_history: Trainer's log entries, each with its `stage`; the steps of stage 2 go on from stage 1.

    Without any logged loss, after a training shorter than `logging_steps`, the figure says so.
    """
    entries = [entry for entry in log_history if "task_loss" in entry]
    if not entries:
        figure, axis = new_figure(4, 3)
        axis.set_axis_off()
        text = "no loss was logged; for curves lower logging_steps"
        axis.text(0.5, 0.5, text, transform=axis.transAxes, ha="center", color=GREY, wrap=True)
        return figure
    # The last entry of a stage, its run time, holds the number of its steps.
    offset = max((entry["step"] for entry in log_history if entry.get("stage", 1) == 1), default=0)
    steps = [entry["step"] + (offset if entry.get("stage", 1) == 2 else 0) for entry in entries]

    def curve(name: str) -> list[tuple[int, float]]:
        if name == "target":
            return [(step, 1 - share) for step, share in curve("target_sparsity")] if curve("active_fraction") else []
        return [(step, entry[name]) for step, entry in zip(steps, entries, strict=True) if entry.get(name) is not None]

    curves = {name: curve(name) for names in _PANELS.values() for name in names}
    known = {name for name, points in curves.items() if name == "task_loss" or any(y for _, y in points)}
    panels = {label: known & set(names) for label, names in _PANELS.items() if known & set(names)}
    figure, axes = _panel_figure(len(panels), 4, 3)
    has_both_stages = {entry.get("stage", 1) for entry in entries} == {1, 2}
    for axis, (label, names) in zip(axes, panels.items(), strict=True):
        _draw_panel(axis, label, {name: curves[name] for name in _PANELS[label] if name in names})
        if has_both_stages:
            _mark_stages(axis, offset, max(steps))
    return figure


def _panel_figure(count: int, width: float, height: float) -> tuple[Figure, list[Axes]]:
    """A figure of that many panels, three in a row at most, each of so many inches."""
    columns = min(3, count)
    rows = math.ceil(count / columns)
    figure, grid = new_figure(width * columns, height * rows, rows, columns, squeeze=False)
    axes = list(grid.flat)
    for axis in axes[count:]:
        axis.remove()
    return figure, axes[:count]


# By the label of its axis the curves of each panel, with label, colour, and dash.
_PANELS = {
    "task loss (nats per token)": {"task_loss": ("next token", "lte", "-")},
    "KL from the teacher (nats per token)": {"distillation_loss": ("KL from the teacher", "second", "-")},
    "share of experts, or of scores": {
        "active_fraction": ("active experts", "on", "-"),
        "target": ("target", "ink", "--"),
        "near_threshold": ("scores within 0.1 of tau", "less", ":"),
    },
    "efficiency loss (Eq. 5)": {"efficiency_loss": ("efficiency", "on", "-")},
    "separability loss (Eq. 6)": {"separability_loss": ("separability", "less", "-")},
    "eta, weight of the efficiency loss": {"eta": ("eta", "second", "-")},
}


def _draw_panel(axis: Axes, label: str, curves: dict[str, list[tuple[int, float]]]) -> None:
    for name, points in curves.items():
        text, colour, dash = _PANELS[label][name]
        x, y = zip(*points, strict=True)
        marker = "o" if len(points) < 15 else ""
        axis.plot(x, y, dash, color=light(colour), marker=marker, markersize=3, linewidth=1.6, label=text)
    axis.set(xlabel="optimiser step", ylabel=label)
    if "active_fraction" in curves:
        axis.set_ylim(-0.02, 1.02)
        axis.yaxis.set_major_formatter(PercentFormatter(1.0))
    if "eta" in curves and all(value > 0 for _, value in curves["eta"]):
        logarithmic_values(axis)
    if len(curves) > 1:
        axis.legend(fontsize=8)


def _mark_stages(axis: Axes, boundary: int, last: int) -> None:
    """Shades stage 2 and names both stages at the top."""
    axis.set_xlim(0, 1.02 * last)
    axis.axvspan(boundary, 1.02 * last, color=light("second"), alpha=0.1, linewidth=0)
    for x, text in ((boundary / 2, "stage 1"), ((boundary + last) / 2, "stage 2")):
        axis.text(x, 1.0, text, transform=axis.get_xaxis_transform(), ha="center", va="bottom", fontsize=8)


Row = dict[str, Any]
_MARKERS, _DASHES = "osD^vP", ("-", "--", ":", "-.")
_TITLES = {"ffn": "FFN", "decode": "decoding step"}

# Eager and compiled steps are too far apart for one.
MOST_ON_A_LINEAR_AXIS = 8


def latency_figure(rows: Sequence[Row]) -> Figure:
    """A panel for each batch of the benchmarks `ffn` and `decode`, and one for prefill.

    Of a batch: median latency against the measured sparsity, bars from the 20th to the 80th percentile; dense providers
    are level; in black the time that reading the bytes takes. Of prefill: over the fastest dense, by prompt length.

    Raises:
        ValueError: if there are no rows.
    """
    if not rows:
        raise ValueError("rows must hold at least one result, got none")
    groups: dict[str, list[Row]] = defaultdict(list)
    for row in sorted(rows, key=lambda row: bool(row["benchmark"] == "prefill")):
        title = f"{_TITLES.get(row['benchmark'])}, batch {row['batch']}"
        if row["benchmark"] == "prefill":
            title = f"prefill, {'whole model' if row.get('scope') == 'model' else 'FFN'}"
        groups[title].append(row)
    figure, axes = _panel_figure(len(groups), 5, 4.2)
    for axis, (title, found) in zip(axes, groups.items(), strict=True):
        (_draw_lengths if title.startswith("prefill") else _draw_sparsities)(axis, found)
        axis.set_title(title, fontsize=11)
    figure.suptitle(bench_title(rows), fontsize=12)
    return figure


def _draw_sparsities(axis: Axes, rows: Sequence[Row]) -> None:
    dense = [row for row in rows if row.get("setting") is None]
    for row, dash in zip(dense, cycle(_DASHES), strict=False):
        label = f"{row['provider']}: {row['median_ms']:.3g} ms"
        axis.axhline(row["median_ms"], color=light("dense"), linestyle=dash, linewidth=1.4, label=label)
    lines = _lines((row for row in rows if row.get("setting") is not None), "provider", "sparsity")
    colours = colour_names(lines)
    for (name, line), marker in zip(lines.items(), cycle(_MARKERS), strict=False):
        _draw_provider(axis, line, light(colours[name]), marker)
    if ours := [line for name, line in lines.items() if name.startswith("lte")]:
        sparsities, times = [row["sparsity"] for row in ours[-1]], [row["bandwidth_ms"] for row in ours[-1]]
        axis.plot(sparsities, times, "--", color=light("ink"), linewidth=1.2, label="bytes at the copy bandwidth")
    axis.set(xlabel="FFN sparsity", ylabel="latency (ms)", xlim=(-0.02, 1.02))
    slowest, fastest = max(row["median_ms"] for row in rows), min(row["median_ms"] for row in rows)
    if slowest > MOST_ON_A_LINEAR_AXIS * fastest:
        logarithmic_values(axis)
    else:
        axis.set_ylim(0, 1.1 * slowest)
    axis.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axis.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2, frameon=False)


def _lines(rows: Iterable[Row], name: str, x: str) -> dict[str, list[Row]]:
    """The rows of each value of a field, by rising `x`."""
    found: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        found[row[name]].append(row)
    return {value: sorted(line, key=lambda row: row[x]) for value, line in found.items()}


def _draw_provider(axis: Axes, rows: Sequence[Row], colour: str, marker: str) -> None:
    x, y = [row["sparsity"] for row in rows], [row["median_ms"] for row in rows]
    bars = zip(*((row["median_ms"] - row["p20_ms"], row["p80_ms"] - row["median_ms"]) for row in rows), strict=True)
    look: dict[str, Any] = {"color": colour, "marker": marker, "markersize": 4, "linewidth": 1.6}
    axis.errorbar(x, y, yerr=[*bars], label=rows[0]["provider"], **look)
    for row in rows:
        if row["setting"].startswith("own"):
            axis.annotate("own routing", (row["sparsity"], row["median_ms"]), fontsize=7, color=colour)


def _draw_lengths(axis: Axes, rows: Sequence[Row]) -> None:
    ours = [row for row in rows if row["provider"].startswith("lte")]
    shades = cycle(day for day, _ in RAMP[4:])
    for (setting, line), colour in zip(_lines(ours, "setting", "tokens").items(), shades, strict=False):
        ratios, label = [row["ratio_to_dense"] or float("nan") for row in line], setting_words(setting)
        axis.plot([row["tokens"] for row in line], ratios, "o-", color=colour, markersize=4, label=label)
    axis.axhline(1.0, color=GREY, linewidth=1.0, linestyle="--")
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.set(xlabel="tokens", ylabel="latency over the fastest dense")
    axis.set_ylim(0, 1.2 * max(1.0, *(row["ratio_to_dense"] or 0.0 for row in ours)))
    axis.legend(fontsize=7)
