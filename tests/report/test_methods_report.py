"""Figures, tables and the folder of a tradeoff."""

from __future__ import annotations

import csv
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread
from rich.console import Console

from lte.records import ResultRecord
from lte.report.figures import tradeoff_figure
from lte.report.methods_report import tradeoff_texts, write_methods_report
from lte.report.palette import light
from lte.report.points import find_tradeoffs
from lte.report.tables import (
    TextTable,
    csv_rows,
    failed_table,
    latency_texts,
    reference_text,
    results_table,
)
from tests.report.sample_records import record
from tests.report.test_points import compared, runs_of

METHODS = ("lte", "static_pruning", "cats", "teal", "wina", "wanda", "kla", "moefication", "deja_vu", "sigma_moe")
METHODS += ("noisy_topk", "random_router", "moefication-relu", "lte-random")


def records_of(methods: tuple[str, ...] = METHODS, **changes: Any) -> list[ResultRecord]:
    dense = [record("dense", seed=seed, value=20.0 + seed, **changes) for seed in (0, 1)]
    sparse = [
        record(name, seed=seed, target_sparsity=s, sparsity=s, value=20 + 10 * s + place + seed, **changes)
        for place, name in enumerate(methods)
        for s in (0.5, 0.8)
        for seed in (0, 1)
    ]
    return [*dense, *sparse]


