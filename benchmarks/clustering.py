"""How long grouping takes and how good it is, on weights of LLaMA-7B's and SmolLM2's shape.

python benchmarks/clustering.py --output results/clustering.json
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import torch

from lte.eval.results import environment, write_json_atomic
from lte.nn.clustering import group_neurons, inertia

SHAPES = {"LLaMA-7B": (11008, 4096), "SmolLM2-135M": (1536, 576)}
EXPERT_SIZE = 32


def weights(neurons: int, width: int, structured: bool, device: torch.device) -> torch.Tensor:
    """Gaussian rows, or as many Gaussian clusters as there are experts with noise of the same size."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(neurons, width, generator=generator)
    if structured:
        centres = torch.randn(neurons // EXPERT_SIZE, width, generator=generator)
        rows = rows + centres[torch.randint(0, len(centres), (neurons,), generator=generator)]
    return rows.to(device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows = []
    for name, (neurons, width) in SHAPES.items():
        for structured in (False, True):
            features = weights(neurons, width, structured, device)
            times = []
            for _ in range(args.repeats):
                start = time.perf_counter()
                order = group_neurons(features, num_neurons=neurons, expert_size=EXPERT_SIZE, method="kmeans", seed=0)
                times.append(time.perf_counter() - start)
            chance = group_neurons(None, num_neurons=neurons, expert_size=EXPERT_SIZE, method="random", seed=0)
            found, random = inertia(features, order, EXPERT_SIZE), inertia(features, chance, EXPERT_SIZE)
            row = {
                "shape": name, "neurons": neurons, "width": width, "structured": structured, "device": str(device),
                "seconds_median": statistics.median(times), "seconds_min": min(times), "seconds_max": max(times),
                "inertia": found, "inertia_random": random, "inertia_over_random": found / random,
            }  # fmt: skip
            rows.append(row)
            print(
                f"{name:>14} structured={structured!s:5} {row['seconds_median']:6.2f} s  inertia {found:.1f} "
                f"({100 * found / random:.1f}% of random)"
            )
    if args.output:
        write_json_atomic(args.output, {"benchmark": "clustering", "rows": rows, **environment()})


if __name__ == "__main__":
    main()
