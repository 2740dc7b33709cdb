from __future__ import annotations

import json
from pathlib import Path

import pytest

from lte.records import ResultRecord
from lte.report.demo_report import write_demo_report
from tests.report.sample_records import measurement, record, training_log

RECORDS = {"dense": record("dense"), "sparse": record(), "static": record("static", value=30.0)}


def write(folder: Path, records: dict[str, ResultRecord]) -> Path:
    return write_demo_report(folder, records, measurement(), [], samples={}, notes=[])


def test_a_full_report_holds_everything(tmp_path: Path) -> None:
    folder = tmp_path / "report"
    samples = {"dense": "A list is", "sparse": "A list ``` is"}
    path = write_demo_report(folder, RECORDS, measurement(), training_log(), samples=samples, notes=["It is a demo."])
    assert path == folder / "report.md"
    assert {entry.name for entry in folder.iterdir()} == {
        "report.md",
        "report.json",
        "router_health.png",
        "training.png",
    }
    assert json.loads((folder / "report.json").read_text()) == RECORDS
    text = path.read_text()
    assert "skips 50.0% of its FFN neurons per token (target 50.0%)" in text
    assert "a perplexity of 25.000 against 20.000 for the dense model (+25.0%)" in text
    assert "50.0% of the dense model's FLOPs and reads 75.0% of its weight bytes" in text
    assert "| static | 30.000 | 50.0% | 1.0000 | 3.0 | 12,000,000 | 61 s |" in text
    assert "````text\nA list ``` is\n````" in text
    assert "It is a demo." in text
    assert "| 0 | 50.0% | 1/4 |" in text
    assert "| versions | python 3.11, torch 2.13 |" in text
    for image in ("router_health.png", "training.png"):
        assert f"]({image})" in text


def test_a_report_without_losses_is_written(tmp_path: Path) -> None:
    path = write(tmp_path, {"dense": record("dense"), "sparse": record(value=None)})
    assert {entry.name for entry in tmp_path.iterdir()} == {"report.md", "report.json", "router_health.png"}
    text = path.read_text()
    assert "a perplexity of not finite against 20.000 for the dense model. Per token" in text
    assert "training.png" not in text


def test_a_report_replaces_an_older_one(tmp_path: Path) -> None:
    write(tmp_path, RECORDS)
    write(tmp_path, {**RECORDS, "sparse": record(value=26.0)})
    assert "26.000" in (tmp_path / "report.md").read_text()
    assert json.loads((tmp_path / "report.json").read_text())["sparse"]["value"] == 26.0


def test_records_without_a_pair_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="records must hold dense and sparse, got none for sparse"):
        write(tmp_path / "new", {"dense": record("dense")})
    assert not (tmp_path / "new").exists()
