"""`lte bench`: how long FFNs, decoding steps and prompts take, sparse against dense, in one run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from lte.bench.settings import OWN, BenchSettings, parse_counts, parse_sparsities, split
from lte.bench.shapes import SHAPES, random_model, shape_config, shape_settings
from lte.cli.command import (
    EXIT_ERROR,
    MAX_SEED,
    TargetOption,
    after_saving,
    check_model,
    check_target,
    move_to_target_,
    print_error,
    quiet_transformers,
    read_text_file,
    reports_errors,
)
from lte.config import DTYPE_NAMES, check_choice
from lte.files import check_place

if TYPE_CHECKING:
    import torch

    from lte.bench.models import ModelPair
    from lte.bench.session import Session

DEFAULT_SHAPE = "smollm2-135m"
# What a run takes when nothing is said, and with --quick; on a CPU a large prompt alone would take minutes.
_LENGTHS = {"cuda": "16,64,256,1024,4096,8192", "cpu": "16,128"}
_BATCHES = {"cuda": "1,4,8", "cpu": "1,4"}


@reports_errors
def bench(
    model: Annotated[
        str | None,
        typer.Argument(help="Folder, hub name, or GGUF file. A dense model gets routers that are forced."),
    ] = None,
    shape: Annotated[
        str | None,
        typer.Option(
            help=f"In place of MODEL: random weights in this shape. Without both: {DEFAULT_SHAPE}.",
            metavar="|".join(SHAPES),
        ),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(help="Of the weights; by default bfloat16 on a GPU, else float32.", metavar="|".join(DTYPE_NAMES)),
    ] = None,
    weights: Annotated[
        str, typer.Option(help="What the kernels read; int8 halves the bytes.", metavar="native|int8")
    ] = "native",
    benchmarks: Annotated[str, typer.Option(help="What to time: some of ffn, decode, prefill.")] = "ffn,decode,prefill",
    sparsities: Annotated[
        str | None,
        typer.Option(
            help="Shares of experts to skip, forced through the routers' biases; `own` is an LTE model's own routing "
            "on text, `own@0.8` the same with all thresholds moved until that share is off. By default 0,0.5,0.8,0.9, "
            "for an LTE model own first."
        ),
    ] = None,
    target_sparsity: TargetOption = None,
    batches: Annotated[
        str | None,
        typer.Option(
            help=f"Sequences that decode together. Default: {_BATCHES['cuda']} on a GPU, else {_BATCHES['cpu']}."
        ),
    ] = None,
    lengths: Annotated[
        str | None,
        typer.Option(help=f"Tokens of a prompt. Default: {_LENGTHS['cuda']} on a GPU, else {_LENGTHS['cpu']}."),
    ] = None,
    routing: Annotated[
        str,
        typer.Option(
            help="Whether the tokens of a batch get the same forced experts, or each its own.",
            metavar="same|different",
        ),
    ] = "different",
    prefill_scope: Annotated[
        str,
        typer.Option(
            help="Whether prefill times FFNs or the whole model; auto: FFNs from a billion parameters on.",
            metavar="auto|ffn|model",
        ),
    ] = "auto",
    repeats: Annotated[int | None, typer.Option(min=1, help="Timed calls of each provider. Default: 20.")] = None,
    context_length: Annotated[int, typer.Option(help="Tokens that the static key-value cache holds.")] = 256,
    prompt_length: Annotated[
        int | None, typer.Option(help="Tokens of these before the first decoding step. Default: a quarter.")
    ] = None,
    compile: Annotated[
        bool | None,
        typer.Option(
            "--compile/--no-compile",
            help="Time models under torch.compile, too: the strongest dense baselines. By default on a GPU.",
        ),
    ] = None,
    autotune: Annotated[
        bool, typer.Option("--autotune/--no-autotune", help="Also the dense FFN under max-autotune.")
    ] = True,
    tunings: Annotated[
        int,
        typer.Option(
            min=0, help="How often decoding models are compiled and tuned; the fastest is timed. 0 compiles without."
        ),
    ] = 1,
    whole_step: Annotated[
        bool,
        typer.Option(
            "--whole-step/--no-whole-step",
            help="Time whole decoding steps, too: the sparse model's, and the same with all experts on.",
        ),
    ] = True,
    layers: Annotated[int | None, typer.Option(min=1, help="With --shape: layers of the model, if fewer.")] = None,
    text: Annotated[
        Path | None, typer.Option(help="Text for the model's own routing; by default Python's help topics.")
    ] = None,
    seed: Annotated[
        int, typer.Option(min=0, max=MAX_SEED, help="Seed of random weights, hidden states and routing.")
    ] = 0,
    budget_s: Annotated[
        float | None, typer.Option(help="Begin no further batch or length after so many seconds.")
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Half a minute: one batch, one length, two sparsities, few repeats.")
    ] = False,
    output: Annotated[
        Path | None,
        typer.Option(help="Write results to this path with .json, .csv and .png; rows appear as they are measured."),
    ] = None,
) -> None:
    """Times FFNs, decoding steps and prompts of a sparse model and of dense baselines, side by side in one run.

    Before anything is timed, the kernels' output is checked against the reference in plain PyTorch.

    Examples: `lte bench out --output results/bench` for a trained folder;
    `lte bench --shape llama2-7b --dtype bfloat16 --output results/bench_llama2_7b`
    """
    if model is not None and shape is not None:
        raise ValueError(f"model must not be given with --shape, got model={model} and shape={shape}")
    if model is None and target_sparsity is not None:
        raise ValueError(
            f"target_sparsity must be given with MODEL, got target_sparsity={target_sparsity}; leave it out"
        )
    check_choice("weights", weights, ("native", "int8"))
    if dtype is not None:
        check_choice("dtype", dtype, DTYPE_NAMES)

    def settings_on(device: str) -> BenchSettings:
        return BenchSettings(
            benchmarks=tuple(split(benchmarks)),
            sparsities=parse_sparsities(sparsities or ("0.5,0.9" if quick else "0,0.5,0.8,0.9")),
            batches=parse_counts("batches", batches or ("1" if quick else _BATCHES[device])),
            lengths=parse_counts("lengths", lengths or ("64" if quick else _LENGTHS[device])),
            routing=routing,  # type: ignore[arg-type]
            prefill_scope=prefill_scope,  # type: ignore[arg-type]
            repeats=repeats or (5 if quick else 20),
            context_length=context_length,
            prompt_length=prompt_length,
            compile=device == "cuda" if compile is None else compile,
            autotune=autotune and not quick,
            whole_step=whole_step,
            tunings=tunings,
            seed=seed,
            budget_s=budget_s,
        )

    # Whether there is a GPU only torch knows; what is wrong is wrong on both.
    settings_on("cpu")
    if text is not None:
        read_text_file("text", text)
    if output is not None:
        check_place("output", output.with_name(f"{output.name}.json"))
    if model is None:
        shape_settings(shape or DEFAULT_SHAPE, layers)
    else:
        check_target(target_sparsity, check_model("model", model))

    from lte.bench.models import model_pair
    from lte.bench.run import run_benchmarks
    from lte.bench.text import random_ids, read_text, text_ids
    from lte.bench.union import BATCHES
    from lte.eval.models import DTYPES, load_any_model
    from lte.hf.dense import load_tokenizer
    from lte.hf.install import sparse_ffns
    from lte.train.processes import training_device

    quiet_transformers()
    device = training_device()
    settings = settings_on(device.type)
    found = dtype or ("bfloat16" if device.type == "cuda" else "float32")
    if model is None:
        name = shape or DEFAULT_SHAPE
        pair = _random_pair(name, layers, settings, DTYPES[found], weights, device)
        vocabulary = pair.dense.config.vocab_size
        ids = random_ids(vocabulary, max(settings.batches), settings.context_length, seed)
    else:
        name = model
        loaded = load_any_model(model, found)
        move_to_target_(loaded, target_sparsity)
        if sparsities is None and sparse_ffns(loaded):
            settings = replace(settings, sparsities=(OWN, *settings.sparsities))
        pair = model_pair(loaded, weights)  # type: ignore[arg-type]
        ids = text_ids(
            load_tokenizer(model), read_text(text), max(*settings.batches, *BATCHES), settings.context_length
        )
    # Plain lines, flushed: a run that is cut off has said how far it came.
    session = run_benchmarks(name, pair, settings, ids, output, lambda line: print(line, flush=True))
    print_results(Console(), session)
    if session.failures:
        print_error(f"not everything could be measured: {'; '.join(session.failures)}")
        raise typer.Exit(EXIT_ERROR)


def _random_pair(
    name: str, layers: int | None, settings: BenchSettings, dtype: torch.dtype, weights: str, device: torch.device
) -> ModelPair:
    """A model of a shape; if FFNs alone are timed, only as many layers of it as that takes."""
    from lte.bench.models import LEAST_FFN_BYTES, model_pair

    config = shape_config(name, layers)
    # Random weights know no longest text.
    config.max_position_embeddings = max(config.max_position_embeddings, settings.context_length)
    ffn_numbers = 3 * config.hidden_size * config.intermediate_size
    if not settings.needs_model(ffn_numbers * config.num_hidden_layers):
        needed = max(4, -(-LEAST_FFN_BYTES // (ffn_numbers * dtype.itemsize)))
        config = shape_config(name, min(config.num_hidden_layers, needed))
    return model_pair(random_model(config, device, dtype, settings.seed), weights)  # type: ignore[arg-type]


def print_results(console: Console, session: Session) -> None:
    """The tables of a run; the figure beside its result files."""
    from lte.report.bench import break_even_report, latency_table, union_report

    results = session.results
    console.print(latency_table(results.rows, session.copy_gb_per_s))
    if results.header.get("union"):
        console.print(union_report(results.header["union"]))
    if results.header.get("break_even"):
        console.print(break_even_report(results.header["break_even"]))
    path = results.path("png")
    if path is not None and results.rows:
        written = ", ".join(str(results.path(ending)) for ending in ("json", "csv", "png"))
        after_saving(
            f"the results are in {results.path('json')}", "drawing them", None, lambda: _draw(results.rows, path)
        )
        console.print(f"Written: {written}")


def _draw(rows: list[dict[str, Any]], path: Path) -> None:
    from lte.report.figures import save_figure  # matplotlib is slow to load, and not wanted by other commands
    from lte.report.model_figures import latency_figure

    save_figure(latency_figure(rows), path)
