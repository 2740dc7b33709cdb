"""The page as a file: what it holds, its size, and that text stays text."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

from lte.records import ResultRecord
from lte.report.points import find_tradeoffs
from lte.report.report_page import html_report, report_data, write_html_report
from tests.report.sample_benches import bench
from tests.report.sample_records import record
from tests.report.test_points import runs_of

MARKUP = "</script><script>document.title='taken'</script><img src=x onerror=alert(1)>"


def page_of(*records: ResultRecord) -> str:
    return html_report(report_data(find_tradeoffs(runs_of(*records)), [bench()]))


def held_data(page: str) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="page-data">(.*?)</script>', page, re.DOTALL)
    assert found
    return json.loads(found[1])


def many_runs(count: int, layers: int = 32, experts: int = 344) -> list[dict[str, Any]]:
    """Runs of the size of LLaMA-7B, four seeds to a point."""
    choose = random.Random(0)
    shares = [round(choose.random(), 3) for _ in range(experts)]
    measured = {
        "active_fraction": [choose.random() for _ in range(layers)],
        "expert_use": [shares] * layers,
        "score_histogram": [[choose.random() / 20 for _ in range(40)] for _ in range(layers)],
        "threshold": 0.5,
        "tokens": 1000,
    }
    config = {"train": {f"setting_{place}": choose.random() for place in range(80)}}
    return [
        record(
            f"method {place // 20}",
            seed=place % 4,
            value=20 + choose.random(),
            target_sparsity=0.1 + (place // 4 % 5) / 10,
            sparsity=0.1 + (place // 4 % 5) / 10 + choose.random() / 20,
            measurement=measured,
            config=config,
            command=f"lte eval {place}",
        )
        for place in range(count)
    ]


def test_text_from_files_is_no_markup() -> None:
    odd = {"task": MARKUP, "label": MARKUP, "command": MARKUP, "model": MARKUP, "hardware": MARKUP}
    page = page_of(record("dense", **{**odd, "label": None}), record(MARKUP, **odd))
    assert "taken'" in page
    assert "<img src=x" not in page
    assert page.count("<script>document.title") == 0
    (tradeoff,) = held_data(page)["comparisons"]
    assert tradeoff["task"] == MARKUP
    assert tradeoff["points"][1]["runs"][0]["command"] == MARKUP


def test_the_page_loads_nothing_from_elsewhere() -> None:
    page = page_of(record("dense"), record())
    elements = re.sub(r"<script>.*?</script>", "", page, flags=re.DOTALL)
    assert not re.search(r"<[^>]+\s(?:src|href)=\"(?!data:|#)", elements)
    assert "default-src 'none'" in page


def test_200_runs_stay_below_5_megabytes() -> None:
    page = page_of(*many_runs(200))
    points = held_data(page)["comparisons"][0]["points"]
    assert sum(len(point["runs"]) for point in points) == 200
    assert len(page.encode()) < 5_000_000


def test_the_file_is_written_into_a_new_folder(tmp_path: Path) -> None:
    path = write_html_report(tmp_path / "new" / "report.html", find_tradeoffs(runs_of(record())))
    assert path.read_text(encoding="utf-8").startswith("<!doctype html>")
    assert [each.name for each in path.parent.iterdir()] == ["report.html"]
