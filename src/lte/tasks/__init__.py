"""The paper's tasks by name: their data, their prompts, and which metrics count. `lte.eval.tasks` measures them."""

from lte.tasks.config import TaskConfig
from lte.tasks.data import TaskData, load_task_data
from lte.tasks.models import load_task_model
from lte.tasks.registry import TASKS, get_task

__all__ = ["TASKS", "TaskConfig", "TaskData", "get_task", "load_task_data", "load_task_model"]
