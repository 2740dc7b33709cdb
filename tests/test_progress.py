"""Bars where a caller asks for them, lines where nobody watches, nothing elsewhere."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from lte.progress import duration, shown_on, tracked


def test_without_a_console_nothing_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(tracked([1, 2, 3], "Counting")) == [1, 2, 3]
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("terminal", [False, True])
def test_a_line_says_how_long_it_took(terminal: bool) -> None:
    file = io.StringIO()
    with shown_on(Console(file=file, force_terminal=terminal, width=80)):
        assert list(tracked(iter([1, 2]), "Counting")) == [1, 2]
    lines = file.getvalue().splitlines()
    assert lines[-1].endswith("Counting: 0.0 s.")
    assert ("━" in file.getvalue()) == terminal
    assert terminal or len(lines) == 1
    # Behind the block it is quiet again.
    list(tracked([1], "Counting"))
    assert file.getvalue().splitlines() == lines


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.44, "0.4 s"), (40.4, "40 s"), (100, "2 min"), (5900, "98 min"), (11100, "3 h 5 min")]
)
def test_durations_are_said_as_people_say_them(seconds: float, text: str) -> None:
    assert duration(seconds) == text
