"""Whole decoding steps as providers of `lte bench`, computed by the reference engine."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from lte.bench import step as whole_step
from lte.bench.decode import Decoder, _fills_the_device
from lte.bench.gate import GateError
from lte.bench.rows import DENSE_STEP, with_ratios
from lte.bench.session import Session
from lte.bench.step import WholeStep, all_on, whole_steps
from lte.hf.decoder import NoPlanError, decoder_plan
from lte.ops.step.plan import DecoderPlan, LayerCache
from lte.ops.step.reference import ReferenceEngine, ReferenceStep
from tests.bench.conftest import CONTEXT, dense_pair, random_texts, trained_pair

Start = Callable[..., Session]
SPARSE_STEP = "lte whole step"


class CopyingEngine(ReferenceEngine):
    """Knows of the routers what they held when it was bound, as engines may."""

    def bind(self, caches: Sequence[LayerCache]) -> ReferenceStep:
        return ReferenceStep(copy.deepcopy(self.plan), caches)


class WrongEngine(ReferenceEngine):
    def bind(self, caches: Sequence[LayerCache]) -> Any:
        step = super().bind(caches)
        return lambda *args: step(*args) * 1.001


@pytest.fixture(autouse=True)
def use(monkeypatch: pytest.MonkeyPatch) -> Callable[[type, str | None], None]:
    """Sets the engine, and why it does not fit."""

    def set_engine(engine: type, reason: str | None = None) -> None:
        monkeypatch.setattr(whole_step.engines, "unfit", lambda plan, caches: reason)
        monkeypatch.setattr(whole_step.engines, "make_engine", engine)

    set_engine(CopyingEngine)
    return set_engine


def test_rows_of_both_steps(run: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(WholeStep, "phase_ms", lambda step: {"ffn": 0.5})
    sparsities = ("own", "own@0.75", 0.75)
    session = run(trained_pair(), benchmarks=("decode",), sparsities=sparsities, batches=(3,))
    assert session.failures == []
    rows = {(row["provider"], row["setting"]): row for row in session.results.rows}
    dense, step = rows["dense eager", None], rows[DENSE_STEP, None]
    assert len(rows) == len(session.results.rows) == 2 + 2 * len(sparsities)
    assert (step["dense_ms"], step["ratio_to_dense_step"]) == (dense["median_ms"], 1)
    for setting in map(str, sparsities):
        row, eager = rows[SPARSE_STEP, setting], rows["lte eager", setting]
        assert row["ratio_to_dense"] == row["median_ms"] / row["dense_ms"]
        assert row["ratio_to_dense_step"] > 0
        assert (row["path"], row["phase_ms"]) == ("whole step", {"ffn": 0.5})
        for name in ("sparsity", "union_sparsity", "bytes", "routing"):
            assert row[name] == eager[name]


def test_both_steps_give_the_logits_of_their_models() -> None:
    pair, ids = dense_pair(), random_texts(2)
    with torch.no_grad():
        sparse, dense = Decoder(pair.sparse, ids, 4, CONTEXT), Decoder(pair.dense, ids, 4, CONTEXT)
        steps = whole_steps(pair.sparse, sparse, dense, CONTEXT)
        for decoder, step in zip((sparse, dense), steps, strict=True):
            expected = decoder.model(ids).logits
            for turn in range(2):
                for position in range(4, CONTEXT):
                    decoder.next_token(whole_step=True)
                    torch.testing.assert_close(step()[:, 0], expected[:, position], msg=f"{turn} {position}")


def test_steps_take_turns_on_one_cache() -> None:
    pair, ids = dense_pair(), random_texts(2)
    with torch.no_grad():
        first = Decoder(pair.dense, ids, 4, CONTEXT)
        second = Decoder(pair.dense, ids, 4, CONTEXT, beside=first)
        assert second.cache is first.cache
        step = WholeStep(lambda: all_on(decoder_plan(pair.sparse)), second, CONTEXT)
        expected = pair.dense(ids).logits
        for count in range(2 * (CONTEXT - 4)):
            position = 4 + count % (CONTEXT - 4)
            for decoder, call in ((first, first.eager), (second, step), (first, None), (second, second.eager)):
                if call is None:
                    decoder.restart()
                    continue
                decoder.step = count
                decoder.next_token(whole_step=call is step)
                torch.testing.assert_close(call()[:, 0], expected[:, position], atol=1e-4, rtol=1e-4)


def test_a_wrong_step_is_not_timed(run: Start, use: Any, tmp_path: Path) -> None:
    use(WrongEngine)
    session = run(trained_pair(), benchmarks=("decode",))
    assert len(session.failures) == 2
    message = f"decode, batch 1, {SPARSE_STEP}: GateError: relative RMS of the logits of {SPARSE_STEP} must be at most"
    assert session.failures[1].startswith(message)
    assert json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))["failures"] == session.failures
    assert {row["provider"] for row in session.results.rows} == {"dense eager", "lte eager"}


def test_the_dense_step_is_checked_too() -> None:
    pair, ids = dense_pair(), random_texts(1)
    decoder = Decoder(pair.dense, ids, 4, CONTEXT)

    def shifted() -> DecoderPlan:
        plan = all_on(decoder_plan(pair.sparse))
        with torch.no_grad():
            plan.layers[0].up.mul_(1.01)
        return plan

    with pytest.raises(GateError, match=r"relative RMS of the step must be at most 0\.0001, got"):
        WholeStep(shifted, decoder, CONTEXT).check("the step")


def test_a_cache_is_shared_where_two_would_fill_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    cache, free = Decoder(dense_pair().dense, random_texts(1), 4, CONTEXT).cache, [0]
    layers: Any = cache.layers
    size = sum(layer.keys.nbytes + layer.values.nbytes for layer in layers)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free[0], 2 * free[0]))
    for free[0], shared in ((2 * size, False), (2 * size - 1, True)):
        assert _fills_the_device(cache, torch.device("cuda")) is shared
    assert not _fills_the_device(cache, torch.device("cpu"))


def test_where_no_engine_fits_a_note_says_why(run: Start, use: Any) -> None:
    use(CopyingEngine, "there is none for such devices")
    session = run(trained_pair(), benchmarks=("decode",), batches=(1, 3))
    assert session.results.header["whole_step"] == [
        f"batch {batch}: whole steps are not timed, as there is none for such devices" for batch in (1, 3)
    ]
    assert session.failures == []
    assert {row["provider"] for row in session.results.rows} == {"dense eager", "lte eager"}
    assert all("ratio_to_dense_step" not in row for row in session.results.rows)


def test_windows_shorter_than_the_context() -> None:
    pair, ids = dense_pair(model_type="mistral", sliding_window=CONTEXT // 2), random_texts(1)
    decoder = Decoder(pair.dense, ids, 4, CONTEXT)
    with pytest.raises(NoPlanError, match="its sliding windows are shorter than the context"):
        WholeStep(lambda: all_on(decoder_plan(pair.sparse)), decoder, CONTEXT)


def test_ratios_are_over_pytorch_and_over_the_dense_step() -> None:
    times = {"dense eager": 4.0, "dense compiled": 2.0, DENSE_STEP: 1.0, SPARSE_STEP: 0.5}
    rows = with_ratios([{"provider": name, "median_ms": time} for name, time in times.items()])
    assert [row["dense_ms"] for row in rows] == [2.0] * 4
    assert [row["ratio_to_dense"] for row in rows] == [2.0, 1.0, 0.5, 0.25]
    assert [row["ratio_to_dense_step"] for row in rows] == [4.0, 2.0, 1.0, 0.5]
    alone = with_ratios([{"provider": DENSE_STEP, "median_ms": 1.0}])[0]
    assert (alone["ratio_to_dense"], alone["ratio_to_dense_step"]) == (None, 1.0)
