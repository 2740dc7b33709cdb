"""Where the time of a compiled decoding step goes, by kernel, under several settings of inductor and of attention.

    python benchmarks/decode_step.py --output results/decode_step.json

LLaMA2-7B's shape with fewer layers, random weights and forced routing, batch 1: a step's time is that of its layers, of
the language model's head, and of what happens once. `lte bench` measures the whole model with the settings that won.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from ffn_rows import write_rows
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from lte.bench.bytes import ffn_bytes, other_bytes, router_bytes
from lte.bench.decode import REDUCE_OVERHEAD, TUNING, Decoder
from lte.bench.dense import Projections
from lte.bench.models import ModelPair, model_pair
from lte.bench.routing import active_count, force_same_
from lte.bench.shapes import random_model, shape_config

PDL = {"triton.enable_pdl": True}
SETTINGS = {
    "reduce-overhead": REDUCE_OVERHEAD,
    "tuned": TUNING,
    "tuned, dependent launches": {**TUNING, **PDL},
    "max-autotune": {**REDUCE_OVERHEAD, "max_autotune": True},
}
PROMPT, CONTEXT, STEPS, PROFILED = 64, 256, 60, 5


def step_times(decoder: Decoder, run: Callable[[], Tensor]) -> list[float]:
    """Milliseconds of steps in a row, the next token's copy included."""
    events = [torch.cuda.Event(enable_timing=True) for _ in range(STEPS + 1)]
    events[0].record()
    for event in events[1:]:
        decoder.next_token()
        run()
        event.record()
    torch.cuda.synchronize()
    return [a.elapsed_time(b) for a, b in itertools.pairwise(events)]


def kernel_times(decoder: Decoder, run: Callable[[], Tensor]) -> list[dict[str, Any]]:
    """Kernels of a step by name: how often each runs, and how long all its runs take, longest first."""
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as record:
        for _ in range(PROFILED):
            decoder.next_token()
            run()
        torch.cuda.synchronize()
    counts: Counter[str] = Counter()
    times: defaultdict[str, float] = defaultdict(float)
    for event in record.events():
        if event.device_type == DeviceType.CUDA:
            counts[event.name] += 1
            times[event.name] += event.time_range.elapsed_us()
    order = sorted(times, key=lambda name: -times[name])
    return [
        {"kernel": name[:120], "per_step": counts[name] / PROFILED, "us_per_step": times[name] / PROFILED}
        for name in order
    ]


def step_bytes(pair: ModelPair, sparsity: float | None) -> int:
    """Bytes that a step must move, counted as `lte bench` does: of the dense model, or at a forced sparsity."""
    ffn, stock = pair.sparse_ffns[0], Projections.of(pair.dense_ffns[0], pair.family.layout)
    share = 1.0 if sparsity is None else active_count(ffn.num_experts, sparsity) / ffn.num_experts
    size = ffn_bytes(stock, 1, share) + (0 if sparsity is None else router_bytes(ffn))
    return round(other_bytes(pair, 1, CONTEXT) + len(pair.sparse_ffns) * size)


def measure(pair: ModelPair, ids: Tensor, attention: str, name: str, sparsity: float | None) -> dict[str, Any]:
    """One row: the dense model, or the sparse one at a forced sparsity."""
    model = pair.dense if sparsity is None else pair.sparse
    model.set_attn_implementation(attention)
    if sparsity is not None:
        force_same_(pair.sparse_ffns, sparsity, 0)
    decoder = Decoder(model, ids, PROMPT, CONTEXT)
    provider = "dense" if sparsity is None else "lte"
    run = decoder.checked(SETTINGS[name], f"{provider}, {attention}, {name}")
    times = step_times(decoder, run)
    cuts = statistics.quantiles(times, n=5)
    kernels, median, size = kernel_times(decoder, run), statistics.median(times), step_bytes(pair, sparsity)
    row = {
        "benchmark": "decode", "provider": provider, "dtype": "bfloat16", "batch": 1, "tokens": 1,
        "sparsity": sparsity or 0.0, "attention": attention, "settings": name, "layers": len(pair.sparse_ffns),
        "median_ms": median, "p20_ms": cuts[0], "p80_ms": cuts[3], "bytes": size, "gb_per_s": size / median / 1e6,
        "kernels": kernels[:30],
        "kernels_ms": sum(kernel["us_per_step"] for kernel in kernels) / 1e3,
        "launches": sum(kernel["per_step"] for kernel in kernels),
    }  # fmt: skip
    print(
        f"{provider:>5} {row['sparsity']:.0%} {attention:>5} {name:<26} {row['median_ms']:.3f} ms "
        f"({row['p20_ms']:.3f}-{row['p80_ms']:.3f}), kernels {row['kernels_ms']:.3f} ms in {row['launches']:.0f}",
        flush=True,
    )
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--attention", nargs="+", default=["sdpa", "eager"])
    parser.add_argument("--settings", nargs="+", default=list(SETTINGS), choices=list(SETTINGS))
    parser.add_argument("--sparsities", type=float, nargs="+", default=[0.9])
    parser.add_argument("--show", type=int, default=12, help="kernels to print per row")
    parser.add_argument("--output", type=Path, help="JSON file for the rows")
    args = parser.parse_args()
    device = torch.device("cuda")
    pair = model_pair(random_model(shape_config("llama2-7b", args.layers), device, torch.bfloat16, 0))
    ids = torch.randint(0, 32000, (1, CONTEXT), device=device, generator=torch.Generator(device).manual_seed(0))
    rows = []
    with torch.no_grad():
        for attention, name in itertools.product(args.attention, args.settings):
            for sparsity in (None, *args.sparsities):
                torch.compiler.reset()
                rows.append(measure(pair, ids, attention, name, sparsity))
                for kernel in rows[-1]["kernels"][: args.show]:
                    print(
                        f"        {kernel['us_per_step']:8.1f} us in {kernel['per_step']:5.1f}  {kernel['kernel'][:90]}"
                    )
                write_rows(args.output, rows)


if __name__ == "__main__":
    main()
