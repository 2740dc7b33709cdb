"""Quality against cost over result records: a curve for each method, dense models as horizontal lines.

Points are means over the seeds of one setting, bars one standard deviation both ways.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator, PercentFormatter

from lte.report.canvas import BLACK, BLUE, GREEN, GREY, ORANGE, PINK, SKY, YELLOW, new_figure, plain_axes
from lte.report.curve_places import curve_places
from lte.report.paper import PAPER_SUFFIX, PaperMarker, paper_markers, visible_markers
from lte.report.records import Record, Run
from lte.report.tradeoff import Comparison, Point, Statistic, compare_runs

_COLOURS = (BLUE, ORANGE, GREEN, PINK, SKY, YELLOW, BLACK)
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "<", "h", ">", "p", "d")
_DASHES: tuple[Any, ...] = ("-", "--", "-.", ":")
_DENSE_DASHES: tuple[Any, ...] = ("--", ":", "-.", (0, (5, 1)))

# Values further apart than this are drawn on a logarithmic axis, where lower is better.
MOST_ON_A_LINEAR_AXIS = 3

# What fits beside each other below the panels.
LEGEND_CHARACTERS = 160

Style = tuple[str, str, Any]
"""Colour, marker, and dash."""


@dataclass(frozen=True)
class Panel:
    """What one panel has on its x axis: a quantity of a `Point`, and how it is called."""

    quantity: str
    label: str
    is_share: bool = False


SPARSITY = Panel("sparsity", "FFN sparsity, measured (share of neurons not computed per token)", is_share=True)
PANELS = (
    SPARSITY,
    Panel("gflops", "GFLOPs per token, routers included (block linears, 1 G = 2^30)"),
    Panel("megabytes", "MB of weights read per token (batch 1)"),
    Panel("latency_ms", "decoding step, measured median (ms, batch 1)"),
)


def curve_styles(names: Iterable[str]) -> dict[str, Style]:
    """A colour, marker and dash for each curve: those of its own for a known method, the next free ones for others.

    Args:
        names: of all curves of all figures that shall agree.
    """
    return {name: _style(place) for name, place in curve_places(names).items()}


def _style(place: int) -> Style:
    # 7 colours and 13 markers: no pair comes again before the 92nd curve.
    colours = len(_COLOURS)
    dash = _DASHES[place // colours % len(_DASHES)]
    return _COLOURS[place % colours], _MARKERS[place % len(_MARKERS)], dash


def tradeoff_figure(comparison: Comparison, styles: Mapping[str, Style] | None = None) -> Figure:
    """Quality against FFN sparsity, GFLOPs, bytes, and latency of a token, a panel each.

    Numbers of the paper for the same task are hollow markers.

    Args:
        comparison: with at least one point.
        styles: from `curve_styles` over all figures that shall agree; `None` takes this one's curves alone.

    Raises:
        ValueError: if no run of the comparison has a value.
    """
    if not comparison.points():
        raise ValueError("comparison must hold at least one run with a value, got none")
    styles = styles or curve_styles(comparison.curves)
    figure, grid = new_figure(11.5, 9.5, 2, 2)
    figure.get_layout_engine().set(h_pad=0.1, w_pad=0.1)
    axes = list(grid.flat)
    for axis, panel in zip(axes, PANELS, strict=True):
        _draw_panel(axis, comparison, panel, styles)
    figure.suptitle(
        "\n".join(textwrap.wrap(comparison.title, 110) + textwrap.wrap("; ".join(_notes(comparison)), 110)), fontsize=11
    )
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


def method_and_tokens(record: Record) -> str:
    """The name of a record's curve: its method and the tokens that it trained on."""
    tokens = record["tokens_trained"]
    unit = f"{tokens / 1e6:.3g}M" if tokens >= 1e6 else f"{tokens / 1e3:.3g}k"
    return f"{record['method']}, {unit} tokens"


def perplexity_vs_sparsity_figure(
    records: Sequence[Record], label: Callable[[Record], str] = method_and_tokens
) -> Figure:
    """Perplexity against measured FFN sparsity: a curve per method, dense models as horizontal lines.

    Points are means over the seeds of one target sparsity, bars one standard deviation. Records without a
    value, whose training diverged, are left out and counted below the figure.

    Args:
        records: result records of one task, split, model and metric.
        label: names the curve that a record belongs to.

    Raises:
        ValueError: if there is no record with a value, if the records are not comparable, or if nothing
            tells apart two of one curve, target and seed.
    """
    _check_comparable(records)
    if all(record["value"] is None for record in records):
        raise ValueError("records must hold at least one record with a value, got none")
    runs = [Run(record, f"records[{index}]") for index, record in enumerate(records)]
    (comparison,) = compare_runs(runs, curve=label)
    figure, axis = new_figure(7, 5.4)
    _draw_panel(axis, comparison, SPARSITY, curve_styles(comparison.curves))
    axis.set_title(f"{comparison.model}, {comparison.split}", fontsize=11)
    missing = len(comparison.failed)
    if missing:
        axis.set_xlabel(f"{SPARSITY.label}\n{missing} runs without a finite value are left out")
    # Below the axes: with many curves no corner is free of points.
    place = (0.5, -0.21 if missing else -0.16)
    axis.legend(fontsize=8, loc="upper center", bbox_to_anchor=place, ncols=2, frameon=False)
    return figure


