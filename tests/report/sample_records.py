"""Records, a measurement, and a training log that the tests of the report layer share."""

from __future__ import annotations

from typing import Any

from lte.eval.sparsity import Measurement
from lte.records import ResultRecord


def measurement(**changes: Any) -> Measurement:
    """Two layers of four experts: the first with a dead and an always-on one, the second always on."""
    fields: dict[str, Any] = {
        "sparsity": 0.25,
        "tokens": 1000,
        "active_fraction": [0.5, 1.0],
        "expert_use": [[0.0, 1.0, 0.25, 0.75], [1.0, 1.0, 1.0, 1.0]],
        "score_histogram": [[0.25] * 2 + [0.0] * 36 + [0.25] * 2, [0.0] * 39 + [1.0]],
        "near_threshold": [0.125, 0.0],
    }
    return Measurement.from_dict({**fields, **changes})


def record(method: str = "lte", **changes: Any) -> ResultRecord:
    """A result record, at 50% sparsity unless it is dense."""
    sparsity = 0.0 if method == "dense" else 0.5
    fields: dict[str, Any] = {
        "task": "lm",
        "model": "tiny",
        "method": method,
        "seed": 0,
        "target_sparsity": sparsity,
        "sparsity": sparsity,
        "metric": "perplexity",
        "value": 20.0 if method == "dense" else 25.0,
        "split": "test",
        "flops_per_token": 2.0**30 * (2 if method == "dense" else 1),
        "bytes_per_token": 4e6 if method == "dense" else 3e6,
        "tokens_trained": 12_000_000,
        "wall_time_s": 61.2,
        "git_commit": None,
        "hardware": "a CPU, 2 cores",
        "versions": {"python": "3.11", "torch": "2.13"},
        "config": {},
    }
    return ResultRecord.from_dict({**fields, **changes})


def training_log(stage_steps: int = 40, distilled: bool = True, routed: bool = True) -> list[dict[str, Any]]:
    """Entries of both stages every 10 steps, and the run-time entry that ends each stage."""
    log: list[dict[str, Any]] = []
    for stage in (1, 2):
        for step in range(10, stage_steps + 1, 10):
            entry = {"stage": stage, "step": step, "task_loss": 3.0 - step / 100, "target_sparsity": 0.5}
            entry |= {"distillation_loss": 0.1 if distilled else 0.0, "eta": 0.1 if routed else 0.0}
            if routed:
                routing = {"efficiency_loss": 0.5, "separability_loss": 30.0, "near_threshold": 0.2}
                entry |= {**routing, "active_fraction": 1 - step / 80}
            log.append(entry)
        log.append({"stage": stage, "step": stage_steps + 2, "train_runtime": 1.0})
    return log
