"""The data that models are made and measured on: plain text, or a task by its name."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from lte.config import KERNELS, check_choice
from lte.data.announcement import announce_task
from lte.data.config import DataConfig
from lte.data.mixing import load_mix
from lte.data.rows import LmCollator, load_lm_datasets
from lte.data.tasks.data import load_task_data
from lte.data.tasks.models import load_task_model
from lte.data.tasks.registry import TaskConfig, get_task
from lte.data.tasks.task import GenerationTask
from lte.eval.generation import generate_answers
from lte.eval.kernels import use_kernels_
from lte.eval.models import DTYPES, Place, held_out_batches, load_any_model, load_config, max_positions
from lte.eval.perplexity import PerplexityResult, evaluate_model
from lte.eval.sparsity import Measurement
from lte.eval.tasks import TaskResult, answered_row, check_task, evaluate_task
from lte.hf.dense import load_dense_model
from lte.hf.inputs import check_next_token, check_tokens
from lte.runs.plan import Run
from lte.train.processes import is_main_process, training_device

# Among which the text is chosen that a model decodes while it is timed.
MEASURED_ROWS = 16


class Workload(ABC):
    """Data to train and measure on.

    Args:
        data_config: how text becomes rows.
        tokenizer: of the model.
        batch_size: rows per forward pass when it is measured.

    Attributes:
        name: what result records call it.
        split: name of the measured part.
        metric: the main one.
        settings: what a result record says of it, JSON-ready.
        measures_first: whether the model is worth measuring before it is trained.
        train: rows to train on, after `load_data`.
        calibration: rows on which thresholds are set; `None` for those of `train`.
        collator: makes a batch of them.
        info: counts and checksums, see `lte.data.rows.LmDatasets` and `lte.data.tasks.data.TaskData`.
        announcements: a line on each data set, what was read of it and one row as the model will see it.
    """

    name: str
    split: str
    metric: str
    settings: dict[str, Any]
    measures_first: bool
    train: Any = None
    calibration: Any = None
    collator: Any = None
    announcements: tuple[str, ...] = ()

    def __init__(self, data_config: DataConfig, tokenizer: Any, batch_size: int):
        self.data_config, self.tokenizer, self.batch_size = data_config, tokenizer, batch_size
        self.info: dict[str, Any] = {}

    @abstractmethod
    def load_model(
        self, name_or_path: str, dtype: str = "float32", kernels: str = "off", *, to: Place = "device"
    ) -> Any:
        """A dense or LTE model with the head that is wanted here, on the GPU if there is one.

        Of language models `to` is as for `load_any_model`.
        """

    @abstractmethod
    def load_teacher(self, name_or_path: str) -> Any:
        """A dense model with the same head, which must be trained."""

    @abstractmethod
    def load_data(self, model: Any) -> None:
        """Sets `train`, `collator` and `info` for a model."""

    @abstractmethod
    def measure(self, model: Any) -> TaskResult:
        """The metrics and the sparsity of a model."""

    def answered_rows(self, model: Any, count: int) -> list[dict[str, list[int]]]:
        """Up to `count` training prompts with the model's own answers as labels; none where it writes no answers."""
        return []

    @abstractmethod
    def text_to_decode(self, model: Any, length: int) -> tuple[list[int], int]:
        """Up to `length` tokens of what the model is measured on, and how many it reads before it decodes one by one.

        Where it answers: a prompt, and the answer that it writes. Elsewhere the first quarter is read.
        """


