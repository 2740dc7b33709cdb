"""Timing of functions side by side, and the machine's own speed: how fast it copies plain memory."""

from __future__ import annotations

import functools
import itertools
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

Call = Callable[[], object]
WARM_UP = 3
SECONDS = 5.0
LEAST_REPEATS = 5
GPU_TURN = 5
# Read before each timed call on a CPU, so that nobody finds its weights in the cache.
SWEEP_BYTES = 1 << 28


@dataclass(frozen=True)
class Times:
    """Median and percentiles of repeated calls, in milliseconds."""

    median_ms: float
    p20_ms: float
    p80_ms: float

    @staticmethod
    def of(samples_ms: list[float]) -> Times:
        """From at least one time."""
        if len(samples_ms) == 1:
            return Times(*samples_ms * 3)
        cuts = statistics.quantiles(samples_ms, n=5, method="inclusive")
        return Times(statistics.median(samples_ms), cuts[0], cuts[3])


def captured(run: Call, device: torch.device) -> Call:
    """On a GPU the replay of one CUDA graph of `run`, elsewhere `run` itself.

    The graph holds what `run` does on the tensors that it finds: change these in place.
    """
    if device.type != "cuda":
        return run
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(2):  # compilation, then what the first call after it does
            run()
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = run()

    # The graph knows addresses alone: what `run` refers to must stay where it is.
    def replay(_: object = (run, kept)) -> None:
        graph.replay()

    return replay


def interleaved_times(
    runs: Mapping[str, Call], device: torch.device, repeats: int, before: Callable[[str], object] | None = None
) -> dict[str, list[float]]:
    """Milliseconds of each call of each function; they take turns.

    On a GPU a turn is `GPU_TURN` calls after one that is not timed: the CPU is then ahead of the GPU, as it is in a
    loop of the same steps, and what it does between two launches does not count. On a CPU a turn is one call.

    Args:
        runs: functions by name.
        device: where they run; on a GPU times are those between two events around the call.
        repeats: timed calls of each; fewer, but at least `LEAST_REPEATS`, if they take longer than `SECONDS`.
        before: called with the name before each call, not timed.
    """
    end = time.monotonic() + SECONDS
    on_gpu = device.type == "cuda"
    clock, turn, untimed = (_gpu_sample, GPU_TURN, 1) if on_gpu else (_cpu_sample, 1, 0)
    samples: dict[str, list[Callable[[], float]]] = {name: [] for name in runs}
    done = -min(WARM_UP, repeats)
    while done < repeats and not (done >= LEAST_REPEATS and time.monotonic() > end):
        calls = 1 if done < 0 else min(turn, repeats - done)
        for name, run in runs.items():
            for call in range(-untimed, calls):
                if before is not None:
                    before(name)
                sample = clock(run)
                if call >= 0 and done >= 0:
                    samples[name].append(sample)
        done += calls
    if on_gpu:
        torch.cuda.synchronize(device)
    return {name: [sample() for sample in found] for name, found in samples.items()}


def _gpu_sample(run: Call) -> Callable[[], float]:
    """The call's time, to be asked for when the GPU is done."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    return lambda: start.elapsed_time(end)


def _cpu_sample(run: Call) -> Callable[[], float]:
    _sweep(SWEEP_BYTES).sum()
    start = time.perf_counter()
    run()
    elapsed_ms = 1e3 * (time.perf_counter() - start)
    return lambda: elapsed_ms


@functools.cache
def _sweep(size: int) -> Tensor:
    return torch.ones(max(size // 4, 1))


def graph_times(run: Callable[[int], object], repeats: int = 30, layers: int = 8) -> list[float]:
    """Milliseconds per layer of `run(layer)` on a GPU, captured over all layers in one CUDA graph."""
    replay = captured(lambda: [run(layer) for layer in range(layers)], torch.device("cuda"))
    for _ in range(WARM_UP):
        replay()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    events[0].record()
    for event in events[1:]:
        replay()
        event.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) / layers for start, end in itertools.pairwise(events)]


def copy_gb_per_s(device: torch.device) -> float:
    """GB/s when plain memory is copied, bytes read and written counted: up to 2 GiB on a GPU, 256 MiB on a CPU."""
    size = 1 << 28
    if device.type == "cuda":
        size = min(1 << 31, torch.cuda.mem_get_info(device)[0] // 8)
    source = torch.ones(size // 4, device=device)
    target = torch.empty_like(source)
    # Not as part of a CUDA graph, whose copies are slower than those of a plain call.
    times = interleaved_times({"copy": lambda: target.copy_(source)}, device, repeats=10)["copy"]
    return 2 * source.nbytes / statistics.median(times) / 1e6
