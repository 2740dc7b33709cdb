"""The time of a decoding step of a saved folder, for result records."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from lte.bench.gate import GateError
from lte.bench.models import model_pair
from lte.bench.rows import Row, is_dense
from lte.bench.run import run_benchmarks
from lte.bench.settings import OWN, BenchSettings
from lte.eval.models import load_any_model
from lte.hf.install import sparse_ffns
from lte.methods import METHODS

FIELDS = ("latency_ms", "latency_p20_ms", "latency_p80_ms", "latency_dense_ms", "latency_sparsity")
CONTEXT = 256


def why_not(wanted: bool, causal: bool, method: str) -> str | None:
    """Why decoding is not timed, `None` if it is.

    Args:
        wanted: whether the comparison asks for it.
        causal: whether the model predicts the next token.
        method: of the run.
    """
    if not wanted:
        return "not timed: latency is off"
    if not torch.cuda.is_available():
        return "not timed: no GPU"
    if not causal:
        return "not timed: the model writes no text"
    if method in METHODS and not METHODS[method].is_timed:
        return f"not timed: {method} has no kernels here, {METHODS[method].no_kernels}"
    return None


def untimed(note: str) -> dict[str, Any]:
    """The fields of a record without times."""
    return {**dict.fromkeys(FIELDS), "latency_note": note}


def time_decoding(
    folder: Path, dense_folder: Path, text: Sequence[int], prompt_length: int, say: Any = print
) -> dict[str, Any]:
    """The median time of a decoding step at batch 1 with 20th and 80th percentile, in ms, and that of a dense model.

    On a GPU both are compiled, without tuning, in bfloat16; on a CPU they run eagerly in float32. An LTE model routes
    as it does on the text, with `latency_sparsity` of its neurons off, and its dense model has its own weights. Of a
    stock model with fewer neurons the dense one is in `dense_folder`.

    Args:
        folder: of the model.
        dense_folder: of a dense model of the same architecture.
        text: tokens of a prompt and of what follows, which are decoded one by one; at most `CONTEXT`.
        prompt_length: tokens of the prompt.
        say: gets lines of progress.

    Raises:
        GateError: if the kernels do not compute what the reference does; no number of such a model counts.
    """
    try:
        timed = functools.partial(_decoding_rows, text=text, prompt_length=prompt_length, say=say)
        rows, sparse = timed(folder)
        dense_rows = rows if folder == dense_folder or sparse else timed(dense_folder)[0]
        own = next(row for row in rows if is_dense(row) != sparse)
        dense = next(row for row in dense_rows if is_dense(row))
    except GateError:
        raise
    # A model that cannot be compiled or timed keeps its other numbers.
    except (RuntimeError, ValueError, StopIteration) as error:
        return untimed(f"failed: {type(error).__name__}: {' '.join(str(error).split())[:300]}")
    times = {"latency_ms": own["median_ms"], "latency_p20_ms": own["p20_ms"], "latency_p80_ms": own["p80_ms"]}
    note = f"decoding step, batch 1, {own['provider']}, {own['dtype']}, context {CONTEXT}"
    return {
        **times,
        "latency_dense_ms": dense["median_ms"],
        "latency_sparsity": own["sparsity"],
        "latency_note": f"{note}; dense: {dense['provider']}",
    }


def _decoding_rows(folder: Path, text: Sequence[int], prompt_length: int, say: Any) -> tuple[list[Row], bool]:
    """The rows of the decoding benchmark, and whether the model is an LTE one."""
    on_gpu = torch.cuda.is_available()
    model = load_any_model(str(folder), "bfloat16" if on_gpu else "float32")
    sparse = bool(sparse_ffns(model))
    settings = BenchSettings(
        benchmarks=("decode",),
        sparsities=(OWN,) if sparse else (0.0,),
        batches=(1,),
        context_length=min(CONTEXT, getattr(model.config, "max_position_embeddings", CONTEXT)),
        prompt_length=prompt_length,
        compile=on_gpu,
        whole_step=False,
        tunings=0,
    )
    session = run_benchmarks(folder.name, model_pair(model), settings, torch.tensor([text]), None, say)
    compiled = [row for row in session.results.rows if "compiled" in row["provider"]]
    return (compiled if on_gpu else session.results.rows), sparse
