"""From settings to a model: what `lte train`, `lte compare` and `lte demo` make theirs with.

settings = ModelSettings(start="gpt2", config=LteConfig(target_sparsity=0.5), train=TrainConfig())
work = TextWorkload(DataConfig(train="my.txt"), load_tokenizer("gpt2"), batch_size=8)
model, summary = make_model(settings, work, Path("out/checkpoints"))
save_folder(model, work.tokenizer, Path("out"))
found = measure_folder(Path("out"), work)  # lte.runs.measure
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import lte
from lte.config import MethodConfig
from lte.eval.models import is_lte, load_config
from lte.hf.install import sparse_ffns
from lte.methods import METHODS
from lte.methods.moefication import relu_fy_
from lte.runs.own_answers import calibrate_on_answers_
from lte.runs.workload import TextWorkload, Workload
from lte.train.adapters import merge_lora, merge_sharded_lora, with_lora
from lte.train.callbacks import StepTimes
from lte.train.combinations import retargeted
from lte.train.config import TrainConfig
from lte.train.optimisers import cast_weights_
from lte.train.processes import is_main_process, keeps_weights_on_cpu, reads_weights_once, training_device
from lte.train.sharding import gathered, is_in_shards
from lte.train.summary import TrainingSummary
from lte.train.two_stage import GROUPING_TOKENS, device_batches, train_two_stage


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """What a model is made from, and how.

    Attributes:
        start: hub name, folder or GGUF file of the model to begin with.
        config: of the method; `None` leaves the model dense.
        train: of its training. Without one, batch size, seed and calibration of what is fitted.
        trains: whether it trains after the method is applied.
        stages: which stages of the training run.
        teacher: dense model that it is distilled from, as `start`.
        relu: whether its FFNs get ReLU before anything else.
        changed: fields of `config` that may differ from those of an LTE folder as `start`, whose other settings stay;
            `None` refuses such a folder.
    """

    start: str
    config: MethodConfig | None
    train: TrainConfig
    trains: bool = True
    stages: tuple[int, ...] = (1, 2)
    teacher: str | None = None
    relu: bool = False
    changed: frozenset[str] | None = None

    @property
    def leaves_stock(self) -> bool:
        """Whether the model is a stock one: dense, or of a method that removes or zeroes weights."""
        return self.config is None or self.train.recipe == "dense" or METHODS[self.config.name].leaves_stock


class Watcher:
    """What a caller does between the steps of `make_model`; this one does nothing."""

    def loaded(self, model: Any) -> None:
        """The model that everything starts from is loaded, and the data is read."""

    def before_training(self, model: Any, teacher: Any, train: TrainConfig) -> TrainConfig:
        """The method is applied; returns how to train."""
        return train

    def steps_begin(self) -> None:
        """The trainer has taken all settings, and the checkpoint of a resumed run with them."""

    def steps_measured(self, step_s: float, steps: int) -> None:
        """The first steps have run: seconds of one, and how many are to come."""


def make_model(
    settings: ModelSettings,
    work: Workload,
    folder: Path,
    *,
    resume: bool = False,
    watcher: Watcher | None = None,
    adapters: Path | None = None,
) -> tuple[Any, TrainingSummary]:
    """Loads a model, applies a method, trains it, and sets its thresholds for the text and for its own answers.

    Args:
        settings: what to make.
        work: the data, which is read here if it was not before.
        folder: for checkpoints.
        resume: go on from the newest complete checkpoint there.
        watcher: is told of the steps.
        adapters: folder for LoRA adapters, if some are trained, and the model under them; `None` takes `folder`.

    Returns:
        The model on the device that it trained on, which the caller is to save, and what its training was. Of one that
        trained in shards the first process has the model, on the CPU, and the others get `None`.

    Raises:
        ValueError: if the settings do not fit the model, or each other.
        NonFiniteLossError: if the training diverges.
    """
    watcher = watcher or Watcher()
    # What a new head starts from.
    torch.manual_seed(settings.train.seed)
    start = time.monotonic()
    model = _loaded(settings, work)
    if work.train is None:
        work.load_data(model)
    watcher.loaded(model)
    if settings.relu:
        relu_fy_(model)
    model = _with_method(settings, model, work)
    if not settings.trains:
        return model, TrainingSummary(0, time.monotonic() - start, [])
    teacher = None if settings.teacher is None else _teacher(settings, model, work)
    train = watcher.before_training(model, teacher, settings.train)
    narrow_base = train.lora_rank is not None and train.weights_dtype == "bfloat16"
    if narrow_base:
        # Adapters are in fp32 whatever they are for.
        cast_weights_(model, torch.bfloat16)
    trained = model if train.lora_rank is None else with_lora(model, train, adapters or folder)
    summary = train_two_stage(
        trained,
        work.train,
        train,
        folder,
        teacher=teacher,
        stages=settings.stages,
        calibration_dataset=work.calibration,
        data_collator=work.collator,
        resume=resume,
        callbacks=[StepTimes(watcher.steps_measured, begin=watcher.steps_begin)],
    )
    if is_in_shards(trained):
        model = gathered(trained) if trained is model else merge_sharded_lora(trained, adapters or folder)
        if model is None:
            # The first process has all of it.
            return None, summary
        trained = model
    calibrate_on_answers_(trained, work, train, settings.stages)
    if trained is not model:
        if narrow_base:
            # The sum of weights and adapters is not rounded.
            cast_weights_(model, torch.float32)
        model = merge_lora(trained, model, adapters or folder)
        if train.lora_4bit and train.sets_thresholds(settings.stages):
            # Its weights are not those in 4 bits that the thresholds were set with.
            lte.calibrate_(model, _calibration(settings, model, work), max_tokens=None)
            calibrate_on_answers_(model, work, train, settings.stages)
    if settings.leaves_stock:
        if sparse_ffns(model):
            lte.densify_(model)
    elif settings.config is not None and METHODS[settings.config.name].fit is not None:
        lte.calibrate_(model, _calibration(settings, model, work), max_tokens=None)
    return model, summary


def _loaded(settings: ModelSettings, work: Workload) -> Any:
    """The model to begin with, on the device that trains.

    Where the first process alone reads weights, it has them on its CPU until accelerate hands out the shards, and those
    of the others hold anything; where all stay on the CPU, each has them there. That takes an LTE model: its neurons
    are not grouped any more.
    """
    stays = reads_weights_once() or keeps_weights_on_cpu()
    stays = stays and settings.changed is not None and isinstance(work, TextWorkload)
    if not (stays and is_lte(load_config(settings.start))):
        return work.load_model(settings.start)
    if is_main_process() or not reads_weights_once():
        return work.load_model(settings.start, to="cpu")
    # In the dtype that they will train in: to cast them would touch their memory.
    return work.load_model(settings.start, settings.train.weights_dtype, to="nowhere")


def _with_method(settings: ModelSettings, model: Any, work: Workload) -> Any:
    """The model with its method, or with its new target if it is an LTE model already."""
    config = settings.config
    if settings.changed is not None and sparse_ffns(model):
        return _retargeted(model, config, settings.changed)
    if config is None or (settings.train.recipe == "dense" and METHODS[config.name].sparse_ffns):
        return model
    method, batches = METHODS[config.name], None
    if method.needs_calibration(config):
        tokens = GROUPING_TOKENS if method.sparse_ffns else settings.train.calibration_tokens
        batches = _calibration(settings, model, work, tokens)
    return lte.sparsify_(model, config, calibration=batches)


def _calibration(settings: ModelSettings, model: Any, work: Workload, tokens: int | None = None) -> list[Any]:
    """Batches on which neurons are grouped, or a method fits its thresholds or predictors."""
    rows = work.train if work.calibration is None else work.calibration
    tokens = settings.train.calibration_tokens if tokens is None else tokens
    return device_batches(model, rows, tokens, settings.train.batch_size, work.collator)


def _retargeted(model: Any, config: Any, changed: frozenset[str]) -> Any:
    found = retargeted(model.lte_config, config, changed)
    if "target_sparsity" in changed:
        model.config.lte = found.to_dict()
    return model


def _teacher(settings: ModelSettings, model: Any, work: Workload) -> Any:
    name = str(settings.teacher)
    teacher = work.load_teacher(name)
    if teacher.config.vocab_size != model.config.vocab_size:
        raise ValueError(
            f"distill_from must have the vocabulary of the model, {model.config.vocab_size} tokens, got {name} "
            f"with {teacher.config.vocab_size}"
        )
    narrow = settings.train.bf16 or settings.train.weights_dtype == "bfloat16"
    return teacher.to(training_device(), torch.bfloat16 if narrow else None)
