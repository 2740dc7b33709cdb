"""What `lte train` says while a model is made: the data, the memory and disk it takes, and how long it will take."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from tqdm import tqdm

from lte.runs.duration import RunShape
from lte.runs.pipeline import ModelSettings, Watcher
from lte.runs.precision import Precision
from lte.runs.workload import Workload
from lte.train.config import TrainConfig
from lte.train.disk_space import RunFiles, check_run_space
from lte.train.memory import estimate_memory, gpu_bytes
from lte.train.processes import (
    is_main_process,
    keeps_weights_on_cpu,
    num_processes,
    reads_weights_once,
    training_device,
)
from lte.train.two_stage import stage_steps

MEMORY_HINT = (
    "This GPU has {:.3g} GB: lower --batch-size and raise --gradient-accumulation-steps, or add "
    "--gradient-checkpointing, --weights-dtype bfloat16, --optim adamw_torch_8bit, or --lora-rank."
)


class TrainWatcher(Watcher):
    """Says what data there is, measures a model that is worth it, and what training it takes.

    Args:
        settings: of the model.
        work: its data.
        output: folder of the run.
        save_dtype: of the saved model, `None` for that of its weights.
        console: for what it says; of other processes than the first a quiet one.
        begin: is called when the training begins.
        goes_on: whether it is that of a run which began before.

    Attributes:
        precision: in what numbers the model is measured.
        before: what a result record says of the model before training.
    """

    def __init__(
        self,
        settings: ModelSettings,
        work: Workload,
        output: Path,
        save_dtype: str | None,
        console: Console,
        begin: Callable[[], object],
        goes_on: bool,
    ):
        self.settings, self.work, self.output, self.save_dtype = settings, work, output, save_dtype
        self.console, self.begin, self.goes_on = console, begin, goes_on
        self.precision = Precision.of_training(settings.train, save_dtype)
        self.before: dict[str, Any] = {}
        self._start = time.monotonic()
        self._measured_s: float | None = None
        self._shape: RunShape | None = None

    def loaded(self, model: Any) -> None:
        """Says what the data is, and measures the model if that says something."""
        work, info = self.work, self.work.info
        sizes = f"{info['train']['tokens']} training tokens, {info['validation']['tokens']} held out"
        self.console.print(f"Data: {work.name}, {sizes}.", highlight=False, markup=False)
        for line in work.announcements:
            self.console.print(f"Data: {line}", highlight=False, markup=False, soft_wrap=True)
        # One that waits for its shards lies on the CPU, in the first process alone.
        is_there = all(p.device == training_device() for p in model.parameters())
        if work.measures_first and is_there and (is_main_process() or not reads_weights_once()):
            start = time.monotonic()
            self.tell_measuring("the model before training")
            with self.precision.products_of(model):
                found = work.measure(model)
            self._measured_s = time.monotonic() - start
            self.before = {f"{found.metric}_before": found.value}
            text = f"{found.metric.capitalize()} before training: {found.value:.3f}."
            self.console.print(text, highlight=False)

    def tell_measuring(self, what: str) -> None:
        """Says what is measured now, which may take minutes: where the output is no terminal there is no bar."""
        tokens = self.work.info["validation"]["tokens"]
        self._say(f"Measuring {what}: {tokens} held-out tokens, in {self.precision.name}.")

    def before_training(self, model: Any, teacher: Any, train: TrainConfig) -> TrainConfig:
        """Says what memory and disk the training takes; all input is read and fits now.

        Raises:
            ValueError: if the disk has no room for what will be written.
        """
        memory = estimate_memory(model, train, self.work.data_config.sequence_length, teacher)
        there, offloads = gpu_bytes(), keeps_weights_on_cpu()
        where = "; weights, gradients and moments of it are the CPU's" if offloads and there is not None else ""
        self._say(f"Memory for training: {memory.sentence()}{where}.")
        if there is not None and (memory.not_offloaded if offloads else memory.total) > there:
            self._say(MEMORY_HINT.format(there / 1e9), style="yellow")
        steps = stage_steps(train, len(self.work.train), self.settings.stages)
        files = RunFiles.of(model, train, self.save_dtype, steps)
        if is_main_process():
            check_run_space(self.output, files)
        self._say(f"Disk: {files.sentence()}.")
        rows = train.batch_size * train.gradient_accumulation_steps * num_processes()
        self._shape = RunShape(
            config=train,
            stages=self.settings.stages,
            tokens_per_step=rows * self.work.data_config.sequence_length,
            tokens_measured=self.work.info["validation"]["tokens"],
            teaches=teacher is not None and train.distillation_weight > 0,
            checkpoint_bytes=files.checkpoint,
            model_bytes=files.model,
            measured_s=self._measured_s,
        )
        # A mistake until here leaves nothing in the folder.
        if not self.goes_on:
            self.begin()
        return train

    def steps_begin(self) -> None:
        """Begins a run that goes on: another batch size, say, may be refused until here."""
        if self.goes_on:
            self.begin()

    def steps_measured(self, step_s: float, steps: int) -> None:
        """Says how long the whole run will take."""
        assert self._shape is not None
        elapsed = time.monotonic() - self._start
        text = self._shape.sentence(elapsed, step_s, steps, writes_answers=not self.work.measures_first)
        # Above the bar of the training.
        with tqdm.external_write_mode():
            self._say(text)

    def _say(self, text: str, style: str | None = None) -> None:
        self.console.print(text, style=style, highlight=False, markup=False, soft_wrap=True)
