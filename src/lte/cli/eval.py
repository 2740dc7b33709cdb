"""`lte eval`: perplexity, measured sparsity, and work per token of a dense or LTE model."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from lte.cli.errors import reports_errors
from lte.cli.kernels import KernelsOption
from lte.cli.models import held_out_batches, load_any_model, quiet_transformers
from lte.cli.settings import build, takes_settings
from lte.eval.flops import GFLOP
from lte.eval.methods import Measurement, record_fields
from lte.eval.perplexity import PerplexityResult, evaluate_model
from lte.eval.results import result_record, write_json_atomic
from lte.hf.acceleration import describe_kernels
from lte.hf.dense import load_tokenizer
from lte.train.data import load_lm_datasets
from lte.train.data_config import DataConfig


@reports_errors
@takes_settings({DataConfig: "Data"})
def eval_command(
    model: Annotated[str, typer.Argument(help="Folder, hub name, or GGUF file; dense or LTE.")],
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences per forward pass.")] = 8,
    dtype: Annotated[str, typer.Option(help="Of the weights.", metavar="float32|bfloat16|float16")] = "float32",
    kernels: KernelsOption = "auto",
    json: Annotated[Path | None, typer.Option(help="Also write the result to this file.")] = None,
    **given: Any,
) -> None:
    """Measures a model on held-out text: perplexity, sparsity in hard mode, GFLOPs and bytes per token.

    Without `--validation` the held-out text is the part of `--train` that `lte train` holds out with the same settings.

    Example: `lte eval out --train my-text.jsonl --json out-eval.json`
    """
    quiet_transformers()
    data_config = build(DataConfig, given)
    tokenizer = load_tokenizer(model)
    loaded = load_any_model(model, dtype, kernels)
    data = load_lm_datasets(data_config, tokenizer, max_positions(loaded))
    start = time.monotonic()
    batches = held_out_batches(data.validation, batch_size, tokenizer.pad_token_id)
    perplexity, measurement = evaluate_model(loaded, batches)
    record = evaluation_record(
        loaded,
        perplexity,
        measurement,
        task=data_config.task,
        model=model,
        seed=data_config.data_seed,
        tokens_trained=0,
        wall_time_s=time.monotonic() - start,
        config={"data": vars(data_config), "data_info": data.info, "dtype": dtype, "kernels": describe_kernels(loaded)},
    )
    print_evaluation(Console(), record)
    if json is not None:
        write_json_atomic(json, record)


def max_positions(model: Any) -> int | None:
    """The longest sequence that a model takes, if its config says so."""
    return getattr(model.config, "max_position_embeddings", None)


def evaluation_record(
    network: Any, perplexity: PerplexityResult, measurement: Measurement | None, **fields: Any
) -> dict[str, Any]:
    """A result record of one evaluation; `fields` are those that the network does not tell."""
    return result_record(
        **{
            **record_fields(network, measurement),
            "metric": "perplexity",
            "value": perplexity.perplexity,
            "split": "validation",
            "tokens_evaluated": perplexity.tokens,
            **fields,
        }
    )


def print_evaluation(console: Console, record: dict[str, Any]) -> None:
    """The numbers of a result record as a table."""
    table = Table(show_header=False, title=f"{record['model']} on {record['task']}", title_justify="left")
    dense = record["method"] == "dense"
    sparsity = "dense model" if dense else f"{100 * record['sparsity']:.2f}%"
    if not dense:
        sparsity += f" (target {100 * record['target_sparsity']:g}%)"
    table.add_row("perplexity", f"{record['value']:.3f} ({record['tokens_evaluated']} held-out tokens)")
    table.add_row("FFN sparsity, measured", sparsity)
    table.add_row("GFLOPs per token", f"{record['flops_per_token'] / GFLOP:.4f} (block linears, 1 G = 2^30)")
    table.add_row("weight MB per token", f"{record['bytes_per_token'] / 1e6:.1f} (16-bit weights, batch 1)")
    console.print(table)
