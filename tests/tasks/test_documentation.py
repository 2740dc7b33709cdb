"""docs/tasks.md says of every task what the code does."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from lte.tasks import TASKS
from lte.tasks.task import GenerationTask

TEXT = (Path(__file__).parents[2] / "docs" / "tasks.md").read_text()
ROWS = {
    cells[1].strip(" `"): cells for cells in (line.split("|") for line in TEXT.splitlines() if line.startswith("|"))
}


@pytest.mark.parametrize("name", TASKS)
def test_the_table_has_every_task_with_its_metrics_split_and_source(name: str) -> None:
    task, (metrics, split, hub) = TASKS[name], (ROWS[name][place].strip() for place in (3, 4, 5))
    assert metrics.startswith(", ".join(task.metrics))
    assert split.startswith("held out" if name in ("lima", "alpaca", "tulu") else task.measured_split)
    assert hub == (task.hub.path or "none")


@pytest.mark.parametrize("name", [name for name, task in TASKS.items() if isinstance(task, GenerationTask)])
def test_prompts_are_those_of_the_code(name: str) -> None:
    task = TASKS[name]
    assert isinstance(task, GenerationTask)
    row = next(
        line for line in TEXT.splitlines() if re.match(rf"\| .*`{name}`.*Description|\| .*`{name}`.*Summary:", line)
    )
    assert task.template.partition("}")[2].replace("\n", "\\n") in row
    assert row.endswith(f"| {task.max_new_tokens} |")
