"""How long grouping takes and how good it is, on weights of LLaMA-7B's and SmolLM2's shape, by device.

python benchmarks/clustering.py --output results/clustering.json
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from pathlib import Path

import torch

from lte.files import write_json_atomic
from lte.nn.clustering import group_neurons, inertia
from lte.records import environment

SHAPES = {"LLaMA-7B": (11008, 4096), "SmolLM2-135M": (1536, 576)}
EXPERT_SIZE = 32


def weights(neurons: int, width: int, structured: bool) -> torch.Tensor:
    """Gaussian rows, or as many Gaussian clusters as there are experts with noise of the same size."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(neurons, width, generator=generator)
    if structured:
        centres = torch.randn(neurons // EXPERT_SIZE, width, generator=generator)
        rows += centres[torch.randint(0, len(centres), (neurons,), generator=generator)]
    return rows


def hardware(device: torch.device) -> str:
    """The GPU's name, or the processor's and how many threads torch gives it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()}, {torch.get_num_threads()} threads"


def timed_orders(features: torch.Tensor, method: str, repeats: int) -> tuple[list[torch.Tensor], list[float]]:
    """The order of every repeat and its seconds, after one run on a small slice to start the libraries."""
    orders, seconds = [], []
    group_neurons(features[:64], num_neurons=64, expert_size=EXPERT_SIZE, method="kmeans", seed=0)
    for _ in range(repeats):
        # The order arrives on the CPU, so the clock stops after the device's work.
        start = time.perf_counter()
        order = group_neurons(features, num_neurons=len(features), expert_size=EXPERT_SIZE, method=method, seed=0)  # type: ignore[arg-type]
        seconds.append(time.perf_counter() - start)
        orders.append(order)
    return orders, seconds


def measure(name: str, structured: bool, device: torch.device, repeats: int) -> dict[str, object]:
    """One row of the table: k-means on one kind of weights on one device, against random groups."""
    features = weights(*SHAPES[name], structured).to(device)
    orders, seconds = timed_orders(features, "kmeans", repeats)
    # No timing counts unless the result is right: a permutation, and the same one every time.
    if not orders[0].sort().values.equal(torch.arange(len(features))):
        raise RuntimeError(f"the order on {device} is no permutation")
    if not all(order.equal(orders[0]) for order in orders):
        raise RuntimeError(f"the same seed gave different orders on {device}")
    found = inertia(features, orders[0], EXPERT_SIZE)
    chance = inertia(features, timed_orders(features, "random", 1)[0][0], EXPERT_SIZE)
    return {
        "device": device.type, "hardware": hardware(device), "model": name, "shape": SHAPES[name],
        "data": "structured" if structured else "gaussian", "method": "kmeans", "expert_size": EXPERT_SIZE,
        "repeats": repeats, "seconds_median": statistics.median(seconds), "seconds_min": min(seconds),
        "seconds_max": max(seconds), "inertia": found, "inertia_random": chance, "ratio": found / chance,
        "order_checksum": int((orders[0] * torch.arange(len(features))).sum()),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    rows = []
    print(f"{'device':>6} {'model':>13} {'data':>11} {'median s':>9} {'min':>6} {'max':>6} {'of random inertia':>18}")
    for name in SHAPES:
        for structured in (False, True):
            for device in devices:
                row = measure(name, structured, torch.device(device), args.repeats)
                rows.append(row)
                print(
                    f"{row['device']:>6} {name:>13} {row['data']:>11} {row['seconds_median']:9.2f} "
                    f"{row['seconds_min']:6.2f} {row['seconds_max']:6.2f} {row['ratio']:18.4f}"
                )
    if args.output:
        write_json_atomic(args.output, {"benchmark": "clustering", "rows": rows, **environment()})


if __name__ == "__main__":
    main()
