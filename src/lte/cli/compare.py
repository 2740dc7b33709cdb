"""`lte compare`: methods x sparsities x seeds from one file."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from lte.cli.command import (
    EXIT_ERROR,
    check_model,
    check_seed,
    print_error,
    quiet_transformers,
    reports_errors,
)
from lte.config import check_choice
from lte.files import check_place
from lte.runs.settings import PHASES, check_comparison, read_comparison

if TYPE_CHECKING:
    from lte.runs.runner import Estimate


@reports_errors
def compare(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="YAML files, see docs/compare.md.")],
    output: Annotated[
        Path | None,
        typer.Option(help="Folder for the records, of several files FILE in it; default: results/compare/FILE."),
    ] = None,
    work: Annotated[
        Path | None,
        typer.Option(help="Folder for models and locks, of several files FILE in it; default: runs/compare/FILE."),
    ] = None,
    model: Annotated[str | None, typer.Option(help="Dense model, in place of the file's.")] = None,
    data_dir: Annotated[str | None, typer.Option(help="Folder with the data, in place of the file's.")] = None,
    only: Annotated[list[str] | None, typer.Option(help="Name of a run; may be given several times.")] = None,
    seeds: Annotated[str | None, typer.Option(help="Seeds in place of the file's, as 0,1,2.")] = None,
    latency: Annotated[bool | None, typer.Option("--latency/--no-latency", help="Time decoding, on a GPU.")] = None,
    phase: Annotated[
        str, typer.Option(help="train: train the models and leave measuring to others; measure: the reverse; both.")
    ] = "both",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the runs and do none.")] = False,
) -> None:
    """Trains and measures methods side by side: one start per seed, one budget, a result record for each run.

    Runs that have a record are skipped, and interrupted ones go on. Started several times, once per GPU
    (CUDA_VISIBLE_DEVICES), the processes share the runs. Several files are done one after the other.

    Example: `lte compare experiments/compare/mrpc.yaml --data-dir glue --output results/mrpc`, or
    `lte compare experiments/ablations/*.yaml --data-dir glue --output results/ablations`
    """
    console = Console(highlight=False, soft_wrap=True)
    stems = [file.stem for file in files]
    if twice := sorted({stem for stem in stems if stems.count(stem) > 1}):
        raise ValueError(
            f"files must have names of their own, by which their folders are called, got {', '.join(twice)} twice"
        )
    check_choice("phase", phase, PHASES)
    given: dict[str, Any] = {"model": model, "data_dir": data_dir, "latency": latency}
    given |= {"seeds": None if seeds is None else _parse_seeds(seeds)}
    for file in files:
        check_model("model", check_comparison(file, **given))
        for name, place, default in (("output", output, "results/compare"), ("work", work, "runs/compare")):
            check_place(name, _folder(place, Path(default), file, files), folder=True)

    from lte.hf.dense import load_tokenizer
    from lte.runs.folders import Folders
    from lte.runs.plan import plan_runs
    from lte.runs.runner import Runner, estimate_run, execute_all
    from lte.runs.workload import Workloads

    quiet_transformers()
    comparisons = [read_comparison(file, **given) for file in files]
    plans = [plan_runs(comparison) for comparison in comparisons]
    for name in only or ():
        check_choice("only", name, [run.name for runs in plans for run in runs if run.measured])
    # That of a GGUF file takes seconds.
    tokenizers = {name: load_tokenizer(name) for name in {comparison.model for comparison in comparisons}}
    # Plain and flushed: a run that is cut off has said how far it came.
    say = functools.partial(print, flush=True)
    runners = []
    for file, comparison, runs in zip(files, comparisons, plans, strict=True):
        workloads = Workloads(comparison.model, tokenizers[comparison.model], comparison.eval_batch_size)
        folders = Folders(
            _folder(output, Path("results/compare"), file, files), _folder(work, Path("runs/compare"), file, files)
        )
        if dry_run:
            if len(files) > 1:
                console.print(f"{file}:")
            print_plan(console, [estimate_run(run, workloads, folders) for run in runs])
            continue
        if comparison.harness is not None and phase != "train":
            comparison.harness.check()
        runners.append(Runner(comparison, runs, folders, workloads, only or (), say, phase))
    if failed := execute_all(runners):
        print_error(f"failed: {', '.join(failed)}; their records say why, delete them to try again")
        raise typer.Exit(EXIT_ERROR)


def _folder(given: Path | None, default: Path, file: Path, files: list[Path]) -> Path:
    """Where one of the files keeps its things: a folder that was given for a single file is its own."""
    return given if given is not None and len(files) == 1 else (given or default) / file.stem


def print_plan(console: Console, estimates: list[Estimate]) -> None:
    """The runs as a table."""
    table = Table(box=None)
    # Names are not cut, however narrow the terminal.
    console.width = max(console.width, 160)
    for heading in ("run", "starts from", "teacher", "steps", "tokens", "state"):
        table.add_column(heading, no_wrap=True, justify="right" if heading in ("steps", "tokens") else "left")
    for one in estimates:
        state = "done" if one.done else "to do" if one.run.measured else "as needed"
        row = (one.run.name, one.run.base or "the model", one.run.teacher or "", f"{one.steps:,}", f"{one.tokens:,}")
        table.add_row(*row, state)
    console.print(table)
    tokens = sum(one.tokens for one in estimates if not one.done)
    runs = sum(one.run.measured for one in estimates)
    counts = f"{runs} runs with a record, {len(estimates) - runs} models that they start from"
    console.print(f"{counts}, about {tokens:,} tokens to train.")


def _parse_seeds(text: str) -> list[int]:
    try:
        found = [int(seed) for seed in text.split(",")]
    except ValueError:
        raise ValueError(f"seeds must be whole numbers, got seeds={text}; separate them with commas") from None
    for seed in found:
        check_seed("seeds", seed)
    return found
