"""All tasks by name."""

from __future__ import annotations

from lte.config import check_choice
from lte.tasks import generation, glue, instructions, language
from lte.tasks.task import Task

TASKS: dict[str, Task] = {task.name: task for file in (glue, generation, language, instructions) for task in file.TASKS}


def get_task(name: str) -> Task:
    """The task of a name.

    Raises:
        ValueError: for a name that no task has, with the nearest ones.
    """
    check_choice("task", name, TASKS)
    return TASKS[name]