class TextWorkload(Workload):
    """Text from files or the hub, and the part of it that is held out.

    Args:
        config: how it becomes rows.
        tokenizer: of the model.
        batch_size: rows per forward pass.
        trains: whether anything trains on it; where nothing does, a mix needs no `max_train_tokens`.
    """

    split, metric, measures_first = "validation", "perplexity", True

    def __init__(self, config: DataConfig, tokenizer: Any, batch_size: int, *, trains: bool = True):
        super().__init__(config, tokenizer, batch_size)
        self.trains = trains
        self.name, self.settings = config.task, {"data": vars(config)}
        self.collator = LmCollator(tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id)

    def load_model(
        self, name_or_path: str, dtype: str = "float32", kernels: str = "off", *, to: Place = "device"
    ) -> Any:
        """A language model."""
        check_next_token(load_config(name_or_path))
        return load_any_model(name_or_path, dtype, kernels, to=to)

    def load_teacher(self, name_or_path: str) -> Any:
        """A dense language model."""
        return load_dense_model(name_or_path)

    def load_data(self, model: Any) -> None:
        """Reads and splits the text."""
        check_next_token(model.config)
        load = load_lm_datasets if self.data_config.mix is None else partial(load_mix, trains=self.trains)
        data = load(self.data_config, self.tokenizer, max_positions(model), progress=is_main_process())
        self.train, self.calibration, self.info = data.train, data.calibration, data.info
        _check_vocabulary(model, self.tokenizer, [data.train, data.validation])
        self.announcements = data.announcements
        self._held_out, self._kinds = data.validation, data.kinds

    def measure(self, model: Any) -> TaskResult:
        """Perplexity on the held-out text; of a mix also that of each kind, with its sparsity, by its name."""
        result = TaskResult.of_text(*self._evaluate(model, self._held_out))
        for name, rows in self._kinds.items():
            found, measurement = self._evaluate(model, rows)
            result.metrics[f"perplexity_{name}"] = found.perplexity
            if measurement is not None:
                result.metrics[f"sparsity_{name}"] = measurement.sparsity
                if measurement.has_routing:
                    near = measurement.near_threshold
                    result.metrics[f"near_threshold_{name}"] = sum(near) / len(near)
                    for tokens, by_layer in measurement.union_sparsity.items():
                        result.metrics[f"union_sparsity_{tokens}_{name}"] = sum(by_layer) / len(by_layer)
        return result

    def _evaluate(self, model: Any, rows: Any) -> tuple[PerplexityResult, Measurement | None]:
        batches = held_out_batches(rows, self.batch_size, self.tokenizer.pad_token_id)
        return evaluate_model(model, batches, progress=is_main_process())

    def text_to_decode(self, model: Any, length: int) -> tuple[list[int], int]:
        """The start of a held-out row."""
        return _start_of_one(self._held_out, length)


class TaskWorkload(Workload):
    """A task.

    Args:
        config: which.
        data_config: how its data becomes rows.
        tokenizer: of the model.
        batch_size: rows per forward pass when it is measured.
        splits: what trains, `None` for nothing, and what is measured, `None` for the task's own.
    """

    def __init__(
        self,
        config: TaskConfig,
        data_config: DataConfig,
        tokenizer: Any,
        batch_size: int,
        splits: tuple[str | None, str | None],
    ):
        super().__init__(data_config, tokenizer, batch_size)
        self.task = get_task(str(config.task))
        check_task(self.task)
        self.config, self.splits = config, splits
        self.name, self.split, self.metric = (
            self.task.name,
            splits[1] or self.task.measured_split,
            self.task.main_metric,
        )
        # How the rows are made; where they are from is in `info`.
        names = ("sequence_length", "pack", "validation_fraction", "max_train_tokens", "max_validation_tokens")
        rows = {name: getattr(data_config, name) for name in (*names, "data_seed")}
        self.settings = {"task": vars(config), "data": rows}
        # Heads are random before training, and generations are slow.
        self.measures_first = self.metric == "perplexity"

    def load_model(
        self, name_or_path: str, dtype: str = "float32", kernels: str = "off", *, to: Place = "device"
    ) -> Any:
        """A model with the task's head; a new one if it is to be trained."""
        check_choice("dtype", dtype, tuple(DTYPES))
        check_choice("kernels", kernels, KERNELS)
        load_config(name_or_path)
        trains = self.splits[0] is not None
        model = load_task_model(name_or_path, self.task, self.tokenizer, dtype=DTYPES[dtype], new_head=trains)
        return use_kernels_(model.to(training_device()).eval(), kernels)

    def load_teacher(self, name_or_path: str) -> Any:
        """A model with the task's head."""
        return load_task_model(name_or_path, self.task, self.tokenizer, new_head=False)

    def load_data(self, model: Any) -> None:
        """Reads the task's splits."""
        self.data = load_task_data(
            self.task,
            self.tokenizer,
            self.config,
            self.data_config,
            train_split=self.splits[0],
            split=self.split,
            encoder_decoder=model.config.is_encoder_decoder,
            max_length=max_positions(model),
        )
        self.train, self.collator, self.info = self.data.train, self.data.collator, self.data.info
        _check_vocabulary(model, self.tokenizer, [self.data.train, self.data.measured])
        part, rows = ("validation", self.data.measured) if self.train is None else ("train", self.train)
        self.announcements = (announce_task(self.name, self.info[part], rows[0], self.tokenizer),)

    def measure(self, model: Any) -> TaskResult:
        """The task's metrics."""
        return evaluate_task(
            model, self.task, self.data, self.tokenizer, batch_size=self.batch_size, progress=is_main_process()
        )

    def answered_rows(self, model: Any, count: int) -> list[dict[str, list[int]]]:
        """The first prompts of the shuffled training data, answered in hard mode as when the task is measured."""
        return [] if self.data.prompts is None else self._answered(model, self.data.prompts(count))

    def text_to_decode(self, model: Any, length: int) -> tuple[list[int], int]:
        """Of the first measured rows the one with the longest answer among those that fit.

        Where none fits, a prompt loses its beginning.
        """
        if not isinstance(self.task, GenerationTask):
            return _start_of_one(self.data.measured, length)
        rows = self._answered(model, [row["input_ids"] for row in _first_rows(self.data.measured)])
        fitting = [row for row in rows if len(row["input_ids"]) <= length]
        longest = max(fitting or rows, key=lambda row: _num_labels(row["labels"]))
        ids = longest["input_ids"][-length:]
        return ids, max(1, len(ids) - _num_labels(longest["labels"]))

    def _answered(self, model: Any, prompts: list[list[int]]) -> list[dict[str, list[int]]]:
        new_tokens = self.data.max_new_tokens
        answers = generate_answers(
            model, self.tokenizer, prompts, new_tokens, batch_size=self.batch_size, progress=is_main_process()
        )
        return [answered_row(model, *pair) for pair in zip(prompts, answers, strict=True)]


