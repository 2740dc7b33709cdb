"""The paper's tasks by name: their data, their prompts, and which metrics count. `lte.eval.tasks` measures them."""

from lte.data.tasks.data import TaskData, load_task_data
from lte.data.tasks.models import load_task_model
from lte.data.tasks.registry import TASKS, TaskConfig, get_task

__all__ = ["TASKS", "TaskConfig", "TaskData", "get_task", "load_task_data", "load_task_model"]
