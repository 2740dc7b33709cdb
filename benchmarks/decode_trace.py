"""Where the time of `decode_one_kernel` goes: clock stamps in a copy of it, LLaMA2-7B's widths, one token.

    python benchmarks/decode_trace.py --output results/decode_kernel/trace.json

Every program stores the multiprocessor's clock and the GPU's timer between the parts of the kernel. The launches are
those of one CUDA graph over several layers, each of which begins while the one before it ends. The stamps themselves
cost little: the layer's time is printed beside that of the kernel without them.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from decode_kernel import Layers, sparse_times

from lte.bench.timing import graph_times
from lte.files import write_json_atomic
from lte.ops import decode, one_token_kernel
from lte.ops.launch import one_token_tiles
from lte.records import environment

# Parts of the kernel, each from the stamp before it: waiting for the kernel before this one, the router's products,
# hearing of the other programs' experts, finding the share, its weights, waiting for all programs, their sum.
PARTS = ("await", "route", "wait", "share", "stream", "barrier", "sum")
STAMPS = 8
_STAMP = """
@triton.jit
def stamp(trace, slot):
    clock = tl.inline_asm_elementwise("mov.u64 $0, %clock64;", "=l", [], dtype=tl.int64, is_pure=False, pack=1)
    timer = tl.inline_asm_elementwise("mov.u64 $0, %globaltimer;", "=l", [], dtype=tl.int64, is_pure=False, pack=1)
    tl.store(trace + (tl.program_id(0) * 2) * 8 + slot, clock)
    tl.store(trace + (tl.program_id(0) * 2 + 1) * 8 + slot, timer)


@triton.jit
def decode_one_kernel(
    trace,
    x,"""
# (in the kernel's source, what stands there in the copy)
_EDITS = (
    ("\n@triton.jit\ndef decode_one_kernel(\n    x,", _STAMP),
    ("    if DEPENDENT:\n", "    stamp(trace, 0)\n    if DEPENDENT:\n"),
    ("    tag = tl.load(counters + 2)\n", "    stamp(trace, 1)\n    tag = tl.load(counters + 2)\n"),
    ("        needed = wait_for_masks(", "        stamp(trace, 2)\n        needed = wait_for_masks("),
    ("        neurons = tl.sum(", "        tl.debug_barrier()\n        stamp(trace, 3)\n        neurons = tl.sum("),
    (
        "        total = _stream_neurons(",
        "        tl.debug_barrier()\n        stamp(trace, 4)\n        total = _stream_neurons(",
    ),
    (
        "        grid_sync(counters, P)\n",
        "        tl.debug_barrier()\n        stamp(trace, 5)\n"
        "        grid_sync(counters, P)\n        stamp(trace, 6)\n",
    ),
    ("        tl.store(out + columns", "        stamp(trace, 7)\n        tl.store(out + columns"),
)


def traced_kernel(folder: Path) -> Any:
    """The kernel with stamps; its first argument is an int64 tensor [P, 2, STAMPS] for clocks and timers.

    Raises:
        RuntimeError: if a place for a stamp is not where it was.
    """
    source = Path(one_token_kernel.__file__).read_text(encoding="utf-8")
    for before, after in _EDITS:
        if source.count(before) != 1:
            raise RuntimeError(f"the kernel must hold one {before!r}, got {source.count(before)}; adapt _EDITS")
        source = source.replace(before, after)
    path = folder / "traced_kernel.py"  # Triton reads the source of what it compiles
    path.write_text(source, encoding="utf-8")
    spec = importlib.util.spec_from_file_location("traced_kernel", path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules["traced_kernel"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.decode_one_kernel


class TracedKernel:
    """Stands in for `decode_one_kernel` in a launch."""

    def __init__(self, kernel: Any, trace: torch.Tensor):
        self.kernel, self.trace = kernel, trace

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def run(
            *args: Any, **kwargs: Any
        ) -> None:  # gives back no compiled kernel, which would miss the first argument
            self.kernel[grid](self.trace, *args, **kwargs)

        return run


def measure(layers: Layers, kernel: Any, sparsity: float) -> dict[str, Any]:
    """Microseconds of each part at one sparsity: mean over programs and layers, and of the slowest program."""
    layers.route(sparsity)
    tiles = one_token_tiles(layers.ffns[0].up, layers.ffns[0].up.shape[0] // layers.routings[0].num_experts)
    plain_us = 1e3 * statistics.median(sparse_times(layers, tiles, 20))  # type: ignore[arg-type]
    launches = []
    for ffn, routing in zip(layers.ffns, layers.routings, strict=True):
        launch = decode.DecodeLaunch(layers.x, ffn, routing, "silu", tiles)
        trace = torch.zeros(launch.programs, 2, STAMPS, dtype=torch.int64, device="cuda")
        launch._kernel = TracedKernel(kernel, trace)
        launches.append((launch, trace))
    traced_us = 1e3 * statistics.median(graph_times(lambda i: launches[i][0](layers.x), 20))
    stamps = torch.stack([trace for _, trace in launches]).double().cpu()
    clocks, timers = stamps[:, :, 0], stamps[:, :, 1]
    ghz = ((clocks[..., -1] - clocks[..., 1]) / (timers[..., -1] - timers[..., 1])).median().item()
    parts = clocks.diff(dim=-1) / ghz / 1e3
    first, last = timers[..., 1].amin(1), timers[..., -1].amax(1)
    return {
        "sparsity": sparsity, "layer_us": plain_us, "traced_layer_us": traced_us, "clock_ghz": ghz,
        "mean_us": dict(zip(PARTS, parts.mean((0, 1)).tolist(), strict=True)),
        "slowest_us": dict(zip(PARTS, parts.amax(1).mean(0).tolist(), strict=True)),
        "from_inputs_to_outputs_us": ((last - first) / 1e3).mean().item(),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sparsities", type=float, nargs="+", default=[0.0, 0.5, 0.8, 0.9])
    parser.add_argument("--output", type=Path, help="JSON file for the rows")
    args = parser.parse_args()
    layers = Layers(1, 0.5)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        kernel = traced_kernel(Path(folder))
        for sparsity in args.sparsities:
            rows.append(measure(layers, kernel, sparsity))
            row = rows[-1]
            print(f"{sparsity:.0%}: {row['layer_us']:.1f} us, with stamps {row['traced_layer_us']:.1f}")
            for key in ("mean_us", "slowest_us"):
                print(
                    f"   {key:10} " + ", ".join(f"{name} {value:.2f}" for name, value in row[key].items()), flush=True
                )
    if args.output:
        write_json_atomic(args.output, {"rows": rows, **environment()})


if __name__ == "__main__":
    main()
