"""The sparse FFN of LLaMA2-7B for 1 to 16 tokens on a GPU: how long a layer takes, against the best dense one.

    python benchmarks/decode_kernel.py --output results/decode_kernel.json
    python benchmarks/decode_kernel.py --tune tiles.json --output tuned.json

Every time is that of one CUDA graph that runs several layers with weights of their own, so that no cache holds them,
divided by the number of layers. The routing is forced through the real router: its weights are zero and its biases
say which experts are active, at random for every layer, the same for all tokens or for each its own.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import statistics
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from ffn_rows import dense_times, row, try_tiles
from torch import Tensor

from lte.bench.gate import relative_rms, require
from lte.bench.timing import copy_gb_per_s, graph_times
from lte.files import write_json_atomic
from lte.ops.arguments import FfnWeights, Routing
from lte.ops.decode import PHASES, DecodeLaunch, run_decode
from lte.ops.launch import ManyTokenTiles, OneTokenTiles, many_token_tiles, one_token_tiles
from lte.ops.reference import sparse_ffn_reference
from lte.records import environment

HIDDEN, NEURONS, EXPERT_SIZE, LAYERS = 4096, 11008, 32, 8
EXPERTS = NEURONS // EXPERT_SIZE
SPARSITIES = (0.0, 0.5, 0.8, 0.9)
Tiles = OneTokenTiles | ManyTokenTiles
TOLERANCE = 1e-2  # relative RMS in bf16


class Layers:
    """Random weights of `LAYERS` FFNs, and hidden states."""

    def __init__(self, tokens: int, sparsity: float, seed: int = 0):
        generator = torch.Generator("cuda").manual_seed(seed)

        def random(rows: int, columns: int, scale: float) -> Tensor:
            values = torch.empty(rows, columns, dtype=torch.bfloat16, device="cuda")
            return values.normal_(std=scale, generator=generator)

        self.x = random(tokens, HIDDEN, 1.0)
        self.ffns = [
            FfnWeights(
                gate=random(NEURONS, HIDDEN, HIDDEN**-0.5),
                up=random(NEURONS, HIDDEN, HIDDEN**-0.5),
                down=random(NEURONS, HIDDEN, NEURONS**-0.5),
            )
            for _ in range(LAYERS)
        ]
        self.routers = [torch.zeros(EXPERTS, HIDDEN, dtype=torch.bfloat16, device="cuda") for _ in range(LAYERS)]
        self.route(sparsity)

    def route(self, sparsity: float) -> None:
        """Another share of skipped experts, the same experts for all tokens."""
        self.active = round(EXPERTS * (1 - sparsity))
        self.routings = []
        for index, weight in enumerate(self.routers):
            order = torch.randperm(EXPERTS, generator=torch.Generator().manual_seed(index))
            bias = torch.full((EXPERTS,), -1.0)
            bias[order[: self.active]] = 1.0
            self.routings.append(Routing(weight=weight, bias=bias.cuda()))

    def bytes_read(self) -> int:
        """Bytes of weights that one layer needs: its active experts and the router."""
        return self.active * EXPERT_SIZE * HIDDEN * 3 * 2 + EXPERTS * HIDDEN * 2


def dense_rows(layers: Layers) -> dict[str, dict[str, Any]]:
    """Rows of dense FFNs; see `ffn_rows.dense_times`."""
    stock = [ffn.down.T.contiguous() for ffn in layers.ffns]
    stacked = [torch.cat([ffn.gate, ffn.up]) for ffn in layers.ffns]  # type: ignore[list-item]
    tokens, size = len(layers.x), 3 * HIDDEN * NEURONS * 2
    times = dense_times(layers.x, stacked, stock, autotune=True)
    return {name: row("ffn", name, tokens, 0.0, values, size) for name, values in times.items()}


def check(layers: Layers, tiles: Tiles) -> float:
    """The relative RMS error of the kernels; a `RuntimeError` above `TOLERANCE`, so that nothing wrong is timed."""
    ffn, routing = layers.ffns[0], layers.routings[0]
    found = run_decode(layers.x, ffn, routing, "silu", tiles)
    wanted = sparse_ffn_reference(layers.x, ffn, routing, "silu")
    return require(relative_rms(found, wanted), TOLERANCE, f"the FFN with {tiles}")


def sparse_times(layers: Layers, tiles: Tiles, repeats: int = 30) -> list[float]:
    """Times of the kernel, router included."""
    return graph_times(lambda i: run_decode(layers.x, layers.ffns[i], layers.routings[i], "silu", tiles), repeats)


def phase_times(layers: Layers, tiles: Tiles) -> dict[str, list[float]]:
    """Times of each phase alone, in launches of their own."""
    launches = [
        DecodeLaunch(layers.x, ffn, routing, "silu", tiles)
        for ffn, routing in zip(layers.ffns, layers.routings, strict=True)
    ]
    buffers = [launch.buffers(layers.x) for launch in launches]
    for launch, memory in zip(launches, buffers, strict=True):
        launch.run(layers.x, memory)

    def phase(index: int, layer: int) -> None:
        launches[layer].run(layers.x, buffers[layer], index, index)

    return {name: graph_times(functools.partial(phase, index), repeats=10) for index, name in enumerate(PHASES)}


def candidates(one_token: bool) -> tuple[list[Tiles], int]:
    """Tiles to try, and how many come first: those of the table, step by step, and what may take their place."""
    if one_token:
        steps = [OneTokenTiles(), OneTokenTiles(dependent=True)]
        others = [
            OneTokenTiles(block_n=n, warps=warps, stages=stages, per_sm=per_sm, dependent=True)
            for n, warps, stages, per_sm in itertools.product((1, 2, 4), (4, 8, 16), (2, 3, 4, 5), (1, 2))
            # Bytes in flight per multiprocessor, and shared memory.
            if 48_000 <= n * HIDDEN * 6 * (stages - 1) * per_sm <= 200_000 and warps * per_sm <= 16
        ]
        return [*steps, *(tiles for tiles in others if tiles not in steps)], len(steps)
    shares = ManyTokenTiles(dependent=True)
    equal = replace(shares, share=1, span=True, prefetch=4)
    many = [shares, equal]
    # Fewer and longer steps along D, more of them under way, and other shapes of the down projection.
    many += [replace(equal, block_n=16, block_k=512), replace(equal, block_k=512, stages=2)]
    many += [replace(equal, stages=5), replace(equal, block_k=128, stages=8), replace(equal, block_n=16, stages=8)]
    many += [replace(equal, block_d=64, down_stages=12), replace(equal, block_d=64), replace(equal, block_d=256)]
    many += [replace(equal, down_stages=4), replace(equal, warps=8), replace(equal, prefetch=2)]
    first = len(many)
    for n, k, share, warps, stages in itertools.product((16, 32), (128, 256), (4, 8, 16, 32), (4, 8), (3, 4, 6)):
        if share <= n and n * k * 4 * (stages - 1) >= 48_000 and (n * 4 + 32) * k * stages <= 220_000:
            many.append(ManyTokenTiles(block_n=n, block_k=k, share=share, warps=warps, stages=stages, dependent=True))
    return list(dict.fromkeys(many)), first


def tune(layers: Layers, start: Tiles, budget_s: float) -> Tiles:
    """The best of the candidates at 50, 80 and 90% sparsity, as far as the time allows; prints all that were tried."""
    tried, first = candidates(layers.x.shape[0] == 1)

    def measure(tiles: Tiles) -> list[float]:
        times = []
        for sparsity in (0.5, 0.8, 0.9):
            layers.route(sparsity)
            check(layers, tiles)
            times.append(statistics.median(sparse_times(layers, tiles, repeats=10)))
        return times

    def weigh(times: list[float]) -> float:  # by about what each takes, so that all three count alike
        return times[0] / 0.5 + times[1] / 0.3 + times[2] / 0.2

    found = try_tiles(tried, budget_s, measure, weigh, first=first)
    print(f"{len(found)} of {len(tried)} candidates")
    for _, tiles, times in found:
        values = " ".join(f"{name}={value}" for name, value in asdict(tiles).items())
        print(f"   {' '.join(f'{1e3 * time:.1f}' for time in times)} us at 50, 80, 90%: {values}", flush=True)
    return found[0][1] if found else start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--tune", type=Path, help="try tiles first, write the best here, and measure with them")
    parser.add_argument("--budget-s", type=float, default=100, help="seconds of trying per number of tokens")
    parser.add_argument("--output", type=Path, help="JSON file for the rows")
    args = parser.parse_args()
    rows, tuned = [], {}
    bandwidth = copy_gb_per_s(torch.device("cuda"))
    print(f"copy: {bandwidth:.0f} GB/s")
    for tokens in args.tokens:
        layers = Layers(tokens, 0.5)
        weight = layers.ffns[0].up
        one = tokens == 1
        tiles: Tiles = one_token_tiles(weight, EXPERT_SIZE) if one else many_token_tiles(weight, tokens, EXPERT_SIZE)
        if args.tune:
            tiles = tune(layers, tiles, args.budget_s)
            tuned[tokens] = asdict(tiles)
            args.tune.write_text(json.dumps(tuned, indent=1), encoding="utf-8")
        dense = dense_rows(layers)
        rows += dense.values()
        best = min(entry["median_ms"] for entry in dense.values())
        print(f"{tokens} tokens: " + ", ".join(f"{k} {1e3 * v['median_ms']:.1f} us" for k, v in dense.items()))
        for sparsity in SPARSITIES:
            layers.route(sparsity)
            error = check(layers, tiles)
            entry = row("ffn", "lte", tokens, sparsity, sparse_times(layers, tiles), layers.bytes_read())
            parts = {name: statistics.median(times) for name, times in phase_times(layers, tiles).items()}
            rows.append(
                {**entry, "phase_ms": parts, "relative_rms": error, "ratio_to_dense": entry["median_ms"] / best}
            )
            print(
                f"  {sparsity:.0%} lte: {1e3 * entry['median_ms']:.1f} us "
                f"({1e3 * entry['p20_ms']:.1f}-{1e3 * entry['p80_ms']:.1f}), {entry['gb_per_s']:.0f} GB/s, "
                f"{entry['median_ms'] / best:.3f} of dense; alone: "
                + ", ".join(f"{name} {1e3 * time:.1f}" for name, time in parts.items()),
                flush=True,
            )
        del layers
        torch.cuda.empty_cache()
    if args.output:
        record = {"rows": rows, "tiles": tuned, "copy_gb_per_s": bandwidth, **environment()}
        write_json_atomic(args.output, record)


if __name__ == "__main__":
    main()
