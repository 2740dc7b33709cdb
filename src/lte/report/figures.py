"""The figure of a trade-off, and what all figures share: size and resolution, plain axes, and saving.

Figures are made without pyplot, so that importing lte leaves a notebook's backend as it is. Colours are those of
`lte.report.palette`, in its light theme.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator, PercentFormatter

from lte.files import replaced_atomically
from lte.report.overview import goal, main_curves, pareto_front, rivals
from lte.report.palette import colour_names, light
from lte.report.points import OURS, Point, Statistic, Tradeoff

GREY = light("quiet")
DPI = 150


def new_figure(width: float, height: float, rows: int = 1, columns: int = 1, **options: Any) -> Any:
    """A figure of that many inches and its plain axes with a faint grid, `options` as for `Figure.subplots`."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, **options)
    for axis in np.ravel(axes):
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25, linewidth=0.6)
        axis.set_axisbelow(True)
    return figure, axes


def save_figure(figure: Figure, path: str | Path) -> None:
    """Writes a figure as PNG, so that a reader never sees half a file."""
    with replaced_atomically(path) as partial:
        figure.savefig(partial, dpi=DPI, format="png")


# How many goals the figure goes up: the first that LTE stays within, else everything.
_RANGES = (3, 12)
_MARKERS = "osD^vPX*<h>pd"


def logarithmic_values(axis: Axes) -> None:
    """A logarithmic y axis with plain numbers at 1, 2 and 5."""
    axis.set_yscale("log")
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.yaxis.set_minor_locator(NullLocator())


def tradeoff_figure(tradeoff: Tradeoff, limit: float | None = None) -> Figure:
    """Quality lost against the dense reference over the share of its bytes that is read, as on the page.

    Bars are one standard deviation, the wide grey line is the Pareto front, an arrow at the edge a loss beyond it.
    Without a dense model, or bytes, it is the metric over FFN sparsity.

    Args:
        tradeoff: with at least one point.
        limit: the loss that is the goal; `None` takes the metric's own.

    Raises:
        ValueError: if no run of the tradeoff has a value.
    """
    if not tradeoff.points():
        raise ValueError("tradeoff must hold at least one run with a value, got none")
    figure, axis = new_figure(9, 4.8)
    main = main_curves(tradeoff)
    points = {method: tradeoff.curves[name] for method, name in main.items()}
    compared = any(tradeoff.share(point, "megabytes") for found in points.values() for point in found)
    cost = (lambda point: tradeoff.share(point, "megabytes")) if compared else (lambda point: point.mean("sparsity"))
    drop = (lambda point: tradeoff.drop(point)) if compared else (lambda point: point.value.mean)
    top = _top(tradeoff, points, goal(tradeoff, limit)) if compared else math.inf
    strong, colours = {OURS, *rivals(tradeoff)}, colour_names(points)
    if compared and tradeoff.reference is not None:
        own, limit = tradeoff.reference.value, goal(tradeoff, limit)
        axis.axhline(0, color=light("dense"), linestyle="--", label=f"dense ({tradeoff.metric.format(own.mean)})")
        axis.axhspan(-own.spread, own.spread, color=light("dense"), alpha=0.12, linewidth=0)
        axis.axhline(limit, color=light("dense"), linestyle=":", label=f"goal: {limit:g} lost at most")
        front = pareto_front(tradeoff, "megabytes")
        line = [(cost(point), drop(point)) for point in front]
        axis.plot(*zip(*line, strict=True), color=light("ink"), alpha=0.15, linewidth=7, label="Pareto front")
    for place, (method, found) in enumerate(sorted(points.items(), key=lambda pair: pair[0] not in strong)):
        known = [(x, drop(point) or 0.0, point.value) for point in found if (x := cost(point)) is not None]
        known.sort(key=lambda item: item[0])
        look = {"alpha": 1.0, "color": light(colours[method])} if method in strong else {"alpha": 0.4, "color": GREY}
        look |= {"marker": _MARKERS[place % 13], "linewidth": 3 if method == OURS else 1.5}
        _draw_curve(axis, method, known, top, look)
    _name_axes(axis, tradeoff, compared, top)
    figure.legend(loc="outside right upper", fontsize=8, frameon=False)
    return figure


def _top(tradeoff: Tradeoff, points: Mapping[str, Sequence[Point]], limit: float) -> float:
    """The upper end of the axis of losses."""
    ours = points.get(OURS) or [point for found in points.values() for point in found]
    least = min(tradeoff.drop(point) or 0.0 for point in ours)
    return next((goals * limit for goals in _RANGES if limit and least <= goals * limit), math.inf)


def _draw_curve(
    axis: Axes, method: str, known: Sequence[tuple[float, float, Statistic]], top: float, look: dict[str, Any]
) -> None:
    """A curve of points (cost, loss, statistic), and arrows for those beyond the top."""
    if not known:
        return
    x, y, values = zip(*known, strict=True)
    seeds = max(value.n for value in values)
    label = f"{method} ({seeds} seeds)" if seeds > 1 else method
    bars = [value.spread for value in values] if seeds > 1 else None
    axis.errorbar(x, y, yerr=bars, capsize=3, elinewidth=1.5, label=label, **look)
    beyond = [place for place, loss in zip(x, y, strict=True) if loss > top]
    axis.plot(beyond, [top] * len(beyond), **{**look, "marker": "^", "linewidth": 0}, clip_on=False, fillstyle="none")


def _name_axes(axis: Axes, tradeoff: Tradeoff, compared: bool, top: float) -> None:
    name = tradeoff.metric.name
    axis.set_title("\n".join(textwrap.wrap(tradeoff.title, 90)), fontsize=11)
    axis.set_ylabel(f"{name} lost against dense, lower is better" if compared else name)
    axis.set_xlabel("share of the dense model's bytes that is read" if compared else "FFN sparsity")
    axis.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    if compared:
        axis.invert_xaxis()
        axis.set_ylim(top=None if top == math.inf else top)
        lowest = min((tradeoff.drop(point) or 0.0) - point.value.spread for point in tradeoff.points())
        axis.set_ylim(bottom=max(lowest * 1.1, -top))
