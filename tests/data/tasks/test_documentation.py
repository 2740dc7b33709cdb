"""docs/tasks.md says of every task what the code does."""

from __future__ import annotations

from pathlib import Path

import pytest

from lte.data.tasks import TASKS
from lte.data.tasks.task import ChatTask, GenerationTask

LINES = (Path(__file__).parents[3] / "docs" / "tasks.md").read_text().splitlines()


def row_of(name: str, columns: int) -> list[str]:
    """The cells of the row of a task in the table of so many columns."""
    rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in LINES if line.startswith("|"))
    return next(row for row in rows if len(row) == columns and f"`{name}`" in row[0])


@pytest.mark.parametrize("name", TASKS)
def test_the_table_has_every_task_with_its_metrics_split_and_source(name: str) -> None:
    task = TASKS[name]
    _, _, metrics, split, hub, _ = row_of(name, 6)
    assert metrics.startswith(", ".join(task.metrics))
    assert split.startswith("held out" if isinstance(task, ChatTask) else task.measured_split)
    assert hub == (task.hub.path or "none")


@pytest.mark.parametrize("name", [name for name, task in TASKS.items() if isinstance(task, GenerationTask)])
def test_prompts_are_those_of_the_code(name: str) -> None:
    task = TASKS[name]
    assert isinstance(task, GenerationTask)
    _, prompt, tokens = row_of(name, 3)
    assert task.template.partition("}")[2].replace("\n", "\\n") in prompt
    assert tokens == str(task.max_new_tokens)
