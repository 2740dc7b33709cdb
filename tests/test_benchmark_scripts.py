"""What the benchmark scripts take for granted of the code that they measure, without a GPU."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPTS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Imports a script by name."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(str(SCRIPTS))
    yield importlib.import_module
    for name in set(sys.modules) - before:
        if getattr(sys.modules[name], "__file__", None) and SCRIPTS in Path(sys.modules[name].__file__).parents:  # type: ignore[arg-type]
            del sys.modules[name]


@pytest.mark.parametrize("path", sorted(SCRIPTS.glob("*.py")), ids=lambda path: path.stem)
def test_every_script_can_be_imported(script: Any, path: Path) -> None:
    assert script(path.stem).__doc__


def test_the_stamps_of_the_trace_find_their_places(script: Any, tmp_path: Path) -> None:
    kernel = script("decode_trace").traced_kernel(tmp_path)
    source = (tmp_path / "traced_kernel.py").read_text()
    assert kernel.arg_names[:2] == ["trace", "x"]
    assert [f"stamp(trace, {slot})" in source for slot in range(8)] == [True] * 8
