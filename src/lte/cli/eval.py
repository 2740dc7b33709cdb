"""`lte eval`: perplexity or a task's metrics, measured sparsity, and work per token of a dense or LTE model."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from lte.cli.errors import reports_errors
from lte.cli.harness import HarnessConfig, check_flags, run_harness
from lte.cli.kernels import KernelsOption
from lte.cli.models import quiet_transformers
from lte.cli.settings import takes_settings
from lte.data.config import DataConfig
from lte.data.tasks.config import TaskConfig
from lte.eval.flops import GFLOP
from lte.eval.models import load_any_model, task_record
from lte.hf.acceleration import describe_kernels
from lte.hf.dense import load_tokenizer
from lte.records import ResultRecord, write_record
from lte.runs.workload import TaskWorkload, TextWorkload, Workload, check_no_text
from lte.settings import build


@reports_errors
@takes_settings({TaskConfig: "Task", DataConfig: "Data", HarnessConfig: "lm-eval"})
def eval_command(
    model: Annotated[str, typer.Argument(help="Folder, hub name, or GGUF file; dense or LTE.")],
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences per forward pass.")] = 8,
    dtype: Annotated[str, typer.Option(help="Of the weights.", metavar="float32|bfloat16|float16")] = "float32",
    kernels: KernelsOption = "auto",
    json: Annotated[Path | None, typer.Option(help="Also write the result to this file.")] = None,
    **given: Any,
) -> None:
    """Measures a model on held-out text or a task: its metrics, sparsity in hard mode, GFLOPs and bytes per token.

    Without `--validation` the held-out text is the part of `--train` that `lte train` holds out with the same settings.
    With `--task` it is the task's own split, or the one that `--split` names.

    With `--harness piqa,mmlu` tasks of lm-eval run in place of the text, and the sparsity is that of their passes.

    Example: `lte eval out --train my-text.jsonl --json out-eval.json`, or `lte eval out --task sst2 --data-dir glue`
    """
    quiet_transformers()
    check_flags(given)
    if "harness" in given:
        loaded, names = load_any_model(model, dtype, kernels), {"model": model, "dtype": dtype}
        run_harness(loaded, load_tokenizer(model), build(HarnessConfig, given), batch_size, names, json)
        return
    work = _workload(given, load_tokenizer(model), batch_size)
    loaded = work.load_model(model, dtype, kernels)
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
        config={**work.settings, "data_info": work.info, "dtype": dtype, "kernels": describe_kernels(loaded)},
    )
    print_evaluation(Console(), record)
    if json is not None:
        write_record(json, record)


def _workload(given: Mapping[str, Any], tokenizer: Any, batch_size: int) -> Workload:
    data_config, task_config = build(DataConfig, given), build(TaskConfig, given)
    if task_config.task is None:
        return TextWorkload(data_config, tokenizer, batch_size)
    check_no_text(given)
    splits = (None, given.get("split") or given.get("validation_split"))
    return TaskWorkload(task_config, data_config, tokenizer, batch_size, splits)


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
    table.add_row("weight MB per token", f"{record['bytes_per_token'] / 1e6:.1f} (16-bit weights, batch 1)")
    console.print(table)
