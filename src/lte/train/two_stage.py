"""Both stages of LTE training in one call, resumable at any step."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset
from transformers import TrainingArguments

from lte.data.rows import LmCollator, PromptsCounted, calibration_batches, mean_row_tokens
from lte.hf.inputs import predicts_next_token
from lte.hf.install import require_wrapped_ffns, sparse_ffns
from lte.nn.sparse_ffn import SparseFfn
from lte.train.callbacks import CONTROL_STATE_FILE
from lte.train.compilation import compiled_layers, few_widths
from lte.train.config import Stage, TrainConfig, stages_of
from lte.train.processes import autocast, float32_products, training_device
from lte.train.router_init import Batch, calibrate_thresholds_, fit_routers_
from lte.train.summary import TrainingSummary
from lte.train.trainer import LteTrainer

STAGE_RECORD_FILE = "stage.json"
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
) -> TrainingSummary:
    """Trains an LTE model in place: routing in stage 1, adaptation in stage 2, thresholds at the end.

    With `recipe="method"` it trains a model of another method that puts modules around the FFNs (`lte.methods`) on
    the same schedule, and its own losses are added to the task's.

    Checkpoints and the model after each stage go to `output_dir/stage1` and `output_dir/stage2`. The final model is
    the one in memory: save it with `model.save_pretrained`.

    Args:
        model: an LTE model from `sparsify_`, one of another method from `apply_method_`, or a saved one.
        train_dataset: rows with `input_ids` and `labels`, see `lte.data.rows.load_lm_datasets`.
        config: the recipe.
        output_dir: folder for checkpoints and logs.
        teacher: dense model whose logits are distilled where `config.distillation_weight` is positive.
        stages: which stages to run: (1, 2), (1,) or (2,).
        calibration_dataset: rows on which the thresholds are set at the end; `None` takes `train_dataset`. The
            sparsity depends on the text, so take what the model will see in use, but nothing that it is tested on.
            For what the model writes itself, `lte.runs.own_answers.calibrate_on_answers_` follows.
        data_collator: `None` pads with the model's pad token.
        resume: go on from the newest complete checkpoint in `output_dir`.

    Raises:
        ValueError: for a dense model, an `output_dir` that holds another run's checkpoints without `resume`, or
            distillation without a teacher, and for `config.count_prompts` if the model reads no prompts.
        NonFiniteLossError: if the loss becomes NaN or infinite; the batch is saved first.
    """
    output = Path(output_dir)
    ffns = require_wrapped_ffns(model)
    _check_fits(model, config)
    _check_arguments(config, output, teacher, stages, resume)
    collator = data_collator or LmCollator(_pad_token_id(model))
    model.config.lte_measurement = None
    if config.compile:
        collator = few_widths(collator)
    if config.count_prompts:
        collator = PromptsCounted(collator)
    summaries: list[TrainingSummary] = []
    compiled = compiled_layers(model, teacher, list(ffns), config)
    with compiled, _gradient_checkpointing(model, config), float32_products(config):
        for stage in stages_of(config):
            if stage.number in stages:
                eta = summaries[-1].eta if summaries else None
                summaries.append(_run_stage(model, train_dataset, config, stage, output, teacher, collator, eta))
    if config.sets_thresholds(stages):
        source = calibration_dataset or train_dataset
        batches = device_batches(model, source, config.calibration_tokens, config.batch_size, collator)
        with autocast(config):
            calibrate_thresholds_(model, batches, model.target_sparsity)
    for ffn in sparse_ffns(model).values():
        ffn.set_mode("hard")
        ffn.record_logits, ffn.logits = False, None
    model.requires_grad_(True)
    return TrainingSummary(
        tokens_trained=sum(s.tokens_trained for s in summaries),
        wall_time_s=sum(s.wall_time_s for s in summaries),
        log_history=[entry for s in summaries for entry in s.log_history],
        # A stage with frozen routers has no controller of eta.
        eta=next((s.eta for s in reversed(summaries) if s.eta is not None), None),
    )


def device_batches(
    model: nn.Module, dataset: Dataset[Any], num_tokens: int, batch_size: int, collator: Any
) -> list[Batch]:
    """About `num_tokens` tokens spread over `dataset`, on the model's device."""
    device = next(model.parameters()).device
    batches = calibration_batches(dataset, num_tokens, batch_size, collator)
    return [{key: value.to(device) for key, value in batch.items()} for batch in batches]


