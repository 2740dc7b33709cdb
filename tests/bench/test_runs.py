"""Whole runs on tiny models: rows, files, and the gate."""

from __future__ import annotations

import csv
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import lte
from lte.bench import decode as decode_benchmark
from lte.bench import sweep
from lte.bench.acceleration import phase_runs
from lte.bench.decode import Decoder
from lte.bench.dense import IndexedFfns, Projections
from lte.bench.ffn import benchmark_ffns
from lte.bench.gate import stock_weights
from lte.bench.models import model_pair
from lte.bench.routing import force_same_
from lte.bench.rows import REQUIRED_FIELDS, ResultFile
from lte.bench.session import Session
from lte.bench.shapes import random_model, shape_config
from lte.nn.accelerated import AcceleratedFfn
from lte.ops.arguments import Routing
from lte.ops.decode import PHASES
from lte.ops.reference import sparse_ffn_reference
from tests.bench.conftest import ENVIRONMENT, dense_pair, random_texts, trained_pair
from tests.tiny_models import HIDDEN, NEURONS, randomise_routers_, tiny_dense_model, tiny_sparse_model

Start = Callable[..., Session]


def test_own_routing_at_another_sparsity(run: Start) -> None:
    pair = trained_pair()
    before = [ffn.router.bias.detach().clone() for ffn in pair.sparse_ffns]
    shares = ("own@0.25", "own", "own@0.75")
    session = run(pair, sparsities=shares, benchmarks=("ffn", "decode"), batches=(1,), lengths=(7,))
    assert session.failures == []
    for benchmark in ("ffn", "decode"):
        rows = [row for row in session.results.rows if row["benchmark"] == benchmark and row["setting"] is not None]
        found = {row["setting"]: row["sparsity"] for row in rows if row["provider"] in ("lte", "lte eager")}
        assert found["own@0.25"] == pytest.approx(0.25, abs=0.15)
        assert found["own@0.75"] == pytest.approx(0.75, abs=0.15)
        assert {row["routing"] for row in rows} == {"own"}
    assert all(map(torch.equal, before, [ffn.router.bias for ffn in pair.sparse_ffns]))


def test_experts_that_are_always_on_and_biases_for_what_is_dropped(run: Start) -> None:
    torch.manual_seed(0)
    model = tiny_dense_model()
    config = lte.LteConfig(expert_size=8, always_on=0.25, dropped_bias=True)
    lte.sparsify_(model, config, calibration=[{"input_ids": random_texts()}])
    randomise_routers_(model)
    for ffn in lte.sparse_ffns(model).values():
        ffn.router.pin_()
        torch.nn.init.normal_(ffn.down_proj.bias)
    own = {"benchmarks": ("ffn", "decode"), "batches": (1,), "lengths": (7,)}
    session = run(model_pair(model), sparsities=("own@0.6",), **own)
    assert session.failures == []
    assert all(row["sparsity"] <= 0.75 for row in session.results.rows)
    with pytest.raises(ValueError, match=r"sparsities must be at most 0\.75, as the other experts are always on"):
        run(model_pair(model), sparsities=("own@0.9",), **own)


