"""`lte steadiness`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any


def test_a_table_and_a_file(run: Callable[..., Any], trained: Any, tmp_path: Path) -> None:
    folder, _ = trained
    output = tmp_path / "steadiness.json"
    flags = ["--prompts", 3, "--prompt-length", 8, "--tokens", 4, "--batch-size", 2, "--json", output]
    result = run("steadiness", folder, *flags)
    assert result.exit_code == 0, result.output
    found = json.loads(output.read_text())
    assert (found["prompts"], found["prompt_length"], found["tokens"], found["batch"]) == (3, 8, 4, 2)
    assert found["text"] == "Python's help topics"
    assert "float32, alone / bfloat16, alone" in result.stdout
    (pair,) = [pair for pair in found["pairs"] if pair["pair"] == "formats"]
    (line,) = [line for line in result.stdout.splitlines() if "float32, alone / bfloat16, alone" in line]
    for share in (pair["flips"], pair["answers"]["equal_tokens"], pair["dense_answers"]["equal_tokens"]):
        assert f"{100 * share:.3g}%" in line
    near = found["near_threshold"]["bfloat16"]["0.1"]
    (line,) = [line for line in result.stdout.splitlines() if line.split()[1:2] == ["bfloat16"]]
    assert f"{100 * near['share']:.3g}%" in line
    assert f"{100 * max(near['by_layer']):.3g}%" in line


def test_a_text_too_short_is_refused(run: Callable[..., Any], trained: Any, tmp_path: Path) -> None:
    text = tmp_path / "short.txt"
    text.write_text("Short.")
    result = run("steadiness", trained[0], "--text", text)
    assert result.exit_code == 1
    assert "text must hold at least 192 tokens" in result.stderr
