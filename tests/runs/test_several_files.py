"""Several comparisons in one process."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

from typer.testing import CliRunner

from lte.runs.runner import execute_all
from lte_cli import app
from tests.runs.conftest import runner_of

DENSE = {"method": "dense", "fine_tune": False, "base": "start"}


def two_files(mrpc: Callable[..., Path]) -> tuple[Path, Path]:
    first = mrpc(DENSE)
    second = first.with_name("second.yaml")
    second.write_text(first.read_text())
    return first, second


def test_each_file_has_a_folder_of_its_own(mrpc: Callable[..., Path], tmp_path: Path) -> None:
    folders = ["--output", str(tmp_path / "records"), "--work", str(tmp_path / "work")]
    files = list(map(str, two_files(mrpc)))
    plan = CliRunner().invoke(app, ["compare", *files, *folders, "--dry-run"])
    assert [line for line in plan.output.splitlines() if line.endswith(".yaml:")] == [f"{file}:" for file in files]
    result = CliRunner().invoke(app, ["compare", *files, *folders])
    assert result.exit_code == 0, result.output
    found = sorted(str(path.relative_to(tmp_path / "records")) for path in (tmp_path / "records").rglob("*.json"))
    assert found == ["mrpc/dense-0-seed0.json", "second/dense-0-seed0.json"]


def test_a_file_that_others_work_on_does_not_hold_up_the_next(mrpc: Callable[..., Path], tmp_path: Path) -> None:
    (busy, _), (free, lines) = (runner_of(file, tmp_path / file.stem) for file in two_files(mrpc))
    busy.begin()
    failed: list[str] = []
    thread = threading.Thread(target=lambda: failed.extend(execute_all([busy, free])))
    with busy.folders.lock(busy.runs[0]) as mine:
        assert mine
        thread.start()
        while free.todo() and thread.is_alive():
            thread.join(0.1)
        assert busy.todo()
        names = [line.partition(":")[0] for line in lines if not line.startswith("Data: ")]
        assert names == ["start-seed0", "dense-0-seed0"]
    thread.join()
    assert not busy.todo()
    assert failed == []


def test_files_of_one_name_are_refused(mrpc: Callable[..., Path], tmp_path: Path) -> None:
    file = mrpc(DENSE)
    (tmp_path / "other").mkdir()
    other = tmp_path / "other" / file.name
    other.write_text(file.read_text())
    result = CliRunner().invoke(app, ["compare", str(file), str(other)])
    assert result.exit_code == 1
    assert "files must have names of their own, by which their folders are called, got mrpc twice" in result.output