def _run_stage(
    model: Any,
    dataset: Dataset[Any],
    config: TrainConfig,
    stage: Stage,
    output: Path,
    teacher: nn.Module | None,
    collator: Any,
    eta: float | None,
) -> TrainingSummary:
    folder = output / f"stage{stage.number}"
    record = _finished_stage_(model, folder)
    if record is not None:
        return record
    checkpoint = _newest_complete_checkpoint(folder)
    if stage.number == 1 and checkpoint is None and config.router_fit_tokens and config.holds_target:
        model.to(training_device())
        batches = device_batches(model, dataset, config.router_fit_tokens, config.batch_size, collator)
        with autocast(config), torch.compiler.set_stance("force_eager"):
            fit_routers_(model, batches)
    for ffn in sparse_ffns(model).values():
        ffn.set_mode(stage.mode)
        ffn.record_logits = stage.mode != "dense"
    _set_trainable_(model, config, stage)
    use_cache = getattr(model.config, "use_cache", None)
    trainer = LteTrainer(
        model=model,
        args=_training_arguments(config, stage, folder, len(dataset)),  # type: ignore[arg-type]
        train_dataset=dataset,
        data_collator=collator,
        stage=stage,
        train_config=config,
        target_sparsity=model.target_sparsity,
        teacher=None if teacher is None else teacher.to(training_device()),
        first_eta=eta,
    )
    if checkpoint is not None:
        trainer.load_control_state(checkpoint)
    start = time.monotonic()
    try:
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    finally:
        # Accelerate's mark, by which it would take the model as prepared in the next stage.
        vars(model).pop("_is_accelerate_prepared", None)
        # Trainer switches it off, and it would be saved with the model.
        if use_cache is not None:
            model.config.use_cache = use_cache
    summary = TrainingSummary(
        tokens_trained=_tokens_trained(trainer),
        wall_time_s=time.monotonic() - start,
        log_history=[{**entry, "stage": stage.number} for entry in trainer.state.log_history],
        eta=trainer.eta_controller.settled if stage.controls_eta else None,
    )
    _record_stage(model, trainer, folder, summary)
    return summary


def _training_arguments(config: TrainConfig, stage: Stage, folder: Path, rows: int) -> TrainingArguments:
    rate = config.stage2_learning_rate if stage.number == 2 else None
    arguments = TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=config.stage1_epochs if stage.number == 1 else config.stage2_epochs,
        max_steps=config.stage1_steps if stage.number == 1 else config.stage2_steps,
        learning_rate=rate or config.learning_rate,
        lr_scheduler_type=stage.scheduler,
        warmup_steps=config.warmup_ratio,
        weight_decay=config.weight_decay,
        per_device_train_batch_size=config.batch_size,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        use_cpu=not torch.cuda.is_available(),
        optim="adamw_torch_fused" if torch.cuda.is_available() else "adamw_torch",
        logging_steps=config.logging_steps,
        logging_nan_inf_filter=False,
        save_steps=config.save_steps,
        save_total_limit=2,
        report_to=config.reporters,
        remove_unused_columns=False,
        dataloader_num_workers=config.dataloader_num_workers if torch.cuda.is_available() else 0,
        # What a stage leaves unused is frozen.
        ddp_find_unused_parameters=False,
        # Each stage draws its own order of the data.
        seed=config.seed + stage.number,
    )
    # One process trains on one GPU: `nn.DataParallel`, which Trainer takes where a process sees several, records the
    # router logits on copies that it throws away. `torchrun` uses all GPUs.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    arguments.dataloader_drop_last = config.leaves_out_last_batch(rows // arguments.world_size)
    return arguments


