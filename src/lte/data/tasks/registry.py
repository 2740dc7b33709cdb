"""All tasks by name, found in the files of `lte.data.tasks.sets`, and the settings of a task's data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from pkgutil import iter_modules
from types import ModuleType
from typing import Any

from lte.config import check_choice
from lte.data.tasks import sets
from lte.data.tasks.task import Task
from lte.settings import option

# Settings of text that a task brings along.
TEXT_SETTINGS = (
    *("train", "validation", "calibration", "format", "name", "kind"),
    *("text_field", "prompt_field", "completion_field", "prompt_template", "messages_field", "mix", "mix_folder"),
    *("stream", "token_cache"),
)


def find_tasks(package: ModuleType) -> dict[str, Task]:
    """The tasks in `TASKS` of every file of a package, by name: files in the order of their names, tasks in the file's.

    Raises:
        ValueError: for a name that two tasks have.
    """
    found: dict[str, Task] = {}
    for file in iter_modules(package.__path__):
        for task in import_module(f"{package.__name__}.{file.name}").TASKS:
            if task.name in found:
                raise ValueError(f"tasks must have names of their own, got a second {task.name} in {file.name}")
            found[task.name] = task
    return found


TASKS: dict[str, Task] = find_tasks(sets)


def get_task(name: str) -> Task:
    """The task of a name.

    Raises:
        ValueError: for a name that no task has, with the nearest ones.
    """
    check_choice("task", name, TASKS)
    return TASKS[name]


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


def check_no_text(given: Mapping[str, Any]) -> None:
    """Raises a `ValueError` for settings of plain text beside a task."""
    for name in TEXT_SETTINGS:
        if name in given:
            raise ValueError(
                f"{name} must not be given with a task, which has its own data, got {name}={given[name]}; leave it "
                "out, or give --data-dir"
            )
