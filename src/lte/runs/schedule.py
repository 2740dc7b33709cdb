"""What the runs of a comparison will take, before they are done."""

from __future__ import annotations

import math
from dataclasses import dataclass

from lte.data.rows import mean_row_tokens
from lte.runs.folders import Folders
from lte.runs.plan import Run
from lte.runs.workloads import Workloads


@dataclass(frozen=True)
class Estimate:
    """One line of a dry run.

    Attributes:
        run: which.
        steps: optimiser steps.
        tokens: about, in all forward passes with a backward pass.
        done: whether its record exists.
    """

    run: Run
    steps: int
    tokens: int
    done: bool


def estimate_runs(runs: list[Run], workloads: Workloads, folders: Folders) -> list[Estimate]:
    """Steps and tokens of every run, from the rows that it would train on."""
    return [_estimate(run, workloads, run.measured and folders.has_record(run)) for run in runs]


def _estimate(run: Run, workloads: Workloads, done: bool) -> Estimate:
    if not run.trains:
        return Estimate(run, 0, 0, done)
    rows, config = workloads.of(run).train, run.train_config
    whole, rest = divmod(len(rows), config.batch_size)
    batches = whole + bool(rest and not config.leaves_out_last_batch(len(rows)))
    per_epoch = max(1, math.ceil(batches / config.gradient_accumulation_steps))
    budget = {1: (config.stage1_steps, config.stage1_epochs), 2: (config.stage2_steps, config.stage2_epochs)}
    steps = sum(
        given if given > 0 else math.ceil(epochs * per_epoch)
        for stage, (given, epochs) in budget.items()
        if stage in run.stages
    )
    per_step = config.batch_size * config.gradient_accumulation_steps * mean_row_tokens(rows)
    return Estimate(run, steps, round(steps * per_step), done)
