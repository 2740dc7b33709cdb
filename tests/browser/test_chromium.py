"""Without a browser its tests are skipped, and in continuous integration they fail; there nothing is timed."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.browser import loading
from tests.browser.chromium import MISSING, in_ci, require_chromium

ROOT = Path(__file__).parents[2]


@pytest.fixture
def _no_chromium(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)


@pytest.mark.usefixtures("_no_chromium")
@pytest.mark.parametrize("ci", [None, "", "false", "true", "1"])
def test_without_a_browser(ci: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    if ci is None:
        monkeypatch.delenv("CI", raising=False)
    else:
        monkeypatch.setenv("CI", ci)
    assert in_ci() == (ci in ("true", "1"))
    with pytest.raises(pytest.fail.Exception if in_ci() else pytest.skip.Exception, match=MISSING):
        require_chromium()


def test_the_continuous_integration_says_that_it_is_one(tmp_path: Path) -> None:
    make = tmp_path / "make"
    make.write_text('#!/bin/sh\necho "$1 CI=$CI"\n')
    make.chmod(0o755)
    environment = {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run([ROOT / ".ci" / "run"], env=environment, capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines() == ["--jobs=2 CI=true", "test CI=true", "lint CI=true"], done.stderr


def test_a_slow_page_fails_outside_of_ci_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    times = iter([2500.0, 2100.0, 3000.0, 2500.0, 2100.0, 1900.0, 2500.0])
    monkeypatch.setattr(loading, "drawn_after_ms", lambda browser, address: (next(times), 9000.0))
    monkeypatch.delenv("CI", raising=False)
    with pytest.raises(AssertionError, match="drawn after 2100 ms of the CPU, the limit is 2000"):
        loading.check_loads_within_ms(None, "page", 2000)
    loading.check_loads_within_ms(None, "page", 2000)
    monkeypatch.setenv("CI", "true")
    loading.check_loads_within_ms(None, "page", 2000, loads=1)
    assert capsys.readouterr().out.endswith("drawn after 9000 ms, 2500 ms of the CPU\n")
