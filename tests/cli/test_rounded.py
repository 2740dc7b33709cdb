"""`lte eval --weights`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


def test_weights_are_rounded_before_they_are_measured(run: Callable[..., Any], trained: Any, tmp_path: Path) -> None:
    pytest.importorskip("torchao")
    found = {}
    for weights in ("native", "int8", "int4-32"):
        path = tmp_path / f"{weights}.json"
        flags = ["--max-validation-tokens", 512, "--sequence-length", 32, "--weights", weights, "--json", path]
        result = run("eval", trained[0], *flags)
        assert result.exit_code == 0, result.output
        found[weights] = json.loads(path.read_text())
        said = "16-bit" if weights == "native" else weights
        assert f"({said} weights, batch 1)" in result.stdout
    values = [each["value"] for each in found.values()]
    assert values[1] != values[0]
    assert values[1] == pytest.approx(values[0], rel=0.01)
    assert values[2] == pytest.approx(values[0], rel=0.3)
    sizes = [each["bytes_per_token"] for each in found.values()]
    assert sizes == sorted(sizes, reverse=True)
    assert [each["weights"] for each in found.values()] == list(found)
    assert found["int8"]["weights_memory_bytes"] < found["native"]["weights_memory_bytes"]


def test_unknown_weights_are_refused(run: Callable[..., Any], dense_folder: Path) -> None:
    result = run("eval", dense_folder, "--weights", "int3")
    assert result.exit_code == 1
    assert "weights must be one of native, int8, int4, int4-64, int4-32" in result.stderr
