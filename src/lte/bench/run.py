"""A whole run: every benchmark in turn, then the tables that follow from all rows."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from lte.bench.decode import benchmark_decode
from lte.bench.ffn import benchmark_ffns
from lte.bench.models import ModelPair
from lte.bench.prefill import benchmark_prefill
from lte.bench.rows import ResultFile
from lte.bench.session import Session
from lte.bench.settings import BenchSettings
from lte.bench.timing import copy_gb_per_s
from lte.bench.union import break_even_batches, text_masks, union_table
from lte.hf.acceleration import describe_kernels
from lte.hf.sparsity_curve import choice_record
from lte.records import environment


def run_benchmarks(
    name: str,
    pair: ModelPair,
    settings: BenchSettings,
    ids: Tensor,
    output: Path | None,
    report: Callable[[str], None] = print,
) -> Session:
    """Measures what the settings say; results are written after every group.

    Args:
        name: of the model, for the rows.
        pair: what to compare.
        settings: what to measure.
        ids: tokens [N, L] of N texts, random ones where all routing is forced; L is more than the settings' prompt.
        output: path of the result files without ending, `None` writes none.
        report: gets lines of progress.

    Returns:
        The session with its results.

    Raises:
        RuntimeError: if the sparse path computes something wrong; that benchmark is then not timed.
        ValueError: if the settings ask for the routing of a model that has none of its own, or for longer prompts than
            it takes.
    """
    if settings.own and not pair.trained:
        raise ValueError("sparsities must be numbers for a model without routers of its own, got sparsities=own")
    positions = getattr(pair.dense.config, "max_position_embeddings", None)
    longest = settings.context_length if "decode" in settings.benchmarks else 0
    if "prefill" in settings.benchmarks and settings.whole_model(sum(p.numel() for p in pair.dense.parameters())):
        longest = max(longest, *settings.lengths)
    if positions is not None and longest > positions:
        raise ValueError(f"lengths must be at most {positions} for this model, got lengths={longest}")
    bandwidth = copy_gb_per_s(pair.device)
    header = {
        "model": name,
        "settings": asdict(settings),
        "kernels": describe_kernels(pair.sparse),
        "copy_gb_per_s": bandwidth,
    }
    if (choice := choice_record(pair.sparse.config)) is not None:
        header["threshold_choice"] = choice
    results = ResultFile(output, environment(), header)
    session = Session(name, pair, settings, results, bandwidth, ids.to(pair.device), report)
    session.say(f"{name}, {pair.dtype}, {results.environment['hardware']}; copies memory at {bandwidth:.0f} GB/s")
    seconds: dict[str, float] = {}
    for benchmark in settings.benchmarks:
        start = time.monotonic()
        _run(session, benchmark)
        seconds[benchmark] = time.monotonic() - start
        session.say(f"{benchmark} took {seconds[benchmark]:.0f} s")
        results.note(seconds=seconds)
    if pair.trained:
        results.note(union=union_table(text_masks(session)))
    results.note(break_even=break_even_batches(results.rows))
    return session


def _run(session: Session, benchmark: str) -> None:
    settings = session.settings
    first = settings.batches[0]
    for size in settings.lengths if benchmark == "prefill" else settings.batches:
        what = f"{benchmark}, {'length' if benchmark == 'prefill' else 'batch'} {size}"
        if settings.budget_s is not None and time.monotonic() - session.started > settings.budget_s:
            session.skip(what)
            continue
        torch.compiler.reset()
        if benchmark == "ffn":
            benchmark_ffns(session, "ffn", size, size)
        elif benchmark == "decode":
            benchmark_decode(session, size, full=size == first)
        else:
            benchmark_prefill(session, size)
        torch.compiler.reset()
        if session.device.type == "cuda":
            torch.cuda.empty_cache()
