from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread

from lte.report.figures import save_figure
from lte.report.model_figures import router_health_figure, training_curves_figure
from tests.report.sample_records import measurement, training_log


def line_of(figure: Figure, panel: str, label: str) -> tuple[list[float], list[float]]:
    axis = next(axis for axis in figure.axes if axis.get_ylabel().startswith(panel))
    line = next(line for line in axis.get_lines() if line.get_label() == label)
    return list(line.get_xdata()), list(line.get_ydata())  # type: ignore[arg-type]


def test_figures_are_written_whole_as_png(tmp_path: Path) -> None:
    path = tmp_path / "new" / "figure.png"
    save_figure(router_health_figure(measurement()), path)
    height, width, _ = imread(path).shape
    assert width == 1500
    assert height > 300
    assert [entry.name for entry in path.parent.iterdir()] == ["figure.png"]


def test_drawing_leaves_the_backend_alone() -> None:
    import matplotlib

    before = matplotlib.rcParams["backend"]
    router_health_figure(measurement())
    assert matplotlib.rcParams["backend"] == before


def test_router_health_shows_use_scores_and_tau() -> None:
    figure = router_health_figure(measurement(threshold=0.75))
    left, right = figure.axes[:2]
    assert [bar.get_width() for bar in left.patches] == [0.5, 1.0]  # type: ignore[attr-defined]
    dead = next(line for line in left.get_lines() if str(line.get_label()).startswith("never"))
    assert dead.get_label() == "never active: 1 of 8 experts"
    assert (list(dead.get_xdata()), list(dead.get_ydata())) == ([0.25], [0])  # type: ignore[arg-type]
    assert right.get_images()[0].get_array().tolist() == measurement().score_histogram  # type: ignore[union-attr]
    assert right.get_lines()[0].get_xdata()[0] == 0.75  # type: ignore[index]
    assert "tau = 0.75" in right.get_xlabel()


def test_training_curves_go_on_from_stage_to_stage() -> None:
    figure = training_curves_figure(training_log())
    steps, losses = line_of(figure, "task loss", "next token")
    assert steps == [10, 20, 30, 40, 52, 62, 72, 82]
    assert losses[:4] == losses[4:]
    assert line_of(figure, "share", "target")[1] == [0.5] * 8
    assert line_of(figure, "share", "active experts")[1][3] == 0.5
    assert len(figure.axes) == 6
    assert all(axis.get_xlabel() and axis.get_ylabel() for axis in figure.axes)


def test_what_was_no_part_of_the_training_gets_no_panel() -> None:
    panels = [axis.get_ylabel() for axis in training_curves_figure(training_log(distilled=False)).axes]
    assert len(panels) == 5
    assert not any("KL" in panel for panel in panels)
    dense = training_curves_figure(training_log(distilled=False, routed=False))
    assert [axis.get_ylabel() for axis in dense.axes] == ["task loss (nats per token)"]


@pytest.mark.parametrize("stage", [1, 2])
def test_one_stage_alone_starts_at_its_own_steps(stage: int) -> None:
    log = [entry for entry in training_log() if entry["stage"] == stage]
    assert line_of(training_curves_figure(log), "task loss", "next token")[0] == [10, 20, 30, 40]


@pytest.mark.parametrize("log", [[], [{"step": 1, "stage": 1, "train_runtime": 2.0}]])
def test_a_log_without_losses_gives_a_figure_that_says_so(log: list[dict[str, Any]]) -> None:
    axis = training_curves_figure(log).axes[0]
    assert [text.get_text() for text in axis.texts] == ["no loss was logged; for curves lower logging_steps"]
