"""Settings of a task's data."""

from __future__ import annotations

from dataclasses import dataclass

from lte.data.tasks.registry import TASKS, get_task
from lte.settings import option


@dataclass(frozen=True, kw_only=True)
class TaskConfig:
    """Which task, and from where. Every field is a flag of `lte train` and `lte eval`, and a key of the YAML file.

    Raises:
        ValueError: for an unknown task, numbers out of range, or options of a task without a task.
    """

    task: str | None = option(None, f"Task to train or measure instead of plain text: {', '.join(TASKS)}.")
    data_dir: str | None = option(
        None,
        "Folder with the task's original files (.gz, .bz2 and .xz too); unset: from the hub.",
        affects="nothing",
    )
    limit: int | None = option(None, "Measure at most this many examples of the task.", affects="nothing")
    max_new_tokens: int | None = option(None, "Tokens of a generated answer at most; unset: the task's own number.")

    def __post_init__(self) -> None:
        if self.task is not None:
            get_task(self.task)
        for name in ("data_dir", "limit", "max_new_tokens"):
            value = getattr(self, name)
            if value is not None and self.task is None:
                raise ValueError(f"task must be given with {name}, got {name}={value} and no task; add --task")
            if isinstance(value, int) and value < 1:
                raise ValueError(f"{name} must be at least 1, got {name}={value}")