def _set_trainable_(model: nn.Module, config: TrainConfig, stage: Stage) -> None:
    model.requires_grad_(config.trainable == "all")
    for ffn in require_wrapped_ffns(model).values():
        for parameter in ffn.own_parameters():
            parameter.requires_grad_(config.trainable != "routers")
        if isinstance(ffn, SparseFfn):
            ffn.router.requires_grad_(stage.train_routers)
        for name in ffn.frozen:
            ffn.get_submodule(name).requires_grad_(False)


def _check_fits(model: nn.Module, config: TrainConfig) -> None:
    """Refuses settings that are not for this kind of model."""
    if bool(sparse_ffns(model)) == (config.recipe == "method"):
        kind = "an LTE model" if sparse_ffns(model) else "a model of another method than LTE"
        fitting = "another one" if sparse_ffns(model) else "'method'"
        raise ValueError(f"recipe must be {fitting} for {kind}, got recipe={config.recipe!r}")
    if config.count_prompts and not predicts_next_token(model):
        raise ValueError(
            f"count_prompts must be false for models that read no prompts, got {type(model).__name__}, which counts "
            "all tokens of its inputs"
        )


def _check_arguments(
    config: TrainConfig, output: Path, teacher: nn.Module | None, stages: Sequence[int], resume: bool
) -> None:
    if not stages or any(number not in (1, 2) for number in stages):
        raise ValueError(f"stages must be (1, 2), (1,) or (2,), got stages={tuple(stages)}")
    if config.distillation_weight and teacher is None:
        raise ValueError(
            f"teacher must be a dense model when distillation_weight={config.distillation_weight}, got teacher=None"
        )
    used = [folder for number in stages if any((folder := output / f"stage{number}").glob("*"))]
    if used and not resume:
        raise ValueError(
            f"output_dir must hold no earlier run of these stages, got {used[0]}; pass resume=True (--resume) to go "
            "on with it, or another output_dir"
        )


def _newest_complete_checkpoint(folder: Path) -> Path | None:
    """The checkpoint with the highest step whose last file was written; a killed process leaves others behind."""
    complete = [path.parent for path in folder.glob(f"checkpoint-*/{CONTROL_STATE_FILE}")]
    return max(complete, key=lambda path: int(path.name.split("-")[-1]), default=None)


def _record_stage(model: Any, trainer: LteTrainer, folder: Path, summary: TrainingSummary) -> None:
    """Saves the model after a stage; `stage.json` appears last and marks the stage as finished."""
    if not trainer.args.should_save:
        return
    model.save_pretrained(folder / "model")
    partial = folder / f"{STAGE_RECORD_FILE}.partial"
    partial.write_text(json.dumps(vars(summary), indent=1))
    partial.replace(folder / STAGE_RECORD_FILE)


def _finished_stage_(model: Any, folder: Path) -> TrainingSummary | None:
    """Loads the weights of a stage that an earlier run finished; `None` if there is none."""
    path = folder / STAGE_RECORD_FILE
    if not path.exists():
        return None
    trained = type(model).from_pretrained(folder / "model", dtype=next(model.parameters()).dtype)
    model.load_state_dict(trained.state_dict())
    return TrainingSummary(**json.loads(path.read_text()))


def _tokens_trained(trainer: LteTrainer) -> int:
    rows = trainer.state.global_step * trainer.args.train_batch_size * trainer.args.gradient_accumulation_steps
    return round(rows * trainer.args.world_size * mean_row_tokens(trainer.train_dataset))


def _pad_token_id(model: Any) -> int:
    pad, eos = model.config.pad_token_id, model.config.eos_token_id
    eos = eos[0] if isinstance(eos, list) else eos
    return pad if pad is not None else (eos or 0)


@contextmanager
def _gradient_checkpointing(model: Any, config: TrainConfig) -> Iterator[None]:
    """Recomputes activations inside the block if the config asks for it. The non-reentrant kind alone gives the
    recorded router logits their gradients."""
    if not config.gradient_checkpointing:
        yield
        return
    # The method got a new name in transformers 5.2x; the old one warns there.
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    disable = getattr(model, "activation_checkpointing_disable", model.gradient_checkpointing_disable)
    enable({"use_reentrant": False})
    try:
        yield
    finally:
        disable()
