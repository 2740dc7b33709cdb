"""What all figures share: size and resolution, colours, plain axes, and saving.

Figures are made without pyplot, so that importing lte leaves a notebook's backend as it is. Colours are the
Okabe-Ito set, which colour-blind readers tell apart; every curve has a marker or a dash of its own besides.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

BLUE, ORANGE, GREEN, PINK, SKY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9"
YELLOW, BLACK, GREY = "#E69F00", "#000000", "#6B6B6B"
DPI = 150


def new_figure(width: float, height: float, rows: int = 1, columns: int = 1, **options: Any) -> Any:
    """A figure of that many inches and its axes, `options` as for `Figure.subplots`."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, **options)


def save_figure(figure: Figure, path: str | Path) -> None:
    """Writes a figure as PNG, so that a reader never sees half a file."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        figure.savefig(partial, dpi=DPI, format="png")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def plain_axes(axis: Axes) -> None:
    """Drops the frame's upper and right side and draws a faint grid."""
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(alpha=0.25, linewidth=0.6)
    axis.set_axisbelow(True)
