"""`lte eval --harness`: tasks of lm-eval on a loaded model, one result record each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from lte.data.config import DataConfig
from lte.data.tasks.config import TaskConfig
from lte.eval.harness import HarnessResult, TaskScore, evaluate_harness, quiet_harness
from lte.hf.acceleration import describe_kernels
from lte.records import ResultRecord, result_record, write_record


@dataclass(frozen=True)
class HarnessConfig:
    """What runs of lm-eval.

    Attributes:
        harness: Tasks, groups or tags of lm-eval, with commas between them, in place of held-out text. Those named
          ..._files read --harness-data.
        num_fewshot: Examples before each question; by default what the task says.
        apply_chat_template: Put each question to the model as a chat in its tokenizer's format.
        limit: Questions or examples of a task at most.
        harness_tasks_dir: Folder with more task files of lm-eval.
        harness_data: Folder with the files of the ..._files tasks.
    """

    harness: str | None = None
    num_fewshot: int | None = None
    apply_chat_template: bool = False
    limit: int | None = None
    harness_tasks_dir: str | None = None
    harness_data: str | None = None

    @property
    def tasks(self) -> list[str]:
        """The names in `harness`."""
        return [name.strip() for name in (self.harness or "").split(",") if name.strip()]


def check_flags(given: Mapping[str, Any]) -> None:
    """Refuses flags that would do nothing.

    Raises:
        ValueError: for flags of lm-eval without `--harness`, or flags of the held-out text or of a task with it.
    """
    own = {field.name for field in fields(HarnessConfig)} - {"harness"}
    of_tasks = {field.name for field in fields(TaskConfig)}
    idle = ({f.name for f in fields(DataConfig)} | of_tasks) - own if "harness" in given else own - of_tasks
    for name in sorted(idle):
        if name in given:
            rule = "not be given with --harness" if "harness" in given else "not be given without --harness"
            raise ValueError(f"{name} must {rule}, got {name}={given[name]}; see `lte eval --help`")


def run_harness(
    network: Any, tokenizer: Any, config: HarnessConfig, batch_size: int, names: Mapping[str, str], json: Path | None
) -> None:
    """Runs the tasks, prints their scores, and writes a record each.

    Args:
        network: as it is to be measured.
        tokenizer: the model's.
        config: what to run.
        batch_size: rows per forward pass.
        names: what the records say of the network, `model` and `dtype`.
        json: the record's file; of several tasks each has a file with its name before the suffix.
    """
    quiet_harness()
    result = evaluate_harness(
        network,
        tokenizer,
        config.tasks,
        num_fewshot=config.num_fewshot,
        apply_chat_template=config.apply_chat_template,
        limit=config.limit,
        batch_size=batch_size,
        tasks_dir=config.harness_tasks_dir,
        data_dir=config.harness_data,
    )
    settings = {**asdict(config), "batch_size": batch_size, "harness_version": result.harness_version}
    settings |= {"dtype": names["dtype"], "kernels": describe_kernels(network)}
    common = {"model": names["model"], "seed": 0, "tokens_trained": 0, "config": settings}
    records = [_record(network, score, common) for score in result.scores]
    _print_scores(Console(), names["model"], result)
    if json is not None:
        for record in records:
            path = json if len(records) == 1 else json.with_stem(f"{json.stem}-{_file_name(record.task)}")
            write_record(path, record)


def _record(network: Any, score: TaskScore, common: Mapping[str, Any]) -> ResultRecord:
    fields = score.to_fields(network)
    return result_record(**{**common, **fields, "config": {**common["config"], **fields["config"]}})


def _file_name(task: str) -> str:
    return task.replace("::", "-").replace("/", "-")


def _print_scores(console: Console, model: str, result: HarnessResult) -> None:
    table = Table(title=f"{model}, lm-eval {result.harness_version}", title_justify="left")
    for heading in ("task", "metric", "value", "standard error", "shots", "questions", "FFN sparsity"):
        table.add_column(heading, justify="left" if heading in ("task", "metric") else "right")
    for score in result.scores:
        sparsity = "dense" if score.measurement is None else f"{100 * score.measurement.sparsity:.2f}%"
        shots = "" if score.num_fewshot is None else str(score.num_fewshot)
        for metric, value in score.metrics.items():
            if "_stderr" not in metric:
                error = score.metrics.get(_error_name(metric))
                numbers = (f"{value:.4f}", "" if error is None else f"{error:.4f}")
                table.add_row(score.task, metric, *numbers, shots, str(score.num_samples), sparsity)
    console.print(table)


def _error_name(metric: str) -> str:
    """`exact_match,strict-match` has its error under `exact_match_stderr,strict-match`."""
    name, comma, filter_name = metric.partition(",")
    return f"{name}_stderr{comma}{filter_name}"
