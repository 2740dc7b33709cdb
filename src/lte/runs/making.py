"""Making one run's model: the method applied to what the run starts from, trained, and saved."""

from __future__ import annotations

import time
from typing import Any

import torch

import lte
from lte.methods import METHODS
from lte.methods.moefication import relu_fy_
from lte.runs.folders import Folders, Made
from lte.runs.memory import peak_memory_bytes
from lte.runs.own_answers import calibrate_on_answers_
from lte.runs.plan import Run
from lte.runs.settings import Comparison
from lte.runs.workload import Workload
from lte.train.processes import training_device
from lte.train.summary import TrainingSummary
from lte.train.two_stage import GROUPING_TOKENS, device_batches, train_two_stage


def make_model(run: Run, comparison: Comparison, folders: Folders, work: Workload, base: Made | None) -> Made:
    """Makes a run's model and saves it to its folder.

    Args:
        run: what to make.
        comparison: which it belongs to.
        folders: where its base and its teacher are.
        work: its data.
        base: what is said of the model that it starts from; `None` for the model of the comparison.

    Raises:
        ValueError: if the settings do not fit the model.
        NonFiniteLossError: if the training diverges.
    """
    # What a new head starts from.
    torch.manual_seed(run.seed)
    start = time.monotonic()
    model = work.load_model(comparison.model if run.base is None else str(folders.work / run.base))
    if run.relu:
        relu_fy_(model)
    model, method = _apply(run, model, work)
    summary = TrainingSummary(0, time.monotonic() - start, [])
    if run.trains:
        summary = _train(run, model, folders, work)
    tokens = summary.tokens_trained
    model = _finish(run, model, work, method)
    is_start, before = run.base is None, base
    made = Made(
        fingerprint=run.fingerprint,
        tokens_trained=tokens,
        tokens_since_start=0 if is_start else tokens + (before.tokens_since_start if before else 0),
        tokens_start=tokens if is_start else (before.tokens_start if before else 0),
        wall_time_s=summary.wall_time_s,
        data_info=work.info,
        eta=summary.eta,
        layer_history=summary.layer_history(),
        peak_memory_bytes=peak_memory_bytes(),
    )
    folders.save(run, model, work.tokenizer, made)
    return made


def calibration_text(run: Run, model: Any, work: Workload, tokens: int) -> list[Any]:
    """Training batches spread over the data, on the model's device."""
    return device_batches(model, work.train, tokens, run.train_config.batch_size, work.collator)


def _apply(run: Run, model: Any, work: Workload) -> tuple[Any, dict[str, Any] | None]:
    """The model with its method, and of a pruned stock model what its config says of it."""
    kept = None
    if run.method in METHODS:
        method, config, batches = METHODS[run.method], run.method_config, None
        if method.needs_calibration(config):
            tokens = GROUPING_TOKENS if method.sparse_ffns else run.train_config.calibration_tokens
            batches = calibration_text(run, model, work, tokens)
        model = lte.sparsify_(model, config, calibration=batches)
        kept = model.config.lte
    if run.trains and run.leaves_stock:
        # Wrapped, so that one code path trains all; the wrapper switches nothing.
        model = lte.sparsify_(model, run.wrapper_config)
    return model, kept


def _train(run: Run, model: Any, folders: Folders, work: Workload) -> TrainingSummary:
    teacher = None
    if run.teacher is not None:
        folder = folders.work / run.teacher
        teacher = work.load_teacher(str(folder) if folder.exists() else run.teacher)
        teacher = teacher.to(training_device())
        teacher = teacher.to(torch.bfloat16) if run.train_config.bf16 else teacher
    summary = train_two_stage(
        model,
        work.train,
        run.train_config,
        folders.checkpoints(run),
        teacher=teacher,
        stages=run.stages,
        data_collator=work.collator,
        resume=True,
    )
    calibrate_on_answers_(model, work, run.train_config, run.stages)
    return summary


def _finish(run: Run, model: Any, work: Workload, method: dict[str, Any] | None) -> Any:
    """What follows training: fits anew, or the stock model without its wrapper."""
    if not run.trains:
        return model
    if run.leaves_stock:
        model = lte.densify_(model)
        if method is not None:
            model.config.lte = method
    elif run.method in METHODS and METHODS[run.method].fit is not None:
        tokens = run.train_config.calibration_tokens
        lte.calibrate_(model, calibration_text(run, model, work, tokens), max_tokens=None)
    return model
