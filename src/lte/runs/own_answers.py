"""Thresholds for what a model writes itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from lte.eval.inference import moved_batches
from lte.hf.install import require_sparse_ffns
from lte.runs.workload import Workload
from lte.train.config import TrainConfig
from lte.train.processes import autocast, training_device
from lte.train.router_init import calibrate_thresholds_

ROUNDS = 2
"""Other thresholds give other answers."""


def calibrate_on_answers_(model: Any, work: Workload, config: TrainConfig, stages: Sequence[int]) -> None:
    """Switches on more experts until a trained model's own answers to training prompts have the target sparsity.

    What a model writes is easier for it than what people wrote, so thresholds that meet the target on the training text
    leave more experts off there. Does nothing if the training does not hold a target, if the task has the model write
    nothing, with `config.calibration_answers` of 0, and if the answers are less sparse than the target: a model that
    struggles would write worse with fewer experts, and be less sparse on that.

    Args:
        model: an LTE model after `train_two_stage`.
        work: the data it was trained on.
        config: of the training.
        stages: which were trained.
    """
    if not config.sets_thresholds(stages) or not config.calibration_answers:
        return
    model.to(training_device())
    biases = [ffn.router.bias for ffn in require_sparse_ffns(model).values()]
    for _ in range(ROUNDS):
        before = [bias.detach().clone() for bias in biases]
        with autocast(config):
            rows = work.answered_rows(model, config.calibration_answers)
            if not rows:
                return
            starts = range(0, len(rows), config.batch_size)
            batches = (work.collator(rows[start : start + config.batch_size]) for start in starts)
            moved = moved_batches(batches, training_device(), progress=False)
            shift = calibrate_thresholds_(model, moved, model.target_sparsity)
        if shift <= 0:
            with torch.no_grad():
                for bias, value in zip(biases, before, strict=True):
                    bias.copy_(value)
            return
