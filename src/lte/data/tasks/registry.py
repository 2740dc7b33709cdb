"""All tasks by name, found in the files of `lte.data.tasks.sets`."""

from __future__ import annotations

from importlib import import_module
from pkgutil import iter_modules
from types import ModuleType

from lte.config import check_choice
from lte.data.tasks import sets
from lte.data.tasks.task import Task


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
