"""Nothing is lost and nothing wrong loads after kills, on full disks, and with damaged files of a checkpoint.

`--faults 200` runs as many kills as the committed `results/faults.json` has.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.faults.inject import DISK_SIZES, PHASES, SHARE_OF_SAVES
from tests.processes import run_processes

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def found(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What all faults did, in a process that forks its children from one thread."""
    path = tmp_path_factory.mktemp("faults") / "faults.json"
    kills = request.config.getoption("--faults")
    run_processes(1, "tests.faults.inject", "--kills", kills, "--output", path, timeout_s=30 * kills)
    return {**json.loads(path.read_text()), "wanted": kills}


def expect_all_held(found: dict[str, Any], wanted: int) -> None:
    assert found["problems"] == []
    saves, phases = found["kills_in_saves"], found["kills_in_phases"]
    assert saves["file_system_calls"] > 100
    assert saves["kills"] == saves["resumed_bit_equal"] == round(SHARE_OF_SAVES * wanted)
    assert set(phases["kills"]) == set(PHASES)
    # A few come after the end of the last phase.
    assert 0.75 * phases["resumed_bit_equal"] <= sum(phases["kills"].values()) <= wanted - saves["kills"]
    disks, files = found["full_disks"], found["damaged_files"]
    assert disks["sizes"] == disks["resumed_bit_equal"] == DISK_SIZES
    assert DISK_SIZES - 2 <= disks["failed"] < DISK_SIZES
    assert files["files"] >= 10
    assert files["damages"] == files["resumed_bit_equal"] >= 2 * files["files"]


@pytest.mark.slow
@pytest.mark.timeout(6600)
def test_nothing_is_lost_and_nothing_wrong_loads(found: dict[str, Any]) -> None:
    expect_all_held(found, found["wanted"])


def test_the_committed_run_found_nothing_either() -> None:
    committed = json.loads((ROOT / "results" / "faults.json").read_text())
    expect_all_held(committed, 200)
    assert committed["command"] == "python -m tests.faults.inject --kills 200"
    assert committed["git_commit"]
