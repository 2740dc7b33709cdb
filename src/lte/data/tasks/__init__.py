"""The paper's tasks by name: their data, their prompts, and which metrics count. `lte.eval.tasks` measures them."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lte.data.tasks.registry import TASKS, TaskConfig, get_task

if TYPE_CHECKING:
    from lte.data.tasks.data import TaskData, load_task_data
    from lte.data.tasks.models import load_task_model

# Loaded when they are asked for: the names of the tasks are wanted before torch is loaded.
_ON_DEMAND = {
    "TaskData": "lte.data.tasks.data",
    "load_task_data": "lte.data.tasks.data",
    "load_task_model": "lte.data.tasks.models",
}

__all__ = ["TASKS", "TaskConfig", "TaskData", "get_task", "load_task_data", "load_task_model"]


def __getattr__(name: str) -> Any:
    if name in _ON_DEMAND:
        return getattr(import_module(_ON_DEMAND[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
