"""Tiles of the kernels for many tokens: candidates are tried for a limited time, the best are printed."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from prefill_layers import EXPERT_SIZE, EXPERTS, HIDDEN, NEURONS, Layers
from timing import graph_times, row
from torch import Tensor
from torch.nn import functional

from lte.bench.gate import relative_rms
from lte.ops.prefill import group_activations, list_tokens, mask_activations, project
from lte.ops.prefill_launch import ActivationTiles, GroupedTiles

TOLERANCE = 1e-2
SHOWN = 8
Tiles = TypeVar("Tiles", ActivationTiles, GroupedTiles)


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


def _try(
    name: str, candidates: list[Tiles], budget_s: float, measure: Callable[[Tiles], list[float]]
) -> list[tuple[float, Tiles, list[float]]]:
    """(mean, tiles, times at each sparsity), best first, as far as the time allows; prints the first ones."""
    end, found = time.monotonic() + budget_s, []
    # In a fixed random order, so that a short time still sees all kinds.
    for index in torch.randperm(len(candidates), generator=torch.Generator().manual_seed(0)).tolist():
        if time.monotonic() > end:
            break
        try:
            times = measure(candidates[index])
        except Exception as error:  # a tile that does not fit the machine
            print("skipped", candidates[index], type(error).__name__, str(error)[:80])
            continue
        found.append((statistics.geometric_mean(times), candidates[index], times))
    found.sort(key=lambda entry: entry[0])
    print(f"{name}: {len(found)} of {len(candidates)} candidates")
    for _, tiles, times in found[:SHOWN]:
        print("  ", tiles, " ".join(f"{1e3 * value:.1f}" for value in times), "us", flush=True)
    return found


def tune_grouped(layers: Layers, count: int, budget_s: float, sparsities: tuple[float, ...] = (0.8, 0.9)) -> None:
    """Tries tiles of `grouped_kernel` at independent routing; the times include the zeros that it writes over."""
    tokens, lists, wanted = len(layers.x), [], []
    for sparsity in sparsities:
        layers.route(sparsity)
        lists.append([list_tokens(layers.x, routing) for routing in layers.routings[:count]])
        args = (layers.x, layers.ffns[0], layers.routings[0])
        wanted.append((mask_activations(*project(*args), *args[1:], "silu"), layers.decided(0)))

    def measure(tiles: GroupedTiles) -> list[float]:
        times = []
        for per_layer, (right, sure) in zip(lists, wanted, strict=True):

            def run(i: int, per_layer: list[tuple[Tensor, Tensor]] = per_layer) -> Tensor:
                return group_activations(layers.x, layers.ffns[i], *per_layer[i], "silu", tiles)

            if not relative_rms(run(0)[sure], right[sure]) <= TOLERANCE:
                raise RuntimeError("wrong result")
            times.append(statistics.median(graph_times(run, 5, count)))
        return times

    found = _try(f"grouped, {tokens} tokens", list(grouped_candidates(tokens)), budget_s, measure)
    for sparsity, value in zip(sparsities, found[0][2] if found else (), strict=False):
        flops = 4 * tokens * HIDDEN * NEURONS * (1 - sparsity)
        print(f"   {sparsity:.0%}: {flops / value / 1e9:.0f} TFLOP/s of the needed products, zeros included")


def tune_activation(layers: Layers, count: int, budget_s: float, sparsities: tuple[float, ...] = (0.0, 0.8)) -> None:
    """Tries tiles of `masked_activation_kernel` at independent routing."""
    tokens, products = len(layers.x), []
    layers.route(0.0)
    for i in range(count):
        products.append(project(layers.x, layers.ffns[i], layers.routings[i]))

    def measure(tiles: ActivationTiles) -> list[float]:
        times = []
        for sparsity in sparsities:
            layers.route(sparsity)
            times.append(statistics.median(graph_times(_activation(layers, products, tiles), 5, count)))
        return times

    _try(f"masked activation, {tokens} tokens", list(activation_candidates()), budget_s, measure)


def _activation(
    layers: Layers, products: list[tuple[Tensor | None, Tensor, Tensor]], tiles: ActivationTiles | None = None
) -> Callable[[int], Tensor]:
    return lambda i: mask_activations(*products[i], layers.ffns[i], layers.routings[i], "silu", tiles)


def activation_rows(layers: Layers, count: int, repeats: int) -> list[dict[str, Any]]:
    """Times of the elementwise kernel alone, and of inductor's for the dense FFN; printed too."""
    tokens, rows = len(layers.x), []
    layers.route(0.0)
    products = [project(layers.x, layers.ffns[i], layers.routings[i]) for i in range(count)]
    gates = [torch.cat([gate, up], 1) for gate, up, _ in products]  # type: ignore[list-item]

    @torch.compile(dynamic=False)
    def fused(both: Tensor) -> Tensor:
        gate, up = both.chunk(2, dim=-1)
        return functional.silu(gate) * up

    size = 2 * tokens * (3 * NEURONS + EXPERTS)
    times = graph_times(lambda i: fused(gates[i]), repeats, count)
    rows.append(row("prefill", "inductor activation", tokens, 0.0, times, size))
    for sparsity in (0.0, 0.5, 0.8):
        layers.route(sparsity)
        times = graph_times(_activation(layers, products), repeats, count)
        rows.append(row("prefill", "lte masked activation", tokens, sparsity, times, size))
    shown = ", ".join(f"{r['provider']} {r['sparsity']:.0%} {1e3 * r['median_ms']:.1f}" for r in rows)
    print(f"  activation alone, us: {shown}")
    return rows
