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
from lte.report.figures import curve_styles, tradeoff_figure
from lte.report.methods_report import tradeoff_texts, write_methods_report
from lte.report.palette import OTHERS, light
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


def test_each_panel_draws_means_with_bars_both_ways() -> None:
    timed = {"latency_ms": 3.0, "latency_dense_ms": 4.0}
    figure = tradeoff_figure(compared(*records_of(("lte",), **timed)))
    labels = [axis.get_xlabel().split(",")[0].split("(")[0].strip() for axis in figure.axes]
    assert labels == ["FFN sparsity", "GFLOPs per token", "MB of weights read per token", "decoding step"]
    expected = ([0.5, 0.8], [1.0, 1.0], [3.0, 3.0], [3.0, 3.0])
    for axis, x in zip(figure.axes, expected, strict=True):
        (container,) = axis.containers
        line, _, bars = container.lines  # type: ignore[attr-defined]
        assert list(line.get_xdata()) == x
        assert list(line.get_ydata()) == [25.5, 28.5]
        assert len(bars) == 2
        assert len(axis.patches) == 1, "the spread of the dense model"
    assert legend_of(figure) == ["dense (20.50)", "lte (2 seeds)"]


def test_fourteen_methods_look_different_and_the_legend_covers_no_panel() -> None:
    figure = tradeoff_figure(compared(*records_of()))
    looks = set(curve_styles([compared(*records_of())]).values())
    assert len({look[:2] for look in looks}) == len(METHODS)
    assert len(legend_of(figure)) == 1 + len(METHODS)
    figure.canvas.draw()
    legend = figure.legends[0].get_window_extent()
    assert legend.x0 >= 0
    assert legend.x1 <= figure.bbox.x1
    assert legend.y0 >= 0
    assert all(axis.get_tightbbox().y0 >= legend.y1 for axis in figure.axes)  # type: ignore[union-attr]


def test_curves_of_a_method_share_its_colour_and_differ_in_marker_and_dash() -> None:
    records = [record("dense"), *(record(label=name) for name in ("lte", "lte-frozen")), record("teal"), record("x")]
    styles = curve_styles([compared(*records)])
    assert styles["lte"][0] == styles["lte-frozen"][0] == light("lte")
    assert {styles["lte"][1:], styles["lte-frozen"][1:]} == {("o", "-"), ("s", "--")}
    assert (styles["teal"][0], styles["x"][0]) == (light("teal"), light(OTHERS[0]))


def test_a_panel_without_numbers_says_why() -> None:
    note = "no kernels for this method"
    figure = tradeoff_figure(compared(*records_of(("cats",), latency_note=note)))
    assert [text.get_text() for text in figure.axes[3].texts] == [f"not measured:\n{note}"]
    assert not figure.axes[3].get_lines()


def test_values_far_apart_are_on_a_logarithmic_axis() -> None:
    wide = tradeoff_figure(compared(record("dense"), record("kla", value=5264.0)))
    assert wide.axes[0].get_yscale() == "log"
    assert tradeoff_figure(compared(record("dense"), record())).axes[0].get_yscale() == "linear"
    shares = [record("dense", metric="accuracy", value=0.9), record("kla", metric="accuracy", value=0.1)]
    assert tradeoff_figure(compared(*shares)).axes[0].get_yscale() == "linear"


def test_the_papers_numbers_are_hollow_and_those_far_off_are_counted() -> None:
    records = [{**each, "task": "wikitext103"} for each in records_of(("lte",))]
    figure = tradeoff_figure(compared(*records))
    hollow = [line for line in figure.axes[1].get_lines() if str(line.get_label()).endswith("(paper)")]
    assert {line.get_label() for line in hollow} == {"LTE (paper)", "Deja Vu (paper)", "MoEfication (paper)"}
    assert all(line.get_markerfacecolor() == "none" for line in hollow)
    assert legend_of(figure)[:2] == ["dense (20.50)", "lte (2 seeds)"]
    assert set(legend_of(figure)[2:]) == {line.get_label() for line in hollow}
    title = " ".join(figure.get_suptitle().split())
    assert "other models and settings" in title
    assert "7 of the paper's numbers are far from ours and left out" in title


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
    assert all(imread(path).shape[1] == 1725 for path in files[1:3])
    text = files[-1].read_text()
    for part in ("## lm, test: tiny, perplexity", "### Failed runs", "### Fewest GFLOPs per token", f"`{command}`"):
        assert part in text
    assert "![perplexity against sparsity, GFLOPs, bytes and latency](lm-test-perplexity.png)" in text
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