def _draw_panel(axis: Axes, comparison: Comparison, panel: Panel, styles: Mapping[str, Style]) -> None:
    if all(getattr(point, panel.quantity) is None for point in comparison.points()):
        _say_not_measured(axis, comparison, panel)
        return
    for place, point in enumerate(comparison.dense):
        _draw_dense(axis, comparison, point, panel, _DENSE_DASHES[place % len(_DENSE_DASHES)])
    for name, points in comparison.curves.items():
        _draw_curve(axis, name, points, panel, styles[name])
    markers = [marker for marker in visible_markers(comparison) if panel.quantity in marker.x]
    _draw_paper(axis, markers, panel, styles)
    _scale(axis, comparison, panel)


def _say_not_measured(axis: Axes, comparison: Comparison, panel: Panel) -> None:
    records = [run.record for point in comparison.points() for run in point.runs]
    notes = sorted({record["latency_note"] for record in records if record.get("latency_note")})
    why = f":\n{textwrap.fill(notes[0], 50)}" if panel.quantity == "latency_ms" and notes else ""
    axis.set(xticks=[], yticks=[], xlabel=panel.label)
    axis.text(
        0.5, 0.5, f"not measured{why}", transform=axis.transAxes, ha="center", va="center", color=GREY, fontsize=9
    )


def _draw_curve(axis: Axes, name: str, points: Sequence[Point], panel: Panel, style: Style) -> None:
    known = [(x, point.value) for point in points if (x := getattr(point, panel.quantity)) is not None]
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


def _draw_dense(axis: Axes, comparison: Comparison, point: Point, panel: Panel, dash: Any) -> None:
    mean, spread = point.value.mean, point.value.spread
    label = f"{point.curve} ({comparison.metric.format(mean)})"
    axis.axhline(mean, color=GREY, linestyle=dash, linewidth=1.4, label=label)
    if spread:
        axis.axhspan(mean - spread, mean + spread, color=GREY, alpha=0.15, linewidth=0)
    x: Statistic | None = getattr(point, panel.quantity)
    if x is not None and not panel.is_share:
        axis.plot([x.mean], [mean], "|", color=GREY, markersize=14)


def _draw_paper(axis: Axes, markers: Sequence[PaperMarker], panel: Panel, styles: Mapping[str, Style]) -> None:
    """Hollow, in the look of the method's own curve."""
    own = {**curve_styles(marker.method for marker in markers), **styles}
    for marker in markers:
        colour, shape, _ = own[marker.method]
        (line,) = axis.plot([marker.x[panel.quantity]], [marker.value], shape, color=colour, label=marker.label)
        line.set(markerfacecolor="none", markersize=9)


def _scale(axis: Axes, comparison: Comparison, panel: Panel) -> None:
    name = comparison.metric.name
    axis.set_xlabel(panel.label)
    axis.set_ylabel(f"{name} (per token)" if name == "perplexity" else name)
    values = [point.value.mean for point in comparison.points()]
    if not comparison.metric.higher_is_better and max(values) > MOST_ON_A_LINEAR_AXIS * min(values) > 0:
        axis.set_yscale("log")
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axis.yaxis.set_minor_locator(NullLocator())
    if panel.is_share:
        axis.set_xlim(-0.01, 1.01)
        axis.xaxis.set_major_formatter(PercentFormatter(1.0))
    else:
        # Where all points lie close together, those on the right get no margin by themselves.
        axis.set_xlim(0, 1.03 * axis.get_xlim()[1])
    plain_axes(axis)


def _notes(comparison: Comparison) -> list[str]:
    notes = []
    if comparison.failed:
        notes.append(f"{len(comparison.failed)} runs without a finite value are left out")
    drawn, known = len(visible_markers(comparison)), len(paper_markers(comparison))
    if drawn:
        notes.append("hollow: the paper's numbers, of other models and settings, GFLOPs as a share of dense ones")
    if drawn < known:
        notes.append(f"{known - drawn} of the paper's numbers are far from ours and left out")
    return notes


def _check_comparable(records: Sequence[Record]) -> None:
    for name in ("task", "split", "model", "metric"):
        found = sorted({record[name] for record in records})
        if len(found) > 1:
            raise ValueError(
                f"records must be of one {name} to share a figure, got {', '.join(found)}; draw one for each"
            )
