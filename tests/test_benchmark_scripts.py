"""What the benchmark scripts take for granted of the code that they measure, without a GPU."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest

from lte.bench.bytes import router_bytes
from lte.bench.models import model_pair
from lte.bench.routing import active_count
from lte.bench.rows import REQUIRED_FIELDS
from lte.records import environment, read_json
from lte.report.inputs import load_inputs
from tests.tiny_models import tiny_dense_model

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


def test_every_row_of_a_file_says_where_it_was_measured(script: Any, tmp_path: Path) -> None:
    rows = script("ffn_rows")
    row = rows.row("prefill", "lte masked", 4, 0.5, [1.0, 2.0, 3.0], 1000)
    rows.write_rows(tmp_path / "rows.json", [row], shape="llama2-7b")
    rows.write_rows(None, [row])
    (bench,) = load_inputs([tmp_path / "rows.json"]).benches
    assert bench.content["shape"] == "llama2-7b"
    assert bench.content["rows"] == [{**row, **environment()}]


def test_the_bytes_of_a_decoding_step(script: Any) -> None:
    decode_step, pair = script("decode_step"), model_pair(tiny_dense_model())
    dense, ffn = pair.dense_ffns, pair.sparse_ffns[0]
    matrices = sum(p.nbytes for p in dense[0].parameters() if p.ndim == 2)
    size = decode_step.step_bytes
    assert size(pair, 0.0) - size(pair, None) == len(dense) * router_bytes(ffn)
    needed = active_count(ffn.num_experts, 0.5) / ffn.num_experts
    assert size(pair, 0.0) - size(pair, 0.5) == pytest.approx(len(dense) * (1 - needed) * matrices, abs=1)
    assert size(pair, None) > sum(p.nbytes for p in pair.dense.model.layers.parameters())


@pytest.mark.parametrize("name", ["prefill.json", "prefill_few_tokens.json", "decode_step.json"])
def test_tracked_rows_say_where_they_were_measured(name: str) -> None:
    content = read_json(SCRIPTS.parent / "results" / name)
    for row in content["rows"]:
        assert set(REQUIRED_FIELDS) <= set(row)
        assert all(row[field] == content[field] for field in ("hardware", "versions", "git_commit"))
