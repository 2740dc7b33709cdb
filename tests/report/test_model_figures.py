from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread

from lte.records import ResultRecord
from lte.report.figures import perplexity_vs_sparsity_figure, save_figure
from lte.report.model_figures import router_health_figure, training_curves_figure
from tests.report.sample_records import measurement, record, training_log


def legend_of(figure: Figure) -> list[str]:
    axis = figure.axes[0]
    return [text.get_text() for text in axis.get_legend().get_texts()]  # type: ignore[union-attr]


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
    assert "tau = 0.25" in router_health_figure(measurement(), 0.25).axes[1].get_xlabel()


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


def test_curves_are_means_over_seeds_with_their_spread() -> None:
    records = [record("dense", tokens_trained=2_500)]
    records += [record(seed=seed, value=24.0 + 2 * seed) for seed in (0, 1)]
    records += [record(target_sparsity=0.7, sparsity=0.68, value=30.0), record("static", value=33.0)]
    figure = perplexity_vs_sparsity_figure(records)
    axis = figure.axes[0]
    lte, static = axis.containers
    assert list(lte.lines[0].get_xdata()) == [0.5, 0.68]  # type: ignore[attr-defined]
    assert list(lte.lines[0].get_ydata()) == [25.0, 30.0]  # type: ignore[attr-defined]
    low, high = lte.lines[2][1].get_segments()[0][:, 1]  # type: ignore[attr-defined]
    assert high - low == pytest.approx(2 * 2**0.5)
    assert list(static.lines[0].get_ydata()) == [33.0]  # type: ignore[attr-defined]
    expected = ["dense, 2.5k tokens (20.00)", "lte, 12M tokens (2 seeds)", "static, 12M tokens"]
    assert legend_of(figure) == expected
    assert axis.get_ylabel() == "perplexity (per token)"
    assert "FFN sparsity, measured" in axis.get_xlabel()


def test_seeds_of_a_dense_model_are_a_band_and_diverged_runs_are_named() -> None:
    records = [record("dense", seed=seed, value=20.0 + seed) for seed in (0, 1)]
    figure = perplexity_vs_sparsity_figure([*records, record(value=None)])
    assert legend_of(figure) == ["dense, 12M tokens (20.50)"]
    assert len(figure.axes[0].patches) == 1
    assert "1 runs without a finite value are left out" in figure.axes[0].get_xlabel()


def test_a_label_tells_runs_apart() -> None:
    records = [record("dense", value=20.0, name="a"), record("dense", value=21.0, name="b")]
    with pytest.raises(ValueError, match=r"records of one curve must differ .* got seeds \[0, 0\]"):
        perplexity_vs_sparsity_figure(records)
    figure = perplexity_vs_sparsity_figure(records, label=lambda entry: entry["name"])
    assert legend_of(figure) == ["a (20.00)", "b (21.00)"]


@pytest.mark.parametrize("name", ["task", "split", "model", "metric"])
def test_records_that_do_not_compare_are_refused(name: str) -> None:
    records = [record(), record("dense", **{name: "other"})]
    with pytest.raises(ValueError, match=f"records must be of one {name} to share a figure, got .*other"):
        perplexity_vs_sparsity_figure(records)


@pytest.mark.parametrize("records", [[], [record(value=None)]])
def test_no_value_at_all_is_refused(records: list[ResultRecord]) -> None:
    with pytest.raises(ValueError, match="records must hold at least one record with a value, got none"):
        perplexity_vs_sparsity_figure(records)
