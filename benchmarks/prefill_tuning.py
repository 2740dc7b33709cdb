"""Tiles of the kernels for many tokens: candidates are tried for a limited time, the best are printed."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from typing import Any, TypeVar

import torch
import triton
from ffn_rows import row, try_tiles
from prefill_layers import EXPERT_SIZE, Layers
from torch import Tensor
from torch.nn import functional

from lte.bench.gate import relative_rms, require
from lte.bench.timing import graph_times
from lte.ops.launch import multiprocessors
from lte.ops.prefill import GroupedLaunch, MaskedLaunch, SkinnyProduct
from lte.ops.prefill_launch import ActivationTiles, GroupedTiles, SkinnyTiles

TOLERANCE = 1e-2
SHOWN = 8
Tiles = TypeVar("Tiles", ActivationTiles, GroupedTiles, SkinnyTiles)
# Of `skinny_product_kernel`: block_n, block_k, warps, per_sm.
SKINNY_SHAPES = (
    (32, 64, 4, 0), (64, 64, 2, 0), (64, 32, 4, 0), (64, 64, 4, 0), (64, 64, 4, 4), (64, 128, 4, 0),
    (128, 32, 4, 0), (128, 64, 4, 0), (128, 64, 8, 0), (128, 32, 4, 2), (128, 64, 4, 2), (128, 64, 8, 2),
    (256, 32, 8, 1), (256, 64, 8, 1), (256, 128, 8, 1),
)  # fmt: skip
SHARED_MEMORY = 228 * 1024  # of a multiprocessor; every program takes 1 KiB more than it asks for


def grouped_candidates(tokens: int) -> Iterator[GroupedTiles]:
    """Tiles whose copies fit into the 227 KiB of shared memory of a multiprocessor."""
    for t, k, warps, stages, per_sm in itertools.product(
        (16, 32, 64, 128, 256), (32, 64, 128), (4, 8), (2, 3, 4, 5, 6), (1, 2, 3, 4)
    ):
        memory = (t + 2 * EXPERT_SIZE) * k * 2 * stages * per_sm
        # Numbers of the fp32 sums of a thread, half of its registers at most; enough bytes under way.
        sums = t * 2 * EXPERT_SIZE // (32 * warps)
        if 60_000 <= memory <= 225_000 and 4 <= sums <= 128 and warps * per_sm <= 16 and t <= max(16, tokens):
            yield GroupedTiles(block_t=t, block_k=k, warps=warps, stages=stages, per_sm=per_sm)


def activation_candidates() -> Iterator[ActivationTiles]:
    """Tiles of 8 to 64 numbers per thread."""
    for t, f, warps, skip in itertools.product((1, 2, 4, 8, 16), (256, 512, 1024, 2048), (2, 4, 8), (False, True)):
        if 8 <= t * f // (32 * warps) <= 64:
            yield ActivationTiles(block_t=t, block_f=f, warps=warps, skip=skip)


def skinny_candidates(tokens: int, rows: int, processors: int) -> Iterator[SkinnyTiles]:
    """Tiles all of whose programs run at once, with as many stages as the shared memory then holds, up to 10."""
    block_t = max(triton.next_power_of_2(tokens), 16)
    for (n, k, warps, per_sm), x_first in itertools.product(SKINNY_SHAPES, (False, True)):
        resident = per_sm or triton.cdiv(triton.cdiv(rows, n), processors)
        buffers = (SHARED_MEMORY // resident - 1024) // (2 * k * (n + block_t))
        warp_groups = warps % 4 == 0 and (block_t if x_first else n) >= 64
        # Products of warp groups still read one buffer while the next is waited for, others have copied it.
        stages = min(buffers if warp_groups else buffers + 1, 10)
        # At most half of the registers of a thread for sums, and 16 bytes of x for each.
        fits = n * block_t // (32 * warps) <= 128 and block_t * k >= 8 * 32 * warps
        if stages >= 3 and fits:
            yield SkinnyTiles(block_n=n, block_k=k, warps=warps, stages=stages, per_sm=per_sm, x_first=x_first)


def _try(
    name: str, candidates: list[Tiles], budget_s: float, measure: Callable[[Tiles], list[float]]
) -> list[tuple[float, Tiles, list[float]]]:
    """(mean, tiles, times at each sparsity), best first, as far as the time allows; prints the first ones."""
    found = try_tiles(candidates, budget_s, measure)
    print(f"{name}: {len(found)} of {len(candidates)} candidates")
    for _, tiles, times in found[:SHOWN]:
        print("  ", tiles, " ".join(f"{1e3 * value:.1f}" for value in times), "us", flush=True)
    return found


def tune_grouped(layers: Layers, count: int, budget_s: float, sparsities: tuple[float, ...] = (0.8, 0.9)) -> None:
    """Tries tiles of `grouped_kernel` at independent routing; the times include the zeros that it writes over."""
    tokens, lists, wanted = len(layers.x), [], []
    for sparsity in sparsities:
        layers.route(sparsity)
        lists.append([_list_tokens(layers, i) for i in range(count)])
        args = (layers.x, layers.ffns[0], layers.routings[0])
        wanted.append((MaskedLaunch(*args, "silu").activations(layers.x), layers.decided(0)))

    def measure(tiles: GroupedTiles) -> list[float]:
        times = []
        for per_layer, (right, sure) in zip(lists, wanted, strict=True):

            def run(i: int, per_layer: list[tuple[Tensor, Tensor]] = per_layer) -> Tensor:
                launch = GroupedLaunch(layers.x, layers.ffns[i], layers.routings[i], "silu", tiles)
                gate, up = launch.inputs(layers.x.dtype)
                return launch.group(layers.x, gate, up, *per_layer[i], launch.zeros(layers.x)[0])

            require(relative_rms(run(0)[sure], right[sure]), TOLERANCE, "the activations")
            times.append(statistics.median(graph_times(run, 5, count)))
        return times

    found = _try(f"grouped, {tokens} tokens", list(grouped_candidates(tokens)), budget_s, measure)
    for sparsity, value in zip(sparsities, found[0][2] if found else (), strict=False):
        flops = 4 * tokens * layers.widths.hidden * layers.widths.neurons * (1 - sparsity)
        print(f"   {sparsity:.0%}: {flops / value / 1e9:.0f} TFLOP/s of the needed products, zeros included")


def _list_tokens(layers: Layers, i: int) -> tuple[Tensor, Tensor]:
    launch = GroupedLaunch(layers.x, layers.ffns[i], layers.routings[i], "silu")
    _, counts = launch.zeros(layers.x)
    return counts, launch.list_tokens(counts, launch.router_products(layers.x))


def tune_activation(layers: Layers, count: int, budget_s: float, sparsities: tuple[float, ...] = (0.0, 0.8)) -> None:
    """Tries tiles of `masked_activation_kernel` at independent routing."""
    tokens, products = len(layers.x), []
    layers.route(0.0)
    for i in range(count):
        products.append(_project(layers, i))

    def measure(tiles: ActivationTiles) -> list[float]:
        times = []
        for sparsity in sparsities:
            layers.route(sparsity)
            times.append(statistics.median(graph_times(_activation(layers, products, tiles), 5, count)))
        return times

    _try(f"masked activation, {tokens} tokens", list(activation_candidates()), budget_s, measure)


def tune_skinny(layers: Layers, all_tokens: Sequence[int], count: int, budget_s: float) -> list[dict[str, Any]]:
    """Tries tiles of `skinny_product_kernel` for the product with gate, up and router; rows of the best and of cuBLAS.

    Numbers of tokens that are padded alike are tried together; the best tiles are then timed again beside cuBLAS.
    """
    stacked = [ffn.stacked for ffn in layers.ffns[:count] if ffn.stacked is not None]
    groups: dict[int, list[Tensor]] = {}
    for tokens in all_tokens:
        layers.take(tokens)
        groups.setdefault(triton.next_power_of_2(tokens), []).append(layers.x)
    rows: list[dict[str, Any]] = []
    for padded, states in groups.items():
        wanted = [x.float() @ stacked[0].float().T for x in states]

        def measure(tiles: SkinnyTiles, states: list[Tensor] = states, wanted: list[Tensor] = wanted) -> list[float]:
            for x, right in zip(states, wanted, strict=True):
                require(
                    relative_rms(SkinnyProduct(x, stacked[0], tiles)(x, stacked[0]), right), TOLERANCE, "the product"
                )
            return [statistics.median(graph_times(_skinny(x, stacked, tiles), 7, count)) for x in states]

        candidates = list(skinny_candidates(padded, len(stacked[0]), multiprocessors(layers.x.device)))
        found = _try(f"skinny product, up to {padded} tokens", candidates, budget_s / len(groups), measure)
        for x in states:
            rows += time_skinny(layers, x, stacked, [tiles for _, tiles, _ in found[:SHOWN]])
    return rows


def _skinny(x: Tensor, stacked: Sequence[Tensor], tiles: SkinnyTiles) -> Callable[[int], Tensor]:
    return lambda i: SkinnyProduct(x, stacked[i], tiles)(x, stacked[i])


def time_skinny(
    layers: Layers, x: Tensor, stacked: Sequence[Tensor], candidates: Sequence[SkinnyTiles], repeats: int = 30
) -> list[dict[str, Any]]:
    """Times of tiles and of cuBLAS for all rows and for gate and up alone, best first; printed too."""
    runs: dict[str, tuple[int, Callable[[int], Tensor]]] = {
        "cuBLAS, all rows": (len(stacked[0]), lambda i: functional.linear(x, stacked[i])),
        "cuBLAS, gate and up": (2 * layers.widths.neurons, lambda i: functional.linear(x, layers.gate_up[i])),
    }
    named = {str(tiles): tiles for tiles in candidates}
    runs |= {name: (len(stacked[0]), _skinny(x, stacked, tiles)) for name, tiles in named.items()}
    rows = []
    for name, (outputs, run) in runs.items():
        times = graph_times(run, repeats, len(stacked))
        size = 2 * (outputs * x.shape[1] + len(x) * (x.shape[1] + outputs))
        entry = row("skinny product", name, len(x), 0.0, times, size)
        rows.append(entry | {"rows": outputs, "tiles": asdict(named[name]) if name in named else None})
    goal = next(entry["median_ms"] for entry in rows if entry["rows"] == 2 * layers.widths.neurons)
    print(f"{len(x)} tokens: us, over cuBLAS for gate and up, GB/s")
    for entry in sorted(rows, key=lambda entry: entry["median_ms"]):
        entry["ratio_to_gate_up"] = entry["median_ms"] / goal
        numbers = f"{1e3 * entry['median_ms']:7.1f} {entry['ratio_to_gate_up']:.3f} {entry['gb_per_s']:5.0f}"
        print(f"   {numbers}  {entry['provider']}", flush=True)
    return rows


def _project(layers: Layers, i: int) -> tuple[Tensor | None, Tensor, Tensor]:
    return MaskedLaunch(layers.x, layers.ffns[i], layers.routings[i], "silu").project(layers.x)


def _activation(
    layers: Layers, products: list[tuple[Tensor | None, Tensor, Tensor]], tiles: ActivationTiles | None = None
) -> Callable[[int], Tensor]:
    def run(i: int) -> Tensor:
        return MaskedLaunch(layers.x, layers.ffns[i], layers.routings[i], "silu", tiles).mask(*products[i])

    return run


def activation_rows(layers: Layers, count: int, repeats: int) -> list[dict[str, Any]]:
    """Times of the elementwise kernel alone, and of inductor's for the dense FFN; printed too."""
    tokens, rows = len(layers.x), []
    layers.route(0.0)
    products = [_project(layers, i) for i in range(count)]
    gates = [torch.cat([gate, up], 1) for gate, up, _ in products]  # type: ignore[list-item]

    @torch.compile(dynamic=False)
    def fused(both: Tensor) -> Tensor:
        gate, up = both.chunk(2, dim=-1)
        return functional.silu(gate) * up

    size = 2 * tokens * (3 * layers.widths.neurons + layers.widths.experts)
    times = graph_times(lambda i: fused(gates[i]), repeats, count)
    rows.append(row("prefill", "inductor activation", tokens, 0.0, times, size))
    for sparsity in (0.0, 0.5, 0.8):
        layers.route(sparsity)
        times = graph_times(_activation(layers, products), repeats, count)
        rows.append(row("prefill", "lte masked activation", tokens, sparsity, times, size))
    shown = ", ".join(f"{r['provider']} {r['sparsity']:.0%} {1e3 * r['median_ms']:.1f}" for r in rows)
    print(f"  activation alone, us: {shown}")
    return rows