def workload_of(
    task: TaskConfig, data: DataConfig, tokenizer: Any, batch_size: int, splits: tuple[str | None, str | None]
) -> Workload:
    """The data of a task, or plain text where none is named; the arguments are those of `TaskWorkload`."""
    if task.task is None:
        return TextWorkload(data, tokenizer, batch_size, trains=splits[0] is not None)
    return TaskWorkload(task, data, tokenizer, batch_size, splits)


class Workloads:
    """Gives each run its data; the last one stays in memory.

    Args:
        model: that the runs start from, for the shape of the rows.
        tokenizer: of the model.
        eval_batch_size: rows per forward pass while a model is measured, `None` for as many as in training.
    """

    def __init__(self, model: str, tokenizer: Any, eval_batch_size: int | None = None):
        self.tokenizer, self.eval_batch_size = tokenizer, eval_batch_size
        self.model = SimpleNamespace(config=load_config(model))
        self._last: tuple[Any, Workload] | None = None

    def of(self, run: Run) -> Workload:
        """The data of a run, read and tokenised."""
        work = self.unread(run)
        key = (asdict(run.task_config), asdict(run.data_config), work.batch_size)
        if self._last is None or self._last[0] != key:
            work.load_data(self.model)
            self._last = key, work
        return self._last[1]

    def unread(self, run: Run) -> Workload:
        """The data of a run by name and settings, before anything is read."""
        splits = (run.data_config.split, run.values.get("validation_split"))
        batch_size = self.eval_batch_size or run.train_config.batch_size
        return workload_of(run.task_config, run.data_config, self.tokenizer, batch_size, splits)


def _check_vocabulary(model: Any, tokenizer: Any, parts: Sequence[Any]) -> None:
    """Refuses rows with tokens that the model does not have; they are read only if the tokenizer has such tokens."""
    if max(tokenizer.get_vocab().values(), default=0) < model.config.vocab_size:
        return
    written = model.config.is_encoder_decoder
    for rows in parts:
        for index in range(len(rows) if rows is not None else 0):
            row = rows[index]
            check_tokens(model, torch.as_tensor(row["input_ids"])[None])
            if written:
                # Those of a decoder of its own.
                labels = torch.as_tensor(row["labels"])[None]
                check_tokens(model, labels[labels != -100][None])


def _first_rows(rows: Any) -> list[dict[str, Any]]:
    return [rows[index] for index in range(min(MEASURED_ROWS, len(rows)))]


def _num_labels(labels: Sequence[int] | Tensor) -> int:
    return int((torch.as_tensor(labels) != -100).sum())


def _start_of_one(rows: Any, length: int) -> tuple[list[int], int]:
    """The first tokens of a row, of which a quarter is read; of a chat with labels in its answers one that has many."""
    best = max(_first_rows(rows), key=lambda row: _num_labels(row["labels"][length // 4 : length]))
    ids = torch.as_tensor(best["input_ids"][:length]).tolist()
    return ids, max(1, len(ids) // 4)
