"""Curves of a training that go on where a resumed run goes on: one run of TensorBoard, trackio or W&B for both."""

from __future__ import annotations

import os
import uuid
from pathlib import Path
from typing import Any

from lte.files import write_text_atomic
from lte.train.processes import is_main_process

RUN_ID_FILE = "run_id"
# Which this process gave to W&B: a later run of the process has its own.
_GIVEN: set[str] = set()


def named_run(output: Path, reporters: list[str]) -> str | None:
    """The name of a run in its reporters, which it keeps when it is resumed; `None` without any.

    W&B goes by an id: it gets it from `WANDB_RUN_ID`, if the user set none.

    Args:
        output: folder for checkpoints and logs; a file in it holds what makes the name the run's own.
        reporters: as `transformers.TrainingArguments.report_to`.
    """
    if not reporters or not is_main_process():
        return None
    path = output / RUN_ID_FILE
    if not path.exists():
        output.mkdir(parents=True, exist_ok=True)
        write_text_atomic(path, uuid.uuid4().hex[:8] + "\n")
    run_id = path.read_text(encoding="utf-8").strip()
    if "wandb" in reporters:
        if os.environ.get("WANDB_RUN_ID") in (None, *_GIVEN):
            os.environ["WANDB_RUN_ID"] = run_id
            _GIVEN.add(run_id)
        os.environ.setdefault("WANDB_RESUME", "allow")
    folder = output.absolute()
    return f"{(folder.parent if folder.name == 'checkpoints' else folder).name}-{run_id}"


def write_in_one_place(callbacks: list[Any], output: Path) -> None:
    """Has TensorBoard's events of a run and of those that resume it lie in one folder, which it shows as one run."""
    for callback in callbacks:
        if type(callback).__name__ == "TensorBoardCallback" and getattr(callback, "logging_dir", "") is None:
            callback.logging_dir = str(output / "runs")
