"""What the benchmarks of FFNs on a GPU share: dense baselines, the search for tiles, rows and files."""

from __future__ import annotations

import shlex
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from lte.bench.timing import Times, graph_times
from lte.files import write_json_atomic
from lte.records import environment


def dense_ffn(x: Tensor, gate: Tensor, up: Tensor, down_transposed: Tensor) -> Tensor:
    """The dense FFN; the down projection is stored as a stock model stores it, [D, F]."""
    return functional.linear(functional.silu(functional.linear(x, gate)) * functional.linear(x, up), down_transposed)


def fused_ffn(x: Tensor, both: Tensor, down_transposed: Tensor) -> Tensor:
    """The dense FFN with gate and up stacked in one projection [2F, D]."""
    gate, up = functional.linear(x, both).chunk(2, dim=-1)
    return functional.linear(functional.silu(gate) * up, down_transposed)


def dense_times(
    x: Tensor,
    stacked: Sequence[Tensor],
    stock: Sequence[Tensor],
    *,
    repeats: int = 30,
    layers: int = 8,
    autotune: bool = False,
) -> dict[str, list[float]]:
    """Times of dense FFNs: plain, compiled for just this x, and compiled with gate and up stacked.

    Args:
        x: hidden states [T, D].
        stacked: gate over up of every layer, [2F, D].
        stock: the down projection of every layer, [D, F].
        repeats: of the graph.
        layers: how many of the layers are run.
        autotune: also with inductor's tuning of the products, which takes long.
    """
    torch.compiler.reset()  # else a second number of tokens would make it compile for any number
    pairs = [both.chunk(2) for both in stacked]
    compiled, fused = torch.compile(dense_ffn, dynamic=False), torch.compile(fused_ffn, dynamic=False)
    runs: dict[str, Callable[[int], Tensor]] = {
        "dense eager": lambda i: dense_ffn(x, *pairs[i], stock[i]),
        "dense compiled": lambda i: compiled(x, *pairs[i], stock[i]),
        "dense compiled, gate and up stacked": lambda i: fused(x, stacked[i], stock[i]),
    }
    if autotune:
        tuned = torch.compile(dense_ffn, dynamic=False, mode="max-autotune-no-cudagraphs")
        runs["dense compiled, max-autotune"] = lambda i: tuned(x, *pairs[i], stock[i])
    return {name: graph_times(run, repeats, layers) for name, run in runs.items()}


def try_tiles(
    candidates: Sequence[Any],
    budget_s: float,
    measure: Callable[[Any], list[float]],
    mean: Callable[[list[float]], float] = statistics.geometric_mean,
    *,
    first: int = 0,
) -> list[tuple[float, Any, list[float]]]:
    """(mean, tiles, times at each sparsity), best first, as far as the time allows.

    The `first` candidates come first, the others in a fixed random order, so that a short time still sees all kinds.
    """
    end, found = time.monotonic() + budget_s, []
    order = torch.randperm(len(candidates) - first, generator=torch.Generator().manual_seed(0)) + first
    for index in (*range(first), *order.tolist()):
        if time.monotonic() > end:
            break
        try:
            times = measure(candidates[index])
        except Exception as error:  # a tile that does not fit the machine
            print("skipped", candidates[index], type(error).__name__, str(error)[:80])
            continue
        found.append((mean(times), candidates[index], times))
    return sorted(found, key=lambda entry: entry[0])


def row(benchmark: str, provider: str, tokens: int, sparsity: float, times: list[float], size: int) -> dict[str, Any]:
    """One measured row in the form of the result files; `size` in bytes."""
    found = Times.of(times)
    return {
        "benchmark": benchmark, "provider": provider, "dtype": "bfloat16", "batch": tokens, "tokens": tokens,
        "sparsity": sparsity, **asdict(found), "bytes": size, "gb_per_s": size / found.median_ms / 1e6,
    }  # fmt: skip


def command_of(script: str, arguments: Sequence[str] | None) -> str:
    """The command line that runs a script of this folder with some arguments, by default those of this process."""
    return shlex.join(["python", f"benchmarks/{script}.py", *(sys.argv[1:] if arguments is None else arguments)])


def write_rows(path: Path | None, rows: Sequence[dict[str, Any]], **header: Any) -> None:
    """Writes rows and what else a file says; hardware, versions and commit stand in the file and in every row."""
    if path is not None:
        where = environment()
        write_json_atomic(path, {**header, **where, "rows": [{**each, **where} for each in rows]})
