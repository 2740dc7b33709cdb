"""A comparison goes on from records that were packed."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lte.records import read_json
from lte.runs.runner import execute_all
from tests.runs.conftest import records_of, runner_of

PACK = Path(__file__).parents[2] / "results" / "pack.py"


def test_packed_runs_are_not_done_again(mrpc: Callable[..., Path], tmp_path: Path) -> None:
    odd = {"method": "lte", "expert_size": 3, "label": "odd"}
    file = mrpc("dense", odd)
    first, _ = runner_of(file, tmp_path)
    assert execute_all([first]) == ["odd-0.5-seed0"]
    before = records_of(tmp_path)
    spec: Any = importlib.util.spec_from_file_location("pack", PACK)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    script.pack(tmp_path / "records")
    packed = tmp_path / "records" / "records.jsonl"
    assert [path.name for path in packed.parent.iterdir()] == ["records.jsonl"]
    again, lines = runner_of(file, tmp_path)
    assert (execute_all([again]), lines) == (["odd-0.5-seed0"], [])
    assert records_of(tmp_path) == before
    # Without its line a run is done again, and one of other settings says where its record is.
    kept = [line for line in packed.read_text().splitlines(keepends=True) if "dense" not in line.split(",")[0]]
    packed.write_text("".join(kept))
    other, lines = runner_of(mrpc("dense", odd, defaults={"learning_rate": 1e-4}), tmp_path)
    assert execute_all([other]) == ["odd-0.5-seed0"]
    assert f"delete its line in {packed} to do it again" in lines[0]
    assert read_json(packed.parent / "dense-0-seed0.json")["value"] is not None
