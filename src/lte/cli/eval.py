"""`lte eval`: perplexity or a task's metrics, measured sparsity, and work per token of a dense or LTE model."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from lte.cli.command import (
    KernelsOption,
    TargetOption,
    check_folder,
    check_model,
    check_seed,
    check_target,
    move_to_target_,
    quiet_transformers,
    reports_errors,
    takes_settings,
)
from lte.config import DTYPE_NAMES, GFLOP, KERNELS, WEIGHTS, check_choice, check_whole_number
from lte.data.config import DataConfig, check_sources
from lte.data.tasks.registry import TaskConfig, check_no_text
from lte.files import check_place
from lte.hf.sparsity_curve import choice_record
from lte.settings import build

if TYPE_CHECKING:
    from lte.eval.harness import HarnessResult
    from lte.records import ResultRecord


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

    def check(self) -> None:
        """Raises a `ValueError` for numbers out of range, or folders that do not exist."""
        for name, least in (("num_fewshot", 0), ("limit", 1)):
            if getattr(self, name) is not None:
                check_whole_number(name, getattr(self, name), least)
        check_folder("harness_tasks_dir", self.harness_tasks_dir)
        check_folder("harness_data", self.harness_data)


def check_harness_flags(given: Mapping[str, Any]) -> None:
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


@reports_errors
@takes_settings({TaskConfig: "Task", DataConfig: "Data", HarnessConfig: "lm-eval"})
def eval_command(
    model: Annotated[str, typer.Argument(help="Folder, hub name, or GGUF file; dense or LTE.")],
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences per forward pass.")] = 8,
    dtype: Annotated[str, typer.Option(help="Of the weights.", metavar="float32|bfloat16|float16")] = "float32",
    kernels: KernelsOption = "auto",
    weights: Annotated[
        str,
        typer.Option(
            help="What torchao rounds the weights to first: 8 bits, or 4 bits in groups of 128, 64 or 32.",
            metavar="|".join(WEIGHTS),
        ),
    ] = "native",
    target_sparsity: TargetOption = None,
    json: Annotated[Path | None, typer.Option(help="Also write the result to this file.")] = None,
    **given: Any,
) -> None:
    """Measures a model on held-out text or a task: its metrics, sparsity in hard mode, GFLOPs and bytes per token.

    Without `--validation` the held-out text is the part of `--train` that `lte train` holds out with the same settings.
    With `--task` it is the task's own split, or the one that `--split` names.

    With `--harness piqa,mmlu` tasks of lm-eval run in place of the text, and the sparsity is that of their passes.

    Example: `lte eval out --train my-text.jsonl --json out-eval.json`, or `lte eval out --task sst2 --data-dir glue`
    """
    check_harness_flags(given)
    check_choice("dtype", dtype, DTYPE_NAMES)
    check_choice("kernels", kernels, KERNELS)
    check_choice("weights", weights, WEIGHTS)
    harness = build(HarnessConfig, given) if "harness" in given else None
    # `limit` is of the question sets here.
    task = build(TaskConfig, {} if harness else given)
    data = build(DataConfig, given)
    if harness is not None:
        harness.check()
    elif task.task is not None:
        check_no_text(given)
        check_folder("data_dir", task.data_dir)
    else:
        check_sources(data, trains=False)
    check_seed("data_seed", data.data_seed)
    if json is not None:
        check_place("json", json)
    check_target(target_sparsity, check_model("model", model))

    from lte.eval.kernels import use_kernels_
    from lte.eval.models import load_any_model, task_record
    from lte.eval.rounding import check_torchao, memory_bytes, round_weights_
    from lte.hf.acceleration import describe_kernels
    from lte.hf.dense import load_tokenizer
    from lte.records import write_record
    from lte.runs.workload import workload_of

    quiet_transformers()
    check_torchao(weights)
    if harness is not None:
        names = {"model": model, "dtype": dtype, "weights": weights}
        loaded = use_kernels_(round_weights_(load_any_model(model, dtype), weights), kernels)
        move_to_target_(loaded, target_sparsity)
        run_harness(loaded, load_tokenizer(model), harness, batch_size, names, json)
        return
    splits = (None, given.get("split") or given.get("validation_split"))
    work = workload_of(task, data, load_tokenizer(model), batch_size, splits)
    loaded = use_kernels_(round_weights_(work.load_model(model, dtype), weights), kernels)
    move_to_target_(loaded, target_sparsity)
    work.load_data(loaded)
    start = time.monotonic()
    result = work.measure(loaded)
    record = task_record(
        loaded,
        result,
        task=work.name,
        split=work.split,
        model=model,
        seed=work.data_config.data_seed,
        tokens_trained=0,
        wall_time_s=time.monotonic() - start,
        config={
            **work.settings,
            "data_info": work.info,
            "dtype": dtype,
            "kernels": describe_kernels(loaded),
            **chosen_of(loaded),
        },
        weights=weights,
        weights_memory_bytes=memory_bytes(loaded),
    )
    print_evaluation(Console(), record)
    if json is not None:
        write_record(json, record)


def chosen_of(model: Any) -> dict[str, Any]:
    """For a record: the point of its curve that a model runs at, nothing where none was picked."""
    found = choice_record(model.config)
    return {} if found is None else {"threshold_choice": found}


def print_evaluation(console: Console, record: ResultRecord) -> None:
    """The numbers of a result record as a table."""
    title = f"{record['model']} on {record['task']}, {record['split']}"
    table = Table(show_header=False, title=title, title_justify="left")
    dense = record["method"] == "dense"
    sparsity = "dense model" if dense else f"{100 * record['sparsity']:.2f}%"
    if not dense:
        sparsity += f" (target {100 * record['target_sparsity']:g}%)"
    for name, value in record["metrics"].items():
        note = f" ({record['tokens_evaluated']} held-out tokens)" if name == record["metric"] else ""
        table.add_row(name.replace("_", " "), f"{value:.3f}{note}")
    table.add_row("FFN sparsity, measured", sparsity)
    table.add_row("GFLOPs per token", f"{record['flops_per_token'] / GFLOP:.4f} (block linears, 1 G = 2^30)")
    weights = "16-bit" if record.get("weights", "native") == "native" else record["weights"]
    table.add_row("weight MB per token", f"{record['bytes_per_token'] / 1e6:.1f} ({weights} weights, batch 1)")
    console.print(table)


def run_harness(
    network: Any, tokenizer: Any, config: HarnessConfig, batch_size: int, names: Mapping[str, str], json: Path | None
) -> None:
    """Runs the tasks, prints their scores, and writes a record each.

    Args:
        network: as it is to be measured.
        tokenizer: the model's.
        config: what to run.
        batch_size: rows per forward pass.
        names: what the records say of the network, `model`, `dtype` and `weights`.
        json: the record's file; of several tasks each has a file with its name before the suffix.
    """
    from lte.eval.harness import evaluate_harness, quiet_harness
    from lte.eval.rounding import memory_bytes
    from lte.hf.acceleration import describe_kernels
    from lte.records import result_record, write_record

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
    settings |= {"dtype": names["dtype"], "kernels": describe_kernels(network), **chosen_of(network)}
    common = {"model": names["model"], "seed": 0, "tokens_trained": 0, "weights": names["weights"]}
    common["weights_memory_bytes"] = memory_bytes(network)
    _print_scores(Console(), names["model"], result)
    if json is None:
        return
    for score in result.scores:
        own = score.to_fields(network)
        task = score.task.replace("::", "-").replace("/", "-")
        path = json if len(result.scores) == 1 else json.with_stem(f"{json.stem}-{task}")
        write_record(path, result_record(**{**common, **own, "config": {**settings, **own["config"]}}))


def _print_scores(console: Console, model: str, result: HarnessResult) -> None:
    table = Table(title=f"{model}, lm-eval {result.harness_version}", title_justify="left")
    for heading in ("task", "metric", "value", "standard error", "shots", "questions", "FFN sparsity"):
        table.add_column(heading, justify="left" if heading in ("task", "metric") else "right")
    for score in result.scores:
        sparsity = "dense" if score.measurement is None else f"{100 * score.measurement.sparsity:.2f}%"
        shots = "" if score.num_fewshot is None else str(score.num_fewshot)
        for metric, value in score.metrics.items():
            if "_stderr" not in metric:
                # `exact_match,strict-match` has its error under `exact_match_stderr,strict-match`.
                name, *filter_name = metric.split(",", 1)
                error = score.metrics.get(",".join([f"{name}_stderr", *filter_name]))
                numbers = (f"{value:.4f}", "" if error is None else f"{error:.4f}")
                table.add_row(score.task, metric, *numbers, shots, str(score.num_samples), sparsity)
    console.print(table)
