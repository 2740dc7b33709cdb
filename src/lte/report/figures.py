"""Figures of trade-offs, and what all figures share: size and resolution, colours, plain axes, and saving.

Figures are made without pyplot, so that importing lte leaves a notebook's backend as it is. Colours are those of
`lte.report.palette`, one for each method; the curves of a method have markers and dashes of their own.
Points are means over the seeds of one setting, bars one standard deviation both ways.
"""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator, PercentFormatter

from lte.files import replaced_atomically
from lte.report.palette import colour_names, light
from lte.report.paper import PAPER_SUFFIX, paper_markers, visible_markers
from lte.report.points import Point, Tradeoff

GREY = light("quiet")
DPI = 150


def new_figure(width: float, height: float, rows: int = 1, columns: int = 1, **options: Any) -> Any:
    """A figure of that many inches and its axes, `options` as for `Figure.subplots`."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, **options)


def save_figure(figure: Figure, path: str | Path) -> None:
    """Writes a figure as PNG, so that a reader never sees half a file."""
    with replaced_atomically(path) as partial:
        figure.savefig(partial, dpi=DPI, format="png")


def plain_axes(axis: Axes) -> None:
    """Drops the frame's upper and right side and draws a faint grid."""
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(alpha=0.25, linewidth=0.6)
    axis.set_axisbelow(True)


_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "<", "h", ">", "p", "d")
_DASHES: tuple[Any, ...] = ("-", "--", "-.", ":")
_DENSE_DASHES: tuple[Any, ...] = ("--", ":", "-.", (0, (5, 1)))

# Values further apart than this are drawn on a logarithmic axis, where lower is better.
MOST_ON_A_LINEAR_AXIS = 3

# What fits beside each other below the panels.
LEGEND_CHARACTERS = 160

Style = tuple[str, str, Any]
"""Colour, marker, and dash."""
# What each panel has on its x axis: a quantity of a `Point`, and how it is called.
PANELS = {
    "sparsity": "FFN sparsity, measured (share of neurons not computed per token)",
    "gflops": "GFLOPs per token, routers included (block linears, 1 G = 2^30)",
    "megabytes": "MB of weights read per token (batch 1)",
    "latency_ms": "decoding step, measured median (ms, batch 1)",
}


def logarithmic_values(axis: Axes) -> None:
    """A logarithmic y axis with plain numbers at 1, 2 and 5."""
    axis.set_yscale("log")
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.yaxis.set_minor_locator(NullLocator())


def curve_styles(tradeoffs: Sequence[Tradeoff]) -> dict[str, Style]:
    """The colour of its method, a marker and a dash for each curve; those of one method differ in both.

    Args:
        tradeoffs: of all figures that shall agree.
    """
    methods = {name: points[0].method for each in tradeoffs for name, points in each.curves.items()}
    methods |= {marker.method: marker.method for each in tradeoffs for marker in paper_markers(each)}
    colours, seen, found = colour_names(methods.values()), Counter[str](), {}
    # The curve that is named as its method comes first.
    for name in sorted(methods, key=lambda name: (name != methods[name], name)):
        place = seen[methods[name]]
        first = list(colours).index(methods[name]) if place == 0 else 0
        marker = _MARKERS[(first + place) % len(_MARKERS)]
        found[name] = (light(colours[methods[name]]), marker, _DASHES[place % len(_DASHES)])
        seen[methods[name]] += 1
    return found


