"""The data of runs, read once for all that share it."""

from __future__ import annotations

from dataclasses import asdict
from types import SimpleNamespace
from typing import Any

from lte.eval.models import load_config
from lte.runs.plan import Run
from lte.runs.workload import TaskWorkload, TextWorkload, Workload


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
        key = (asdict(run.task_config), asdict(run.data_config), self._batch_size(run))
        if self._last is None or self._last[0] != key:
            work = self.unread(run)
            work.load_data(self.model)
            self._last = key, work
        return self._last[1]

    def unread(self, run: Run) -> Workload:
        """The data of a run by name and settings, before anything is read."""
        task, data, batch_size = run.task_config, run.data_config, self._batch_size(run)
        if task.task is None:
            return TextWorkload(data, self.tokenizer, batch_size)
        measured = run.values.get("validation_split")
        return TaskWorkload(task, data, self.tokenizer, batch_size, (data.split, measured))

    def _batch_size(self, run: Run) -> int:
        return self.eval_batch_size or run.train_config.batch_size
