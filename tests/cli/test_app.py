"""The command line as a whole: help, version, exit codes, tracebacks."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

import lte
from lte.cli.train import GROUPS
from lte.settings import settings_of

COMMANDS = (
    "train",
    "convert",
    "densify",
    "configs",
    "data",
    "eval",
    "calibrate",
    "generate",
    "inspect",
    "report",
    "demo",
)


def test_version(run: Callable[..., Any]) -> None:
    assert run("--version").output.strip() == f"lte {lte.__version__}"


@pytest.mark.parametrize("command", COMMANDS)
def test_help_teaches_by_an_example(run: Callable[..., Any], command: str) -> None:
    result = run(command, "--help")
    assert result.exit_code == 0
    assert f"Example: lte {command}" in result.output


def test_every_setting_has_a_flag_and_a_help_text(run: Callable[..., Any]) -> None:
    text = run("train", "--help").output
    for setting in settings_of(GROUPS).values():
        assert setting.help, setting.name
        assert setting.flag in text


def test_a_wrong_flag_is_wrong_usage(run: Callable[..., Any]) -> None:
    result = run("train", "--target-sparcity", "0.5")
    assert result.exit_code == 2
    assert "--target-sparsity" in result.stderr


def test_a_wrong_type_is_wrong_usage(run: Callable[..., Any]) -> None:
    assert run("train", "--batch-size", "many").exit_code == 2


@pytest.mark.parametrize("arguments", [("--debug", "inspect", "/no/such"), ("inspect", "/no/such", "--debug")])
def test_debug_raises_the_error_itself(run: Callable[..., Any], arguments: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match="does not exist"):
        run(*arguments)


def test_a_bug_is_no_user_error(run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr("lte.cli.inspection.describe", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        run("inspect", "anything")


def test_the_module_runs_like_the_command() -> None:
    command = [sys.executable, "-m", "lte", "inspect", "/no/such"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 1
    assert result.stderr.startswith("Error: model must be")
    assert "Traceback" not in result.stderr
    assert not result.stdout
