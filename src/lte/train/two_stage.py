"""Both stages of LTE training in one call, by the settings of `lte train`."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset
from transformers import TrainerCallback

from lte.data.rows import LmCollator, PromptsCounted, calibration_batches
from lte.hf.inputs import predicts_next_token
from lte.train.arguments import LteTrainingArguments
from lte.train.checkpoints import has_checkpoint
from lte.train.compilation import few_widths
from lte.train.config import RecipeSettings, TrainConfig
from lte.train.curves import named_run, write_in_one_place
from lte.train.optimisers import cast_weights_, optimiser_arguments, warn_of_lost_steps
from lte.train.processes import float32_products, num_processes
from lte.train.router_init import Batch
from lte.train.summary import TrainingSummary
from lte.train.trainer import LteTrainer, check_recipe

# Transformers 5.2x gave it a new name.
_NAMES = ("activation_checkpointing", "gradient_checkpointing")
CHECKPOINTING = next(name for name in _NAMES if name in LteTrainingArguments.__dataclass_fields__)

GROUPING_TOKENS = 16384
"""Training tokens on which groupings compare when neurons are active."""


def train_two_stage(
    model: Any,
    train_dataset: Dataset[Any],
    config: TrainConfig,
    output_dir: str | Path,
    *,
    teacher: nn.Module | None = None,
    stages: Sequence[int] = (1, 2),
    calibration_dataset: Dataset[Any] | None = None,
    data_collator: Any = None,
    resume: bool = False,
    callbacks: Sequence[TrainerCallback] = (),
) -> TrainingSummary:
    """Trains a model in place with `lte.LteTrainer`: routing in stage 1, adaptation in stage 2, thresholds at the end.

    With `recipe="method"` it trains a model of another method that puts modules around the FFNs (`lte.methods`) on the
    same schedule, and its own losses are added to the task's; with `recipe="dense"` a stock model, as a control.

    The final model is the one in memory: save it with `model.save_pretrained`.

    Args:
        model: a model from `lte.sparsify_`, or a saved one.
        train_dataset: rows with `input_ids` and `labels`, see `lte.data.rows.load_lm_datasets`.
        config: the recipe.
        output_dir: folder for checkpoints and logs.
        teacher: dense model whose logits are distilled where `config.distillation_weight` is positive.
        stages: which stages to run: (1, 2), (1,) or (2,).
        calibration_dataset: as for `LteTrainer`. For what the model writes itself,
            `lte.runs.own_answers.calibrate_on_answers_` follows.
        data_collator: `None` pads with the model's pad token.
        resume: go on from the newest complete checkpoint in `output_dir`, if there is one.
        callbacks: of the trainer, besides its own.

    Raises:
        ValueError: for a model that does not fit the recipe, an `output_dir` that holds another run's checkpoints
            without `resume`, a `resume` with other data or settings or of damaged checkpoints alone, distillation
            without a teacher, and `config.count_prompts` for a model that reads no prompts.
        NonFiniteLossError: as `LteTrainer.train`.
        TrainingStopped: after a SIGTERM; what was trained is in the newest checkpoint.
    """
    output = Path(output_dir)
    _check(model, config, output, teacher, stages, resume)
    warn_of_lost_steps(config)
    if config.weights_dtype == "bfloat16" and not hasattr(model, "peft_config"):
        cast_weights_(model, torch.bfloat16)
    collator = data_collator or LmCollator(_pad_token_id(model))
    if config.compile:
        collator = few_widths(collator)
    if config.count_prompts:
        collator = PromptsCounted(collator)
    with float32_products(config, model, teacher):
        trainer = LteTrainer(
            model,
            training_arguments(config, output, len(train_dataset), stages),  # type: ignore[arg-type]
            train_dataset=train_dataset,
            data_collator=collator,
            teacher=teacher if config.distillation_weight else None,
            calibration_dataset=calibration_dataset,
            callbacks=list(callbacks),
        )
        write_in_one_place(trainer.callback_handler.callbacks, output)
        start = time.monotonic()
        trainer.train(resume_from_checkpoint=resume and has_checkpoint(output))
    summary = TrainingSummary(
        tokens_trained=trainer.tokens_trained,
        wall_time_s=time.monotonic() - start,
        log_history=trainer.state.log_history,
        eta=trainer.settled_eta,
    )
    # Trainer and callbacks hold each other, and moments and gradients that what follows has no room for.
    model.zero_grad(set_to_none=True)
    del trainer
    gc.collect()
    return summary


def training_arguments(
    config: TrainConfig, output: Path, rows: int, stages: Sequence[int] = (1, 2)
) -> LteTrainingArguments:
    """The arguments of `LteTrainer` for the settings of `lte train`.

    Args:
        config: the settings.
        output: folder for checkpoints and logs.
        rows: of the training data, from which epochs become steps.
        stages: which stages run.
    """
    steps = stage_steps(config, rows, stages)
    settings: dict[str, Any] = {
        name: value for name, value in vars(config).items() if name in RecipeSettings.__dataclass_fields__
    }
    settings[CHECKPOINTING] = config.gradient_checkpointing
    cuda = torch.cuda.is_available()
    arguments = LteTrainingArguments(
        output_dir=str(output),
        **settings,
        distillation_weight=config.distillation_weight,
        max_steps=sum(steps),
        stage1_ratio=steps[0] / max(1, sum(steps)),
        compile_layers=config.compile,
        learning_rate=config.learning_rate,
        warmup_steps=config.warmup_ratio,
        weight_decay=config.weight_decay,
        adam_beta2=config.adam_beta2,
        per_device_train_batch_size=config.batch_size,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        bf16=config.bf16,
        use_cpu=not cuda,
        **optimiser_arguments(config, cuda),
        logging_steps=config.logging_steps,
        save_steps=config.save_steps,
        # A resume point goes when the next one is whole.
        save_total_limit=1,
        report_to=config.reporters,
        run_name=named_run(output, config.reporters),
        remove_unused_columns=False,
        dataloader_num_workers=config.dataloader_num_workers if cuda else 0,
        dataloader_drop_last=config.leaves_out_last_batch(rows // num_processes()),
        seed=config.seed,
    )
    # One process trains on one GPU; `torchrun` uses all.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments


def stage_steps(config: TrainConfig, rows: int, stages: Sequence[int]) -> tuple[int, int]:
    """Optimiser steps of stage 1 and of stage 2, 0 of one that does not run; arguments as of `training_arguments`."""
    first, second = (_stage_steps(config, number, rows) if number in stages else 0 for number in (1, 2))
    return first, second


def _stage_steps(config: TrainConfig, number: int, rows: int) -> int:
    """Optimiser steps of a stage."""
    steps = config.stage1_steps if number == 1 else config.stage2_steps
    if steps > 0:
        return steps
    share = rows / num_processes() / config.batch_size
    batches = math.floor(share) if config.leaves_out_last_batch(rows // num_processes()) else math.ceil(share)
    updates = max(1, math.ceil(batches / config.gradient_accumulation_steps))
    return math.ceil((config.stage1_epochs if number == 1 else config.stage2_epochs) * updates)


def device_batches(
    model: nn.Module, dataset: Dataset[Any], num_tokens: int, batch_size: int, collator: Any
) -> list[Batch]:
    """About `num_tokens` tokens spread over `dataset`, on the model's device."""
    device = next(model.parameters()).device
    batches = calibration_batches(dataset, num_tokens, batch_size, collator)
    return [{key: value.to(device) for key, value in batch.items()} for batch in batches]


def _check(
    model: Any, config: TrainConfig, output: Path, teacher: nn.Module | None, stages: Sequence[int], resume: bool
) -> None:
    check_recipe(model, config.recipe)
    if config.count_prompts and not predicts_next_token(model):
        raise ValueError(
            f"count_prompts must be false for models that read no prompts, got {type(model).__name__}, which counts "
            "all tokens of its inputs"
        )
    if not stages or any(number not in (1, 2) for number in stages):
        raise ValueError(f"stages must be (1, 2), (1,) or (2,), got stages={tuple(stages)}")
    if config.distillation_weight and teacher is None:
        raise ValueError(
            f"teacher must be a dense model when distillation_weight={config.distillation_weight}, got teacher=None"
        )
    if not resume and next(output.glob("checkpoint-*"), None) is not None:
        raise ValueError(
            f"output_dir must hold no earlier run, got {output} with checkpoints; pass resume=True (--resume) to go on "
            "with it, or another output_dir"
        )


def _pad_token_id(model: Any) -> int:
    pad, eos = model.config.pad_token_id, model.config.eos_token_id
    eos = eos[0] if isinstance(eos, list) else eos
    return pad if pad is not None else (eos or 0)
