"""Figures of one model: the health of its routers, and the curves of its training.

Drawn from measurements and training logs alone; figures over many runs are in `lte.report.comparison`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, PercentFormatter

from lte.eval.sparsity import Measurement
from lte.report.canvas import (
    BLACK,
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PINK,
    SKY,
    YELLOW,
    new_figure,
    plain_axes,
    save_figure,
)
from lte.report.comparison import perplexity_vs_sparsity_figure

__all__ = [
    "perplexity_vs_sparsity_figure",
    "router_health_figure",
    "save_figure",
    "training_curves_figure",
]


def router_health_figure(measurement: Measurement, threshold: float | None = None) -> Figure:
    """How many experts each layer uses, beside the router scores of each layer.

    Left: the active fraction of each layer, and its shares of experts that no token or every token activates,
    where there are such. Right: the histogram of each layer's scores, with square-root colours so that small
    shares show; tau, the measurement's own unless `threshold` is given, is the dashed line.
    """
    threshold = measurement.threshold if threshold is None else threshold
    layers = len(measurement.active_fraction)
    height = min(9.0, 2.6 + 0.16 * layers)
    figure, (left, right) = new_figure(10, height, 1, 2, sharey=True, width_ratios=(1, 1.25))
    _draw_active_fractions(left, measurement)
    image = right.imshow(
        measurement.score_histogram,
        aspect="auto",
        interpolation="nearest",
        extent=(0, 1, layers - 0.5, -0.5),
        cmap="cividis",
        norm=PowerNorm(0.5, vmin=0),
    )
    right.axvline(threshold, color="white", linewidth=1.6, linestyle="--")
    right.set_xlabel(f"router score (active above tau = {threshold:g}, dashed)")
    right.set_title("Router scores", fontsize=11)
    right.tick_params(labelleft=False)
    bar = figure.colorbar(image, ax=right, label="share of the layer's scores")
    bar.ax.yaxis.set_major_formatter(lambda share, _: f"{100 * share:g}%")
    figure.suptitle(
        f"{100 * measurement.sparsity:.1f}% of the FFN neurons skipped, {measurement.tokens:,} tokens",
        fontsize=12,
    )
    figure.legend(loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    return figure


def _draw_active_fractions(axis: Axes, measurement: Measurement) -> None:
    layers = range(len(measurement.active_fraction))
    experts = [len(use) for use in measurement.expert_use]
    axis.barh(layers, measurement.active_fraction, color=SKY, height=0.8, label="active, mean over tokens")
    mean = 1 - measurement.sparsity
    axis.axvline(mean, color=BLUE, linestyle="--", linewidth=1.4, label=f"active, all layers: {100 * mean:.1f}%")
    for counts, colour, marker, text in (
        (measurement.dead_experts, ORANGE, "X", "never active"),
        (measurement.always_on_experts, BLACK, "o", "always active"),
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
    plain_axes(axis)


def training_curves_figure(log_history: Sequence[dict[str, Any]]) -> Figure:
    """Task loss, KL, active fraction against its target, router losses, and eta, over the steps of both stages.

    A curve that is zero throughout was not part of the training and gets no panel.

    Args:
        log_history: Trainer's log entries, each with its `stage`; the steps of stage 2 go on from stage 1.

    Without any logged loss, after a training shorter than `logging_steps`, the figure says so.
    """
    entries = [entry for entry in log_history if "task_loss" in entry]
    if not entries:
        return _empty_figure("no loss was logged; for curves lower logging_steps")
    # The last entry of a stage, its run time, holds the number of its steps.
    offset = max((entry["step"] for entry in log_history if entry.get("stage", 1) == 1), default=0)
    steps = [entry["step"] + (offset if entry.get("stage", 1) == 2 else 0) for entry in entries]
    curves = {name: _curve(entries, steps, name) for name in _CURVES}
    if curves["active_fraction"]:
        curves["target"] = [(step, 1 - value) for step, value in curves["target_sparsity"]]
    panels = {
        label: drawn
        for label, names in _PANELS
        if (drawn := {name: curves[name] for name in names if name == "task_loss" or _any(curves, name)})
    }
    columns = min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure, grid = new_figure(4 * columns, 3 * rows, rows, columns, squeeze=False)
    stages = {entry.get("stage", 1) for entry in entries}
    for axis, (label, drawn) in zip(grid.flat, panels.items(), strict=False):
        _draw_panel(axis, label, drawn)
        _mark_stages(axis, offset, max(steps), stages)
    for axis in grid.flat[len(panels) :]:
        axis.remove()
    return figure


# Label of the axis and curves of each panel.
_PANELS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("task loss (nats per token)", ("task_loss",)),
    ("KL from the teacher (nats per token)", ("distillation_loss",)),
    ("share of experts, or of scores", ("active_fraction", "target", "near_threshold")),
    ("efficiency loss (Eq. 5)", ("efficiency_loss",)),
    ("separability loss (Eq. 6)", ("separability_loss",)),
    ("eta, weight of the efficiency loss", ("eta",)),
)
# Label, colour, and dash of each curve.
_CURVES: dict[str, tuple[str, str, str]] = {
    "task_loss": ("next token", BLUE, "-"),
    "distillation_loss": ("KL from the teacher", PINK, "-"),
    "active_fraction": ("active experts", BLUE, "-"),
    "target": ("target", BLACK, "--"),
    "target_sparsity": ("target sparsity", BLACK, "--"),
    "near_threshold": ("scores within 0.1 of tau", ORANGE, ":"),
    "efficiency_loss": ("efficiency", GREEN, "-"),
    "separability_loss": ("separability", ORANGE, "-"),
    "eta": ("eta", GREEN, "-"),
}


def _curve(entries: Sequence[dict[str, Any]], steps: Sequence[int], name: str) -> list[tuple[int, float]]:
    return [(s, entry[name]) for s, entry in zip(steps, entries, strict=True) if entry.get(name) is not None]


def _empty_figure(text: str) -> Figure:
    figure, axis = new_figure(4, 3)
    axis.set_axis_off()
    axis.text(0.5, 0.5, text, transform=axis.transAxes, ha="center", color=GREY, wrap=True)
    return figure


def _any(curves: dict[str, list[tuple[int, float]]], name: str) -> bool:
    return any(value for _, value in curves.get(name, ()))


def _draw_panel(axis: Axes, label: str, curves: dict[str, list[tuple[int, float]]]) -> None:
    for name, points in curves.items():
        text, colour, dash = _CURVES[name]
        x, y = zip(*points, strict=True)
        marker = "o" if len(points) < 15 else ""
        axis.plot(x, y, dash, color=colour, marker=marker, markersize=3, linewidth=1.6, label=text)
    axis.set(xlabel="optimiser step", ylabel=label)
    plain_axes(axis)
    if "active_fraction" in curves:
        axis.set_ylim(-0.02, 1.02)
        axis.yaxis.set_major_formatter(PercentFormatter(1.0))
    if "eta" in curves and all(value > 0 for _, value in curves["eta"]):
        axis.set_yscale("log")
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axis.yaxis.set_minor_formatter(NullFormatter())
    if len(curves) > 1:
        axis.legend(fontsize=8)


def _mark_stages(axis: Axes, boundary: int, last: int, stages: set[int]) -> None:
    """Shades stage 2 and names both stages at the top."""
    if stages != {1, 2}:
        return
    axis.set_xlim(0, 1.02 * last)
    axis.axvspan(boundary, 1.02 * last, color=YELLOW, alpha=0.1, linewidth=0)
    for x, text in ((boundary / 2, "stage 1"), ((boundary + last) / 2, "stage 2")):
        axis.text(x, 1.0, text, transform=axis.get_xaxis_transform(), ha="center", va="bottom", fontsize=8)
