"""The sparse FFN for 1 to 8192 tokens on a GPU, in LLaMA2-7B's widths or others: every path against the best dense FFN.

    python benchmarks/prefill.py --output results/prefill.json
    python benchmarks/prefill.py --shape smollm2-135m --tokens 1 2 4 16 64 512
    python benchmarks/prefill.py --tokens 512 2048 --tune --budget-s 60
    python benchmarks/prefill.py --tune-skinny --budget-s 60 --output results/skinny_product.json

Prints the times, and the rows of break-even points that belong into `lte.ops.paths`. Every time is that of one CUDA
graph that runs several layers with weights of their own, divided by the number of layers. Routing goes through the
real router: `independent` draws its weights at random, so that every token has other experts; `same` sets them to zero
and says by the biases which experts all tokens need.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from ffn_rows import dense_times, row, write_rows
from prefill_layers import Layers, Widths
from prefill_tuning import activation_rows, tune_activation, tune_grouped, tune_skinny
from torch import Tensor

from lte.bench.gate import relative_rms, require
from lte.bench.timing import copy_gb_per_s, graph_times
from lte.ops.arguments import MAX_TOKENS
from lte.ops.decode import sparse_ffn_decode
from lte.ops.launch import architecture
from lte.ops.paths import BreakEven, FfnKind, break_even, propose_rows
from lte.ops.prefill import sparse_ffn_prefill
from lte.ops.reference import active_experts, sparse_ffn_reference

TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
SKINNY_TOKENS = (17, 32, 48, 64, 128)
SPARSITIES = (0.0, 0.5, 0.8, 0.9, 0.95)
TOLERANCE = 1e-2  # relative RMS in bf16
GROUPED_MARGIN = 0.98  # grouped is proposed where it gains 2% or more
ALLOWED = 1.02  # of the best dense time


def paths(layers: Layers, tokens: int) -> dict[str, Callable[[int], Tensor]]:
    """The paths that take so many tokens, as functions of the layer."""

    def prefill(path: str, i: int) -> Tensor:
        return sparse_ffn_prefill(layers.states[i], layers.ffns[i], layers.routings[i], "silu", path)

    def decode(i: int) -> Tensor:
        return sparse_ffn_decode(layers.states[i], layers.ffns[i], layers.routings[i], "silu")

    other = {"decode": decode} if tokens <= MAX_TOKENS else {"grouped": functools.partial(prefill, "grouped")}
    return {"masked": functools.partial(prefill, "masked"), **other}


def count_work(widths: Widths, path: str, tokens: int, active: float, union: float) -> tuple[int, int]:
    """(bytes, FLOPs) of an FFN: weights once, every activation written and read once."""
    hidden, neurons, experts = widths.hidden, widths.neurons, widths.experts
    matrix, states = hidden * neurons, 2 * tokens * hidden
    h, products = 2 * tokens * neurons, 2 * tokens * (2 * neurons + experts)
    weights = {"masked": 3.0, "grouped": 2 * union + 1, "decode": 3 * union}[path]
    activations = {"masked": 2 * products + 2 * h, "grouped": 3 * h, "decode": 0}[path]
    share = {"masked": 3.0, "grouped": 2 * active + 1, "decode": 3 * active}[path]
    size = 2 * (weights * matrix + experts * hidden) + activations + 2 * states
    return round(size), round(2 * tokens * (share * matrix + experts * hidden))


def effort(widths: Widths, tokens: int) -> tuple[int, int]:
    """(layers, repeats): fewer where a layer takes long."""
    if tokens <= 256 or widths.layers > 8:  # narrow ones, of which a few would stay in the L2 cache
        return widths.layers, 20
    return (4, 12) if tokens <= 1024 else (2, 8)


def dense_rows(layers: Layers, tokens: int, autotune: bool = False) -> list[dict[str, Any]]:
    """A row for each dense FFN, for the T hidden states that the layers have taken."""
    count, repeats = effort(layers.widths, tokens)
    size, flops = count_work(layers.widths, "masked", tokens, 1, 1)
    found = dense_times(layers.x, layers.gate_up, layers.stock_down, repeats=repeats, layers=count, autotune=autotune)
    return [row("prefill", name, tokens, 0.0, times, size) | {"flops": flops} for name, times in found.items()]


def measure(layers: Layers, tokens: int, best: float) -> Iterator[dict[str, Any]]:
    """A row for every path, routing and sparsity; a `RuntimeError` where an output is wrong."""
    count, repeats = effort(layers.widths, tokens)
    for routing in ("independent", "same") if tokens > 1 else ("same",):
        for sparsity in SPARSITIES:
            layers.route(sparsity, same=routing == "same")
            mask = active_experts(layers.x, layers.routings[0])
            active, union = mask.float().mean().item(), mask.any(0).float().mean().item()
            wanted = sparse_ffn_reference(layers.x, layers.ffns[0], layers.routings[0], "silu")
            sure = layers.decided(0)
            for name, run in paths(layers, tokens).items():
                error = require(relative_rms(run(0)[sure], wanted[sure]), TOLERANCE, f"the output by {name}")
                size, flops = count_work(layers.widths, name, tokens, active, union)
                entry = row("prefill", f"lte {name}", tokens, sparsity, graph_times(run, repeats, count), size)
                entry |= {"routing": routing, "active_fraction": active, "union": union, "relative_rms": error}
                yield entry | {"flops": flops, "ratio_to_dense": entry["median_ms"] / best}


def find_break_even(tokens: int, rows: list[dict[str, Any]]) -> BreakEven:
    """The limits of decode and grouped for one number of tokens."""
    times = {(r["provider"], r["routing"], r["sparsity"]): r["median_ms"] for r in rows}
    decode: dict[float, float] = defaultdict(float)
    grouped: dict[str, dict[float, float]] = defaultdict(dict)
    for r in rows:
        ratio = r["median_ms"] / times["lte masked", r["routing"], r["sparsity"]]
        if r["provider"] == "lte decode":
            decode[r["union"]] = max(decode[r["union"]], ratio)
        elif r["provider"] == "lte grouped":
            grouped[r["routing"]][r["active_fraction"]] = ratio
    limits = [break_even(ratios, GROUPED_MARGIN) for ratios in grouped.values()]
    return BreakEven(tokens=tokens, decode=break_even(decode), grouped=min(limits, default=0.0))


def print_point(tokens: int, dense: dict[str, float], rows: list[dict[str, Any]]) -> None:
    """The times of one number of tokens in us: a line per path and routing, a column per sparsity."""
    best = min(dense.values())
    print(f"{tokens} tokens, us: " + ", ".join(f"{name} {1e3 * value:.1f}" for name, value in dense.items()))
    for key in dict.fromkeys((r["provider"], r["routing"]) for r in rows):
        found = [r for r in rows if (r["provider"], r["routing"]) == key]
        cells = " ".join(f"{1e3 * r['median_ms']:8.1f} ({r['median_ms'] / best:.3f})" for r in found)
        slow = max(r["median_ms"] for r in found) > ALLOWED * best
        print(f"  {key[0]:12} {key[1]:12} {cells}" + ("  above 1.02 of dense somewhere" if slow else ""), flush=True)


def print_table(points: list[BreakEven], kind: FfnKind) -> None:
    """What to write into `lte.ops.paths.MEASURED`."""
    print(f"    {kind}: (")
    for entry in propose_rows(points):
        print(f"        {entry},")
    print("    ),")


def tune(layers: Layers, chosen: Sequence[int] | None, budget_s: float, skinny_alone: bool) -> list[dict[str, Any]]:
    """Tries tiles of all kernels, or of `skinny_product_kernel` alone, whose rows are returned."""
    if skinny_alone:
        return tune_skinny(layers, chosen or SKINNY_TOKENS, layers.widths.layers, budget_s)
    all_tokens = chosen or TOKENS
    for tokens in all_tokens:
        layers.take(tokens)
        tune_activation(layers, effort(layers.widths, tokens)[0], budget_s / 4)
        tune_grouped(layers, effort(layers.widths, tokens)[0], budget_s)
    few = [tokens for tokens in all_tokens if MAX_TOKENS < tokens <= max(SKINNY_TOKENS)]
    return tune_skinny(layers, few, layers.widths.layers, budget_s) if few else []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="llama2-7b", help="whose widths, a shape of lte bench")
    parser.add_argument("--tokens", type=int, nargs="+", help="numbers of tokens, by default those that matter")
    parser.add_argument("--tune", action="store_true", help="try tiles and print the best, and measure nothing else")
    parser.add_argument("--tune-skinny", action="store_true", help="the same for the product of few tokens alone")
    parser.add_argument(
        "--budget-s", type=float, default=60, help="seconds of trying per number of tokens, in all of --tune-skinny"
    )
    parser.add_argument("--autotune-dense", action="store_true", help="also inductor's max-autotune, which takes long")
    parser.add_argument("--activation", action="store_true", help="also the elementwise kernel alone, with inductor's")
    parser.add_argument("--output", type=Path, help="JSON file for the rows")
    args = parser.parse_args()
    layers, start = Layers(Widths.of(args.shape)), time.monotonic()
    if args.tune or args.tune_skinny:
        found = tune(layers, args.tokens, args.budget_s, skinny_alone=args.tune_skinny)
        write_rows(args.output, found)
        return
    bandwidth = copy_gb_per_s(torch.device("cuda"))
    print(f"copy: {bandwidth:.0f} GB/s; columns: sparsity {', '.join(f'{s:.0%}' for s in SPARSITIES)}")
    rows: list[dict[str, Any]] = []
    points = []
    for tokens in args.tokens or TOKENS:
        layers.take(tokens)
        count, repeats = effort(layers.widths, tokens)
        dense = dense_rows(layers, tokens, args.autotune_dense)
        medians = {entry["provider"]: entry["median_ms"] for entry in dense}
        found = list(measure(layers, tokens, min(medians.values())))
        points.append(find_break_even(tokens, found))
        print_point(tokens, medians, found)
        rows += [*dense, *found]
        if args.activation:
            rows += activation_rows(layers, count, repeats)
        # A run that is cut off has kept what it measured.
        write_rows(args.output, rows, shape=args.shape, copy_gb_per_s=bandwidth)
    print_table(points, FfnKind(architecture(layers.x.device), 2, True, layers.widths.weight_bytes))
    worst = max((r for r in rows if r["provider"] == "lte masked"), key=lambda r: r["ratio_to_dense"])
    print(f"masked at worst {worst['ratio_to_dense']:.3f} of dense, at {worst['tokens']} tokens")
    spread = statistics.median((r["p80_ms"] - r["p20_ms"]) / r["median_ms"] for r in rows)
    print(f"median spread p20 to p80 {spread:.2%}; {time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main()
