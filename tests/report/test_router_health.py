from __future__ import annotations

import io

import pytest
from rich.console import Console

from lte.report.router_health import (
    histogram_text,
    router_health_markdown,
    router_health_rows,
    router_health_table,
)
from lte.report.tables import markdown_table
from tests.report.sample_records import measurement


def test_rows_hold_the_numbers_of_each_layer() -> None:
    assert router_health_rows(measurement()) == [
        ("0", "50.0%", "1/4", "1/4", "12.5%", "█········█"),
        ("1", "100.0%", "0/4", "4/4", "0.0%", "·········█"),
        ("all", "75.0%", "1/8", "5/8", "6.2%", "▅········█"),
    ]


def test_the_terminal_table_shows_them_and_the_totals() -> None:
    console = Console(file=io.StringIO(), width=100)
    console.print(router_health_table(measurement()))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "25.00% of the FFN neurons skipped, 1000 tokens" in text
    for row in router_health_rows(measurement()):
        assert all(cell in text for cell in row)


def test_the_markdown_table_is_whole() -> None:
    lines = router_health_markdown(measurement()).splitlines()
    assert lines[0] == "| layer | active | dead | always on | near tau | scores 0 to 1 |"
    assert lines[1] == "| ---: | ---: | ---: | ---: | ---: | --- |"
    assert lines[2].startswith("| 0 | 50.0% | 1/4 |")
    assert lines[-1].startswith("| all | 75.0% | 1/8 |")
    assert {line.count("|") for line in lines} == {7}


def test_histograms_show_small_bins_and_keep_order() -> None:
    assert histogram_text([0] * 10) == "·" * 10
    assert histogram_text([1.0, 1e-9, 0.25, *[0.0] * 7]) == "█▁▄·······"
    assert histogram_text([0.25] * 20) == "█" * 10


def test_cells_cannot_break_a_markdown_table() -> None:
    table = markdown_table(("name", "n"), [("a|b\nc", "1")])
    assert table.splitlines() == ["| name | n |", "| --- | ---: |", "| a\\|b c | 1 |"]


def test_a_row_of_another_length_is_refused() -> None:
    with pytest.raises(ValueError, match="rows must have 2 cells, as the header has"):
        markdown_table(("a", "b"), [("1",)])
