"""Whether trainings that differ in their processes went the same way: the logs of finished runs, beside the first one.

    lte train $S --batch-size 16 --output runs/one
    torchrun --nproc-per-node 2 -m lte train $S --batch-size 8 --output runs/ddp
    accelerate launch --config_file fsdp2.yaml --num_processes 2 -m lte train $S --batch-size 8 --output runs/fsdp2
    lte train $S --batch-size 16 --seed 1 --data-seed 1 --output runs/seed1
    python benchmarks/same_training.py runs/one runs/ddp runs/fsdp2 runs/seed1 --output results/processes.json

with the same settings S, `--logging-steps 1` among them. A run of another seed shows how far runs are apart anyway.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lte.files import write_json_atomic
from lte.records import environment, read_json

# Of each step: the share of neurons that were computed, what is to be learned, and the price of the target.
TERMS = ("active_fraction", "task_loss", "eta")
RESULTS = ("sparsity", "perplexity_before", "value", "tokens_trained", "wall_time_s", "hardware", "git_commit")


def read_run(folder: Path) -> dict[str, Any]:
    """The result of a run and what its log says of each step.

    Raises:
        ValueError: for a folder without the log of a finished run.
    """
    if not (folder / "training_log.json").is_file():
        raise ValueError(f"folders must be of finished runs of lte train, got {folder} without a training_log.json")
    result, log = read_json(folder / "result.json"), read_json(folder / "training_log.json")
    steps = {entry["step"]: {term: entry.get(term) for term in TERMS} for entry in log if "task_loss" in entry}
    return {"run": folder.name, **{name: result[name] for name in RESULTS}, "steps": steps}


def differences(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """For each term of the log the largest difference, where it is and the mean, over the steps that both have.

    Raises:
        ValueError: if they have none.
    """
    steps = sorted(one["steps"].keys() & other["steps"].keys())
    if not steps:
        raise ValueError(f"runs must have logged the same steps, got none of {one['run']} in {other['run']}")
    found: dict[str, Any] = {"steps": len(steps)}
    for term in TERMS:
        pairs = {step: (one["steps"][step][term], other["steps"][step][term]) for step in steps}
        apart = {step: abs(mine - theirs) for step, (mine, theirs) in pairs.items() if None not in (mine, theirs)}
        if apart:
            most = max(apart, key=lambda step: apart[step])
            found[term] = {"largest": apart[most], "step": most, "mean": sum(apart.values()) / len(apart)}
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", help="folders of lte train")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args(arguments)
    runs = [read_run(folder) for folder in args.runs]
    for run in runs:
        run["from_first"] = differences(runs[0], run)
        far = ", ".join(
            f"{term} {run['from_first'][term]['largest']:.2e}" for term in TERMS if term in run["from_first"]
        )
        print(f"{run['run']:>12}  sparsity {run['sparsity']:.4f}  perplexity {run['value']:.4f}  furthest: {far}")
    if args.output:
        write_json_atomic(args.output, {"benchmark": "same_training", "runs": runs, **environment()})


if __name__ == "__main__":
    main()