def legend_of(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


def cells(table: TextTable, name: str) -> list[str]:
    return [row[table.header.index(name)] for row in table.rows]


def spread_of(figure: Figure) -> dict[str, list[tuple[float, float]]]:
    """The points of each line with a legend."""
    (axis,) = figure.axes
    found = {str(line.get_label()): line for line in axis.get_lines()}
    found |= {str(each.get_label()): each.lines[0] for each in axis.containers}  # type: ignore[attr-defined]
    return {
        name: list(zip(line.get_xdata(), line.get_ydata(), strict=True))
        for name, line in found.items()
        if name[0] != "_"
    }


def test_the_figure_draws_losses_over_bytes_with_bars() -> None:
    figure = tradeoff_figure(compared(*records_of(("lte",))), 3.0)
    drawn = spread_of(figure)
    assert drawn["lte (2 seeds)"] == [(0.75, 5.0), (0.75, 8.0)]
    assert drawn["Pareto front"] == [(1.0, 0.0), (0.75, 5.0)]
    assert legend_of(figure) == ["dense (20.50)", "goal: 3 lost at most", "Pareto front", "lte (2 seeds)"]
    (axis,) = figure.axes
    (container,) = axis.containers
    assert len(container.lines[2]) == 1, "bars of the losses"  # type: ignore[attr-defined]
    assert axis.get_ylim()[1] == 9.0
    assert axis.xaxis_inverted()


def test_what_lies_beyond_three_goals_is_an_arrow_at_the_edge() -> None:
    near = record(value=20.4, bytes_per_token=2e6)
    figure = tradeoff_figure(compared(record("dense"), near, record("kla", value=5264.0, bytes_per_token=1e6)))
    (axis,) = figure.axes
    arrows = [line for line in axis.get_lines() if line.get_marker() == "^" and len(line.get_xdata())]  # type: ignore[arg-type]
    assert [(list(line.get_xdata()), list(line.get_ydata())) for line in arrows] == [([0.25], [1.5])]
    # Where LTE itself lies beyond, so does the edge.
    assert tradeoff_figure(compared(record("dense"), record())).axes[0].get_ylim()[1] == 6.0


def test_lte_and_the_best_others_have_their_colours_and_the_rest_is_pale() -> None:
    figure = tradeoff_figure(compared(*records_of()))
    (axis,) = figure.axes
    colours = {each.get_label(): each.lines[0].get_color() for each in axis.containers}  # type: ignore[attr-defined]
    assert colours["lte (2 seeds)"] == light("lte")
    assert colours["static_pruning (2 seeds)"] == light("static_pruning")
    assert list(colours.values()).count(light("quiet")) == len(METHODS) - 4
    figure.canvas.draw()
    assert figure.legends[0].get_window_extent().x0 >= axis.get_window_extent().x1


def test_without_a_dense_model_the_metric_is_over_sparsity() -> None:
    figure = tradeoff_figure(compared(record(value=25.0), record(value=28.0, sparsity=0.8, target_sparsity=0.8)))
    assert spread_of(figure) == {"lte": [(0.5, 25.0), (0.8, 28.0)]}
    assert (figure.axes[0].get_xlabel(), figure.axes[0].get_ylabel()) == ("FFN sparsity", "perplexity")


def test_a_comparison_without_values_has_no_figure() -> None:
    with pytest.raises(ValueError, match="tradeoff must hold at least one run with a value, got none"):
        tradeoff_figure(compared(record(value=None)))


def test_latencies_of_another_sparsity_are_named() -> None:
    timed = {"latency_ms": 3.0, "latency_dense_ms": 4.0}
    said = latency_texts(
        compared(
            record("dense", **timed, latency_sparsity=0.0),
            record("lte", **timed, latency_sparsity=0.48),
            record("lte", target_sparsity=0.8, sparsity=0.8, **timed, latency_sparsity=0.6),
            record("static_pruning", **timed),
        )
    )
    where = "timed at another FFN sparsity than measured, or at an unknown one"
    assert said == [f"Latency of lte at 80%, static_pruning at 50%: {where}."]


def test_the_table_shows_what_is_missing_as_missing() -> None:
    timed = record("lte", latency_ms=3.0, latency_dense_ms=4.0)
    missing = record("cats", bytes_per_token=None, target_sparsity=None)
    table = results_table(compared(record("dense"), timed, missing))
    assert cells(table, "method") == ["dense (reference)", "cats", "lte"]
    assert cells(table, "target") == ["0%", "-", "50%"]
    assert cells(table, "perplexity") == ["20.00", "25.00", "25.00"]
    assert cells(table, "drop") == ["0.00", "5.00", "5.00"]
    assert cells(table, "FLOPs") == ["100.0%", "50.0%", "50.0%"]
    assert cells(table, "bytes") == ["100.0%", "-", "75.0%"]
    assert cells(table, "latency") == ["-", "-", "75.0%"]
    assert cells(table, "tokens") == ["12M"] * 3
    alone = results_table(compared(record()))
    assert [cells(alone, name) for name in ("drop", "FLOPs", "bytes", "weights not read")] == [["-"]] * 4


def test_deviations_and_seeds_are_shown() -> None:
    table = results_table(compared(*records_of(("lte",))))
    assert cells(table, "perplexity") == ["20.50 ± 0.71", "25.50 ± 0.71", "28.50 ± 0.71"]
    assert cells(table, "seeds") == ["2"] * 3


def test_the_reference_is_named() -> None:
    dense = [record("dense", label=name, value=value) for name, value in (("start", 21.0), ("dense", 20.0))]
    text = reference_text(compared(*dense, record()))
    assert text == "Reference, the best of 2 dense models: dense, perplexity 20.00 (1 seed, 12M tokens)."
    assert "No dense model" in reference_text(compared(record()))


def test_failed_runs_are_listed_with_their_files() -> None:
    table = failed_table(
        compared(record(), record(seed=1, value=None, failure="NaN at step 3"), record("cats", value=None))
    )
    assert table is not None
    assert [row[:4] for row in table.rows] == [
        ("lte", "1", "NaN at step 3", "1.json"),
        ("cats", "0", "the value is not finite", "2.json"),
    ]
    assert failed_table(compared(record())) is None


def test_missing_latencies_and_several_machines_are_told() -> None:
    timed = {"latency_ms": 3.0, "latency_dense_ms": 4.0}
    records = [record("dense", **timed, hardware="H100"), record(**timed, hardware="H200")]
    texts = tradeoff_texts(compared(*records, *(record(name, latency_note="no kernels.") for name in ("cats", "teal"))))
    assert "No latency of cats, teal: no kernels." in texts
    assert "Latencies are of several machines, so compare shares alone: H100; H200." in texts


def test_a_seed_that_was_timed_stands_for_its_point() -> None:
    off = {"latency_note": "latency is off"}
    timed = {"latency_ms": 3.0, "latency_dense_ms": 4.0, "latency_sparsity": 0.5, "hardware": "H100"}
    one_seed = [record(seed=0, **timed), record(seed=1, **off)]
    assert latency_texts(compared(*one_seed)) == []
    untimed = record(target_sparsity=0.8, sparsity=0.8, **off)
    assert latency_texts(compared(*one_seed, untimed)) == ["No latency of lte at 80%: latency is off."]


def test_csv_rows_are_unrounded() -> None:
    dense, lte = csv_rows(compared(record("dense"), record(value=25.123456789, command="lte compare x --only a")))
    assert lte["value"] == 25.123456789
    assert lte["value_sd"] is None
    assert lte["latency_ms"] is None
    assert (lte["command"], lte["files"], lte["is_reference"]) == ("lte compare x --only a", "1.json", False)
    assert (dense["gflops"], lte["gflops_share"], dense["is_reference"]) == (2.0, 0.5, True)


def test_the_folder_holds_tables_figures_and_commands(tmp_path: Path) -> None:
    command = "lte compare x --only lte"
    records = [record("dense"), record(command=command), record("cats", value=None)]
    others = [{**each, "task": "xsum", "metric": "rougeL", "value": 0.3} for each in records]
    runs = [*runs_of(*records), *runs_of(*others), *runs_of(record(task="failed", value=None))]
    files = write_methods_report(tmp_path / "new", find_tradeoffs(runs))
    names = ["report.csv", "lm-test-perplexity.png", "xsum-test-rougeL.png", "report.md"]
    assert [path.name for path in files] == names
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == sorted(names)
    assert all(imread(path).shape[1] == 1350 for path in files[1:3])
    text = files[-1].read_text()
    for part in ("## lm, test: tiny, perplexity", "### Failed runs", "### Fewest GFLOPs per token", f"`{command}`"):
        assert part in text
    assert "![perplexity lost against the share of bytes that is read](lm-test-perplexity.png)" in text
    assert text.count("The paper: arXiv 2402.06126.") == 1
    assert "\n\n\n" not in text
    rows = list(csv.DictReader((tmp_path / "new" / "report.csv").open()))
    assert [(row["task"], row["curve"], row["latency_ms"]) for row in rows][:2] == [
        ("lm", "dense", ""),
        ("lm", "lte", ""),
    ]


def test_no_comparison_is_no_report(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="tradeoffs must hold at least one, got none"):
        write_methods_report(tmp_path, [])


def test_a_narrow_terminal_goes_without_columns_rather_than_folding_numbers() -> None:
    (tradeoff,) = find_tradeoffs(runs_of(*records_of(METHODS[:1])))
    table = results_table(tradeoff)
    for width, missing in ((200, set()), (80, {"weights not read", "FLOPs"})):
        console = Console(width=width, record=True, file=StringIO())
        console.print(table.rich(width))
        text = console.export_text()
        shown = {column.header.plain for column in table.rich(width).columns}
        assert missing.isdisjoint(shown)
        assert ("a wider terminal shows more columns" in text) == bool(missing)
        assert table.rows[0][2] in text
