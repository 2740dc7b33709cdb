"""Quality against sparsity over result records: a figure with one curve per method."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean, stdev
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from lte.report.canvas import BLUE, GREEN, GREY, ORANGE, PINK, SKY, YELLOW, new_figure, plain_axes

Record = Mapping[str, Any]
_STYLES = (
    (BLUE, "o", "-"),
    (ORANGE, "s", "--"),
    (GREEN, "^", "-."),
    (PINK, "D", ":"),
    (SKY, "v", "-"),
    (YELLOW, "P", "--"),
)
_DENSE_DASHES = ("--", ":", "-.", (0, (5, 1)))


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
        ValueError: if there is no record with a value, if the records are not comparable, or if two of one
            curve share target and seed.
    """
    _check_comparable(records)
    valued = [record for record in records if record["value"] is not None]
    if not valued:
        raise ValueError("records must hold at least one record with a value, got none")
    curves: dict[str, dict[float, list[Record]]] = defaultdict(lambda: defaultdict(list))
    for record in valued:
        curves[label(record)][record["target_sparsity"]].append(record)
    figure, axis = new_figure(7, 5.4)
    styles, dashes = iter(_STYLES * len(curves)), iter(_DENSE_DASHES * len(curves))
    for name in sorted(curves):
        by_target = [curves[name][target] for target in sorted(curves[name])]
        _check_seeds(name, by_target)
        if all(record["method"] == "dense" for points in by_target for record in points):
            _draw_dense(axis, name, by_target[0], next(dashes))
        else:
            _draw_curve(axis, name, by_target, next(styles))
    _finish(axis, valued[0], missing=len(records) - len(valued))
    return figure


def _draw_curve(axis: Axes, name: str, by_target: list[list[Record]], style: tuple[str, str, str]) -> None:
    colour, marker, dash = style
    x = [[record["sparsity"] for record in points] for points in by_target]
    y = [[record["value"] for record in points] for points in by_target]
    seeds = max(len(points) for points in y)
    axis.errorbar(
        [fmean(points) for points in x],
        [fmean(points) for points in y],
        xerr=[_spread(points) for points in x] if seeds > 1 else None,
        yerr=[_spread(points) for points in y] if seeds > 1 else None,
        color=colour,
        marker=marker,
        linestyle=dash,
        capsize=3,
        label=f"{name} ({seeds} seeds)" if seeds > 1 else name,
    )


def _draw_dense(axis: Axes, name: str, points: list[Record], dash: Any) -> None:
    values = [record["value"] for record in points]
    mean, spread = fmean(values), _spread(values)
    axis.axhline(mean, color=GREY, linestyle=dash, linewidth=1.4, label=f"{name} ({mean:.2f})")
    if spread:
        axis.axhspan(mean - spread, mean + spread, color=GREY, alpha=0.15, linewidth=0)


def _spread(values: Sequence[float]) -> float:
    return stdev(values) if len(values) > 1 else 0.0


def _finish(axis: Axes, record: Record, missing: int) -> None:
    axis.set_title(f"{record['model']}, {record['split']}", fontsize=11)
    note = f"\n{missing} runs without a finite value are left out" if missing else ""
    axis.set_xlabel(f"FFN sparsity, measured (share of neurons not computed per token){note}")
    axis.set_ylabel(f"{record['metric']} (per token)" if record["metric"] == "perplexity" else record["metric"])
    axis.set_xlim(0, 1)
    axis.xaxis.set_major_formatter(PercentFormatter(1.0))
    plain_axes(axis)
    # Below the axes: with many curves no corner is free of points.
    axis.legend(
        fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.16 if not missing else -0.21), ncols=2, frameon=False
    )


def _check_comparable(records: Sequence[Record]) -> None:
    for name in ("task", "split", "model", "metric"):
        found = sorted({record[name] for record in records})
        if len(found) > 1:
            raise ValueError(
                f"records must be of one {name} to share a figure, got {', '.join(found)}; draw one for each"
            )


def _check_seeds(name: str, by_target: list[list[Record]]) -> None:
    for points in by_target:
        seeds = [record["seed"] for record in points]
        if len(set(seeds)) < len(seeds):
            raise ValueError(
                f"records of one curve must differ in target sparsity or seed, got seeds {seeds} for {name!r} at "
                f"{points[0]['target_sparsity']:g}; filter them, or pass a label that tells them apart"
            )
