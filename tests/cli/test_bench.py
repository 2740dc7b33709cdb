"""`lte bench` on tiny models."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from matplotlib.image import imread

from lte.bench import timing

QUICK = ["--quick", "--repeats", 2, "--context-length", 16, "--lengths", 5, "--no-compile"]


@pytest.fixture(autouse=True)
def _small_sweep(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "SWEEP_BYTES", 1 << 12)


def test_a_trained_folder(run: Callable[..., Any], trained: Any, tmp_path: Path) -> None:
    result = run("bench", trained[0], *QUICK, "--batches", "1,2", "--output", tmp_path / "new" / "bench")
    assert result.exit_code == 0, result.output
    record = json.loads((tmp_path / "new" / "bench.json").read_text())
    assert {row["setting"] for row in record["rows"]} == {None, "own", "0.5", "0.9"}
    assert {row["benchmark"] for row in record["rows"]} == {"ffn", "decode", "prefill"}
    assert record["rows"][0]["model"] == str(trained[0])
    assert [row["batch"] for row in record["union"]] == [1, 2, 4, 8, 16, 32, 64]
    assert (tmp_path / "new" / "bench.csv").read_text().startswith("benchmark,provider,dtype,batch,tokens,sparsity")
    assert imread(tmp_path / "new" / "bench.png").shape[0] > 100
    for part in ("Break-even batch", "Experts that at least one", "dense eager", "prefill took"):
        assert part in result.output


def test_a_shape_and_forced_sparsity(run: Callable[..., Any]) -> None:
    flags = ["--shape", "tiny", "--benchmarks", "ffn", "--sparsities", "0.25", "--dtype", "float32"]
    result = run("bench", *flags, *QUICK)
    assert result.exit_code == 0, result.output
    assert "25.0%" in result.output
    assert "tiny, float32" in result.output
    assert "Written" not in result.output


def test_own_text(run: Callable[..., Any], trained: Any, tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text("too short")
    flags = ["--benchmarks", "ffn", *QUICK]
    result = run("bench", trained[0], "--text", short, *flags)
    assert result.exit_code == 1
    assert "text must hold at least 16 tokens" in result.stderr
    result = run("bench", trained[0], "--text", tmp_path / "none.txt", *flags)
    assert result.exit_code == 1
    assert "text must be an existing text file" in result.stderr


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--shape", "lama"], "shape must be one of"),
        (["--benchmarks", "train"], "benchmarks must be one of ffn, decode, prefill"),
        (["some-model", "--shape", "tiny"], "model must not be given with --shape"),
        (["--shape", "tiny", "--dtype", "float8"], "dtype must be one of"),
        (["--shape", "tiny", "--weights", "int2"], "weights must be one of native, int8"),
        (["--shape", "tiny", "--sparsities", "own"], "sparsities must be numbers for a model without routers"),
    ],
)
def test_wrong_flags_are_a_sentence(run: Callable[..., Any], flags: list[str], message: str) -> None:
    result = run("bench", *flags, *QUICK)
    assert result.exit_code == 1
    assert message in result.stderr