@pytest.mark.parametrize("scope", ["ffn", "model"])
def test_rows_are_complete(run: Start, tmp_path: Path, scope: str) -> None:
    session = run(trained_pair(), sparsities=("own", 0.5), batches=(1, 3), prefill_scope=scope)
    assert session.failures == []
    written = json.loads((tmp_path / "out.json").read_text())
    rows = written["rows"]
    assert rows == json.loads(json.dumps(session.results.rows))
    for row in rows:
        assert set(REQUIRED_FIELDS) <= set(row)
        assert 0 < row["p20_ms"] <= row["median_ms"] <= row["p80_ms"]
        assert row["gb_per_s"] == pytest.approx(row["bytes"] / row["median_ms"] / 1e6)
        assert row["share_of_copy"] == pytest.approx(row["gb_per_s"] / written["copy_gb_per_s"])
    found = {(row["benchmark"], row["provider"], row["batch"], row["tokens"], row["setting"]) for row in rows}
    assert len(found) == len(rows)
    for batch in (1, 3):
        assert ("ffn", "dense eager", batch, batch, None) in found
        assert ("decode", "dense eager", batch, batch, None) in found
        for setting in ("own", "0.5"):
            assert ("ffn", "lte", batch, batch, setting) in found
            assert ("ffn", "PyTorch indexing", batch, batch, setting) in found
            assert ("decode", "lte eager", batch, batch, setting) in found
    assert {("prefill", "dense eager", 1, 7, None), ("prefill", "lte", 1, 7, "own")} <= found
    assert written["union"][0]["batch"] == 1
    assert written["union"][0]["union"] == pytest.approx(written["union"][0]["independent"], abs=1e-6)
    assert {row["benchmark"] for row in written["break_even"]} == {"ffn", "decode"}
    with (tmp_path / "out.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == len(rows)
    assert list(lines[0])[: len(REQUIRED_FIELDS)] == list(REQUIRED_FIELDS)
    assert json.loads(lines[0]["versions"]) == rows[0]["versions"]


def test_the_bytes_of_an_ffn(session: Callable[..., Session]) -> None:
    made = session(dense_pair(), sparsities=(0.0, 0.75))
    benchmark_ffns(made, "ffn", 1, 1)
    rows = {(row["provider"], row["setting"]): row for row in made.results.rows}
    inputs, experts = 2 * 4 * HIDDEN, NEURONS // 32
    router = 4 * experts * (HIDDEN + 1)
    assert rows["dense eager", None]["bytes"] == 3 * 4 * HIDDEN * NEURONS + inputs
    assert rows["lte", "0.0"]["bytes"] == 3 * 4 * HIDDEN * NEURONS + inputs + router
    # 2 experts of 32, of which round(2 * 0.25) = 0 stay
    assert rows["lte", "0.75"]["sparsity"] == 1.0
    assert rows["lte", "0.75"]["bytes"] == inputs + router


def test_tokens_with_experts_of_their_own_need_more_bytes(session: Callable[..., Session]) -> None:
    by_routing = {}
    for routing in ("same", "different"):
        made = session(trained_pair(), routing=routing)
        benchmark_ffns(made, "ffn", 3, 3)
        by_routing[routing] = next(row for row in made.results.rows if row["provider"] == "lte")
        assert by_routing[routing]["sparsity"] == 0.5
        assert by_routing[routing]["routing"] == routing
    assert by_routing["same"]["union_sparsity"] == 0.5
    assert by_routing["different"]["union_sparsity"] < 0.5
    assert by_routing["different"]["bytes"] > by_routing["same"]["bytes"]


@pytest.mark.parametrize("timed", ["ffn", "decode", "prefill"])
def test_a_wrong_kernel_is_not_timed(run: Start, monkeypatch: pytest.MonkeyPatch, timed: str) -> None:
    right = AcceleratedFfn.forward

    def wrong(ffn: AcceleratedFfn, x: Tensor) -> Tensor:
        return right(ffn, x) * 1.001

    pair = trained_pair()
    monkeypatch.setattr(AcceleratedFfn, "forward", wrong)
    message = r"relative RMS of the FFN of layer 0 must be at most 1e-05, got .*; nothing was timed"
    with pytest.raises(RuntimeError, match=message):
        run(pair, benchmarks=(timed,))


def test_nan_does_not_pass_the_gate(run: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    pair = trained_pair()
    monkeypatch.setattr(AcceleratedFfn, "forward", lambda ffn, x: torch.full_like(x, torch.nan))
    with pytest.raises(RuntimeError, match="got nan"):
        run(pair, benchmarks=("ffn",))


def test_own_routing_needs_routers(run: Start) -> None:
    with pytest.raises(ValueError, match="sparsities must be numbers for a model without routers of its own"):
        run(dense_pair(), sparsities=("own",))


def test_what_fails_is_noted_and_the_rest_goes_on(run: Start, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pair = trained_pair()

    def broken(*_: Any) -> Tensor:
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(type(pair.dense_ffns[0]), "forward", broken)
    session = run(pair, benchmarks=("ffn",))
    assert session.failures == ["ffn, 1 tokens, dense eager: RuntimeError: no such kernel"]
    assert json.loads((tmp_path / "out.json").read_text())["failures"] == session.failures
    assert {row["provider"] for row in session.results.rows} == {"lte", "PyTorch indexing"}
    assert all(row["ratio_to_dense"] is None for row in session.results.rows)


def test_the_models_share_all_but_their_ffns() -> None:
    ids = random_texts()
    for pair in (dense_pair(), trained_pair()):
        assert pair.dense.get_input_embeddings().weight is pair.sparse.get_input_embeddings().weight
        own = {p.data_ptr() for ffn in pair.dense_ffns for p in ffn.parameters()}
        other = {p.data_ptr() for ffn in pair.sparse_ffns for p in ffn.parameters()}
        assert not own & other
        force_same_(pair.sparse_ffns, 0.0)
        with torch.no_grad():
            torch.testing.assert_close(pair.sparse(ids).logits, pair.dense(ids).logits, atol=1e-5, rtol=1e-5)


def test_int8_weights(session: Callable[..., Session]) -> None:
    made = session(model_pair(tiny_dense_model(), "int8"), sparsities=(0.0,))
    benchmark_ffns(made, "ffn", 1, 1)
    rows = {row["provider"]: row for row in made.results.rows}
    native = rows["dense eager"]["bytes"] - 2 * 4 * HIDDEN
    router = 4 * (NEURONS // 32) * (HIDDEN + 1)
    scales = 4 * (2 * NEURONS + HIDDEN)  # gate and up have one per neuron, down one per output
    assert rows["lte int8"]["bytes"] == native / 4 + scales + 2 * 4 * HIDDEN + router


def test_steps_of_a_decoder_repeat_the_text(tokens: Tensor) -> None:
    model = tiny_dense_model()
    ids = random_texts(2, 8)
    with torch.no_grad():
        expected = model(ids).logits
        decoder = Decoder(model, ids, 3, 8)
        for turn in range(2):
            for position in range(3, 8):
                decoder.next_token()
                found = decoder.eager()[:, 0]
                torch.testing.assert_close(found, expected[:, position], atol=1e-4, rtol=1e-4, msg=f"{turn}")


def test_the_fastest_of_several_tunings_is_timed(run: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    costs, seen = [3.0, 1.0, 2.0], []

    def compiled(decoder: Decoder, options: dict[str, Any]) -> Callable[[], Tensor]:
        step = functools.partial(decoder.eager)
        step.cost = costs[len(seen) % 3]  # type: ignore[attr-defined]
        seen.append(options)
        return step

    def times(runs: dict[str, Any], device: torch.device, repeats: int, before: Any) -> dict[str, list[float]]:
        return {name: [getattr(step, "cost", 5.0)] * repeats for name, step in runs.items()}

    monkeypatch.setattr(Decoder, "compiled", compiled)
    for module in (decode_benchmark, sweep):
        monkeypatch.setattr(module, "interleaved_times", times)
    session = run(trained_pair(), benchmarks=("decode",), compile=True, tunings=3)
    rows = {row["provider"]: row for row in session.results.rows}
    for name in ("dense compiled", "lte compiled"):
        assert rows[name]["tunings_ms"] == costs
        assert rows[name]["median_ms"] == 1
    assert rows["lte eager"]["tunings_ms"] is None
    # With equal options dynamo would take what it compiled before.
    assert all(a != b for index, a in enumerate(seen[:3]) for b in seen[:index])


def test_the_time_split_covers_the_kernels_phases() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pair = model_pair(tiny_sparse_model().to(device))
    runs = phase_runs(torch.randn(2, HIDDEN, device=device), pair.sparse_ffns, "silu")
    assert list(runs) == list(PHASES)
    for run in runs.values():
        run()
    assert phase_runs(torch.randn(40, HIDDEN, device=device), pair.sparse_ffns, "silu") == {}


def test_a_row_without_a_field_is_refused() -> None:
    with pytest.raises(ValueError, match=r"a row must hold benchmark, .*, got one without dtype"):
        ResultFile(None, ENVIRONMENT, {}).put("x", [dict.fromkeys(set(REQUIRED_FIELDS) - {"dtype"})])


def test_indexing_computes_the_ffn() -> None:
    pair = trained_pair()
    stock = [Projections.of(ffn, pair.family.layout) for ffn in pair.dense_ffns]
    x = torch.randn(3, 1, HIDDEN)
    masks = [torch.rand(3, 8) < 0.4 for _ in stock]
    routers = [lambda _, mask=mask: mask for mask in masks]
    indexed = IndexedFfns(stock, routers, torch.nn.functional.silu)  # type: ignore[arg-type]
    for found, p, mask in zip(indexed.run([x, x])(), stock, masks, strict=True):  # type: ignore[call-overload]
        expected = sparse_ffn_reference(x[:, 0], stock_weights(p), Routing.forced(mask), "silu")
        torch.testing.assert_close(found[:, 0], expected)


@pytest.mark.slow
def test_compiled_models_follow_the_routing(run: Start) -> None:
    session = run(trained_pair(), benchmarks=("decode",), sparsities=(0.0, 0.75), compile=True)
    assert session.failures == []
    found = {(row["provider"], row["setting"]) for row in session.results.rows}
    assert {("dense compiled", None), ("lte compiled", "0.0"), ("lte compiled", "0.75")} <= found


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_run_on_a_gpu(run: Start) -> None:
    model = random_model(shape_config("tiny"), torch.device("cuda"), torch.bfloat16)
    # So few are on that the table takes the decode kernel, which alone has a time split.
    session = run(model_pair(model), compile=True, batches=(1,), sparsities=(0.95,), prefill_scope="ffn")
    assert session.failures == []
    rows = session.results.rows
    decode = {row["provider"] for row in rows if (row["benchmark"], row["batch"]) == ("decode", 1)}
    steps = set() if "whole_step" in session.results.header else {"dense whole step", "lte whole step"}
    compiled = {"dense compiled", "dense compiled, tuned", "lte compiled, tuned"}
    assert decode == {"dense eager", "lte eager", *compiled, *steps}
    ffn = next(row for row in rows if (row["benchmark"], row["provider"]) == ("ffn", "lte"))
    assert ffn["path"] == "decode"
    assert list(ffn["phase_ms"]) == list(PHASES)
