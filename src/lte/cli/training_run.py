"""The steps of `lte train`, from loading to the report."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

import lte
from lte.cli.training_outcome import Outcome, print_outcome, save_outcome
from lte.config import CALIBRATED_GROUPINGS, LteConfig
from lte.data.config import DataConfig
from lte.data.tasks.config import TaskConfig
from lte.eval.kernels import use_kernels_
from lte.eval.models import is_lte, load_config, task_record
from lte.eval.sparsity import Measurement
from lte.hf.acceleration import describe_kernels
from lte.hf.dense import load_tokenizer
from lte.hf.install import sparse_ffns
from lte.records import ResultRecord
from lte.runs.own_answers import calibrate_on_answers_
from lte.runs.workload import TaskWorkload, TextWorkload, Workload
from lte.train.config import TrainConfig
from lte.train.processes import is_main_process, training_device
from lte.train.two_stage import GROUPING_TOKENS, device_batches, train_two_stage


@dataclass(frozen=True)
class TrainingRun:
    """All settings of one training run; `execute` does it.

    Attributes:
        given: names of the settings that the user set, all others being defaults.
    """

    model: str
    output: Path
    stages: tuple[int, ...]
    distill_from: str | None
    chat_template: str | None
    resume: bool
    lte_config: LteConfig
    data_config: DataConfig
    train_config: TrainConfig
    task_config: TaskConfig
    given: frozenset[str]

    def execute(self, console: Console) -> ResultRecord:
        """Trains, measures, saves; returns the result record. Of several processes the first one saves.

        Raises:
            ValueError: if the settings do not fit the model, or each other.
        """
        check_start(self)
        work = self._workload(self._tokenizer())
        # What a new head starts from.
        torch.manual_seed(self.train_config.seed)
        model = work.load_model(self.model)
        work.load_data(model)
        info = work.info
        sizes = f"{info['train']['tokens']} training tokens, {info['validation']['tokens']} held out"
        console.print(f"Data: {work.name}, {sizes}.", highlight=False)
        before = self._measure_first(work, model, console)
        model = self._sparse(model, work)
        summary = train_two_stage(
            model,
            work.train,
            self.train_config,
            self.output,
            teacher=self._teacher(model, work),
            stages=self.stages,
            data_collator=work.collator,
            resume=self.resume,
        )
        calibrate_on_answers_(model, work, self.train_config, self.stages)
        if self.train_config.recipe == "dense":
            lte.densify_(model)
        # Measured on the code that `lte eval` and `lte generate` run.
        use_kernels_(model.to(training_device()), tell=False)
        after = work.measure(model)
        assert after.measurement is None or isinstance(after.measurement, Measurement)
        found = task_record(
            model,
            after,
            **self._record_fields(work, describe_kernels(model)),
            tokens_trained=summary.tokens_trained,
            wall_time_s=summary.wall_time_s,
            **before,
        )
        if is_main_process():
            outcome = Outcome(found, after.measurement, summary)
            save_outcome(model, work.tokenizer, self.output, outcome)
            print_outcome(console, self.output, self.stages, outcome)
        return found

    def _tokenizer(self) -> Any:
        tokenizer = load_tokenizer(self.model)
        if self.chat_template is not None:
            path = Path(self.chat_template).expanduser()
            if not path.is_file():
                raise ValueError(
                    f"chat_template must be a file with a Jinja template, got chat_template={self.chat_template}; give "
                    "its path"
                )
            tokenizer.chat_template = path.read_text()
        return tokenizer

    def _workload(self, tokenizer: Any) -> Workload:
        batch_size = self.train_config.batch_size
        if self.task_config.task is None:
            return TextWorkload(self.data_config, tokenizer, batch_size)
        measured = self.data_config.validation_split if "validation_split" in self.given else None
        splits = (self.data_config.split, measured)
        return TaskWorkload(self.task_config, self.data_config, tokenizer, batch_size, splits)

    def _measure_first(self, work: Workload, model: Any, console: Console) -> dict[str, float]:
        """What a result record says of the model before training."""
        if not work.measures_first:
            return {}
        before = work.measure(model)
        console.print(f"{before.metric.capitalize()} before training: {before.value:.3f}.", highlight=False)
        return {f"{before.metric}_before": before.value}

    def _record_fields(self, work: Workload, kernels: dict[str, str] | None) -> dict[str, Any]:
        """What a result record says of the settings."""
        config = {
            "lte": self.lte_config.to_dict(),
            **work.settings,
            "train": self.train_config.to_dict(),
            "distill_from": self.distill_from,
            "stages": list(self.stages),
            "data_info": work.info,
            "kernels": kernels,
        }
        return {
            "task": work.name,
            "split": work.split,
            "model": self.model,
            "seed": self.train_config.seed,
            "config": config,
        }

    def _sparse(self, model: Any, work: Workload) -> Any:
        """The model converted, or with its new target if it is an LTE model already."""
        if sparse_ffns(model):
            return self._retarget(model)
        config = self.lte_config
        if self.train_config.recipe == "dense":
            config = replace(config, target_sparsity=0.0, grouping="contiguous")
        calibration = None
        if config.grouping in CALIBRATED_GROUPINGS:
            batch_size = self.train_config.batch_size
            calibration = device_batches(model, work.train, GROUPING_TOKENS, batch_size, work.collator)
        return lte.sparsify_(model, config, calibration=calibration)

    def _retarget(self, model: Any) -> Any:
        own = model.lte_config
        for name in ("expert_size", "grouping", "router_rank", "threshold"):
            if name in self.given and getattr(self.lte_config, name) != getattr(own, name):
                raise ValueError(
                    f"{name} must stay {getattr(own, name)} for an LTE model, got "
                    f"{name}={getattr(self.lte_config, name)}; start from the dense model to change it"
                )
        target = self.lte_config.target_sparsity if "target_sparsity" in self.given else own.target_sparsity
        model.config.lte = replace(own, target_sparsity=target).to_dict()
        return model

    def _teacher(self, model: Any, work: Workload) -> Any:
        if self.distill_from is None:
            return None
        name = self.model if self.distill_from == "initial" else self.distill_from
        teacher = work.load_teacher(name)
        if teacher.config.vocab_size != model.config.vocab_size:
            raise ValueError(
                f"distill_from must have the vocabulary of the model, {model.config.vocab_size} tokens, got {name} "
                f"with {teacher.config.vocab_size}"
            )
        return teacher.to(torch.bfloat16) if self.train_config.bf16 else teacher


def check_start(run: TrainingRun) -> None:
    """Refuses settings that do not fit each other, before anything is loaded.

    Raises:
        ValueError: says which.
    """
    sparse = is_lte(load_config(run.model))
    weight, recipe = run.train_config.distillation_weight, run.train_config.recipe
    if run.stages == (2,) and not sparse and recipe != "dense":
        raise ValueError(f"stages=2 must start from an LTE folder (stage 1 trains the routers), got {run.model}")
    if sparse and run.distill_from == "initial":
        raise ValueError("distill_from must name a dense model when training goes on from an LTE folder, got initial")
    if weight and not run.distill_from:
        raise ValueError(
            f"distillation_weight={weight:g} must have a teacher; add --distill-from initial, or a dense model"
        )
    if run.distill_from and not weight:
        raise ValueError("distillation_weight must be positive when distill_from is given, got 0")
