from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from matplotlib.image import imread
from rich.console import Console

from lte.report.bench import break_even_report, latency_table, union_report
from lte.report.figures import save_figure
from lte.report.model_figures import latency_figure
from tests.report.sample_benches import bench_row

COPY = 100.0


def row(provider: str, sparsity: float, ms: float, setting: str | None, **given: Any) -> dict[str, Any]:
    size = (1 - sparsity) * 1e8
    fields = {"benchmark": "ffn", "model": "m", "bytes": size, "gb_per_s": size / ms / 1e6, "scope": "ffn"}
    fields |= {"share_of_copy": size / ms / 1e6 / COPY, "bandwidth_ms": size / COPY / 1e6, "ratio_to_dense": ms / 2}
    return bench_row(provider, setting, sparsity, ms, **{**fields, **given})


def rows() -> list[dict[str, Any]]:
    decode = [row("dense eager", 0.0, 2.0, None), row("lte", 0.9, 0.4, "0.9"), row("lte", 0.5, 1.2, "0.5")]
    prefill = [row("lte", 0.5, ms, "0.5", benchmark="prefill", tokens=tokens) for tokens, ms in ((64, 3.0), (16, 1.0))]
    return [*decode, row("lte", 0.61, 1.0, "own", phase_ms={"route": 0.1}), *prefill]


def test_the_figure_draws_medians_and_the_bandwidth_line(tmp_path: Path) -> None:
    figure = latency_figure(rows())
    axis, prefill = figure.axes
    lines = {str(line.get_label()): line for line in axis.get_lines()}
    bandwidth = lines["bytes at the copy bandwidth"]
    assert list(bandwidth.get_xdata()) == [0.5, 0.61, 0.9]
    assert list(bandwidth.get_ydata()) == pytest.approx([0.5, 0.39, 0.1])
    assert lines["dense eager: 2 ms"].get_ydata()[0] == 2.0  # type: ignore[index]
    (bars,) = axis.containers
    assert list(bars[0].get_xdata()) == [0.5, 0.61, 0.9]  # type: ignore[index]
    assert list(bars[0].get_ydata()) == [1.2, 1.0, 0.4]  # type: ignore[index]
    by_length = prefill.get_lines()[0]
    assert (list(by_length.get_xdata()), list(by_length.get_ydata())) == ([16, 64], [0.5, 1.5])
    assert axis.get_title() == "FFN, batch 1"
    save_figure(figure, tmp_path / "figure.png")
    assert imread(tmp_path / "figure.png").shape[2] == 4


def test_a_figure_needs_rows() -> None:
    with pytest.raises(ValueError, match="rows must hold at least one result, got none"):
        latency_figure([])


def text_of(table: Any) -> str:
    console = Console(width=250, record=True, file=None, quiet=False)
    with console.capture() as capture:
        console.print(table)
    return capture.get()


def test_tables_hold_the_numbers() -> None:
    text = text_of(latency_table(rows(), COPY))
    for part in ("m, bfloat16, 1 x GPU", "61.0% own", "1.2000", "0.600", "route 0.1000", "100 GB/s"):
        assert part in text
    text = text_of(union_report([{"batch": 4, "union": 0.75, "independent": 0.8, "groups": 2}]))
    assert "75.0%" in text
    assert "25.0%" in text
    found = {"benchmark": "ffn", "setting": "0.5", "batches": [1, 4], "ratios": [0.6, 1.1], "break_even": 4}
    text = text_of(break_even_report([found, {**found, "setting": "own", "break_even": None}]))
    assert "1: 0.600, 4: 1.100" in text
    assert "none up to 4" in text