def tradeoff_figure(tradeoff: Tradeoff, styles: Mapping[str, Style] | None = None) -> Figure:
    """Quality against FFN sparsity, GFLOPs, bytes, and latency of a token, a panel each.

    Numbers of the paper for the same task are hollow markers.

    Args:
        tradeoff: with at least one point.
        styles: from `curve_styles` of all figures that shall agree; `None` takes those of this one.

    Raises:
        ValueError: if no run of the tradeoff has a value.
    """
    if not tradeoff.points():
        raise ValueError("tradeoff must hold at least one run with a value, got none")
    styles = styles or curve_styles([tradeoff])
    figure, grid = new_figure(11.5, 9.5, 2, 2)
    figure.get_layout_engine().set(h_pad=0.1, w_pad=0.1)
    axes = list(grid.flat)
    for axis, quantity in zip(axes, PANELS, strict=True):
        _draw_panel(axis, tradeoff, quantity, styles)
    lines = [line for text in (tradeoff.title, "; ".join(_notes(tradeoff))) for line in textwrap.wrap(text, 110)]
    figure.suptitle("\n".join(lines), fontsize=11)
    # Of all panels, since a curve may lack the quantity of the first.
    found = [pair for axis in axes for pair in zip(*axis.get_legend_handles_labels(), strict=True)]
    found.sort(key=lambda pair: pair[1].endswith(PAPER_SUFFIX))
    handles: dict[str, Any] = {}
    for handle, label in found:
        handles.setdefault(label, handle)
    columns = max(1, min(4, LEGEND_CHARACTERS // max(map(len, handles))))
    look = {"loc": "outside lower center", "ncols": columns, "fontsize": 8, "frameon": False}
    figure.legend(list(handles.values()), list(handles), **look)
    return figure


def _draw_panel(axis: Axes, tradeoff: Tradeoff, quantity: str, styles: Mapping[str, Style]) -> None:
    axis.set_xlabel(PANELS[quantity])
    if all(getattr(point, quantity) is None for point in tradeoff.points()):
        notes = {record.latency_note for point in tradeoff.points() for record in point.records} - {None, ""}
        why = f":\n{textwrap.fill(min(map(str, notes)), 50)}" if quantity == "latency_ms" and notes else ""
        axis.set(xticks=[], yticks=[])
        look: dict[str, Any] = {"ha": "center", "va": "center", "color": GREY, "fontsize": 9}
        axis.text(0.5, 0.5, f"not measured{why}", transform=axis.transAxes, **look)
        return
    for place, point in enumerate(tradeoff.dense):
        _draw_dense(axis, tradeoff, point, quantity, _DENSE_DASHES[place % len(_DENSE_DASHES)])
    for name, points in tradeoff.curves.items():
        _draw_curve(axis, name, points, quantity, styles[name])
    markers = [marker for marker in visible_markers(tradeoff) if quantity in marker.x]
    for marker in markers:
        # Hollow, in the look of the method's own curve.
        colour, shape, _ = styles[marker.method]
        (line,) = axis.plot([marker.x[quantity]], [marker.value], shape, color=colour, label=marker.label)
        line.set(markerfacecolor="none", markersize=9)
    _scale(axis, tradeoff, quantity)


def _draw_curve(axis: Axes, name: str, points: Sequence[Point], quantity: str, style: Style) -> None:
    known = [(x, point.value) for point in points if (x := getattr(point, quantity)) is not None]
    if not known:
        return
    colour, marker, dash = style
    known.sort(key=lambda pair: pair[0].mean)
    x, y = zip(*known, strict=True)
    seeds = max(value.n for value in y)
    axis.errorbar(
        [each.mean for each in x],
        [each.mean for each in y],
        xerr=[each.spread for each in x] if seeds > 1 else None,
        yerr=[each.spread for each in y] if seeds > 1 else None,
        color=colour,
        marker=marker,
        linestyle=dash,
        linewidth=1.4,
        markersize=6,
        capsize=3,
        label=f"{name} ({seeds} seeds)" if seeds > 1 else name,
    )


def _draw_dense(axis: Axes, tradeoff: Tradeoff, point: Point, quantity: str, dash: Any) -> None:
    mean, spread = point.value.mean, point.value.spread
    label = f"{point.curve} ({tradeoff.metric.format(mean)})"
    axis.axhline(mean, color=GREY, linestyle=dash, linewidth=1.4, label=label)
    if spread:
        axis.axhspan(mean - spread, mean + spread, color=GREY, alpha=0.15, linewidth=0)
    x = point.mean(quantity)
    if x is not None and quantity != "sparsity":
        axis.plot([x], [mean], "|", color=GREY, markersize=14)


def _scale(axis: Axes, tradeoff: Tradeoff, quantity: str) -> None:
    name = tradeoff.metric.name
    axis.set_ylabel(f"{name} (per token)" if name == "perplexity" else name)
    values = [point.value.mean for point in tradeoff.points()]
    if not tradeoff.metric.higher_is_better and max(values) > MOST_ON_A_LINEAR_AXIS * min(values) > 0:
        logarithmic_values(axis)
    if quantity == "sparsity":
        axis.set_xlim(-0.01, 1.01)
        axis.xaxis.set_major_formatter(PercentFormatter(1.0))
    else:
        # Where all points lie close together, those on the right get no margin by themselves.
        axis.set_xlim(0, 1.03 * axis.get_xlim()[1])
    plain_axes(axis)


def _notes(tradeoff: Tradeoff) -> list[str]:
    notes = []
    if tradeoff.failed:
        notes.append(f"{len(tradeoff.failed)} runs without a finite value are left out")
    drawn, known = len(visible_markers(tradeoff)), len(paper_markers(tradeoff))
    if drawn:
        notes.append("hollow: the paper's numbers, of other models and settings, GFLOPs as a share of dense ones")
    if drawn < known:
        notes.append(f"{known - drawn} of the paper's numbers are far from ours and left out")
    return notes
