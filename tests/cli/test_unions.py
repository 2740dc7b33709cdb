"""`lte unions`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any


def test_tables_and_a_file(run: Callable[..., Any], trained: Any, tmp_path: Path) -> None:
    folder, _ = trained
    output = tmp_path / "unions.json"
    flags = ["--pieces", 6, "--length", 16, "--oracle-layers", 1, "--oracle-tokens", 64, "--json", output]
    result = run("unions", folder, *flags)
    assert result.exit_code == 0, result.output
    found = json.loads(output.read_text())
    assert (found["pieces"], found["length"], found["text"]) == (6, 16, "Python's help topics")
    assert found["git_commit"] is None or len(found["git_commit"]) >= 7
    line = next(line for line in result.stdout.splitlines() if line.split()[1:2] == ["16"])
    for name in ("consecutive", "random", "frequencies"):
        assert f"{100 * found['rows'][3][name]['sparsity']:.3g}%" in line
    (line,) = [line for line in result.stdout.splitlines() if "other experts, best choice" in line]
    assert f"{100 * found['oracle']['mean']['regrouped']['kept']:.3g}%" in line


def test_a_text_too_short_is_refused(run: Callable[..., Any], trained: Any, tmp_path: Path) -> None:
    text = tmp_path / "short.txt"
    text.write_text("Short.")
    result = run("unions", trained[0], "--text", text)
    assert result.exit_code == 1
    assert "text must hold at least 256 tokens" in result.stderr
