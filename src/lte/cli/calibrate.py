"""`lte calibrate`: quality, sparsity, bytes and time of a folder over its threshold, which it sets to a goal."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from lte.cli.command import (
    KernelsOption,
    check_model,
    check_seed,
    given_flags,
    quiet_transformers,
    reports_errors,
    takes_settings,
)
from lte.cli.data import SHARED
from lte.config import DTYPE_NAMES, KERNELS, LteConfig, check_choice, check_fraction
from lte.data.config import DataConfig, check_sources
from lte.files import check_place, is_gguf
from lte.hf.sparsity_curve import SparsityCurve, SparsityGoal, curve_of
from lte.settings import build

OF_TEXTS = ("dense", "sparsities", "max_tokens", "count_prompts", "time", "batch_size", "dtype", "kernels")
"""Flags about how the curve is measured, beside those of the text."""

DEFAULT_SPARSITIES = "0,0.02,0.05,0.1,0.2,0.3,0.4,0.5,0.6,0.7,0.8,0.9,0.95"


@dataclass(frozen=True)
class Measuring:
    """How a curve is measured.

    Attributes:
        sparsities: where, about.
        max_tokens: of each text.
        batch_size: rows per pass.
        dtype: of the weights.
        kernels: what computes the FFNs.
        count_prompts: whether the sparsity is that of prompts, too.
        time: whether decoding is timed.
    """

    sparsities: tuple[float, ...]
    max_tokens: int
    batch_size: int
    dtype: str
    kernels: str
    count_prompts: bool
    time: bool


@reports_errors
@takes_settings({DataConfig: "Data, as in lte train"}, only=(*SHARED, "data_seed"))
def calibrate(
    model: Annotated[str, typer.Argument(help="Folder of an LTE model on this machine.")],
    texts: Annotated[
        list[str] | None,
        typer.Option(
            help="File, glob, or hub data set of one kind of text; give it once for each kind. Without it the curve "
            "that the folder remembers is used."
        ),
    ] = None,
    target_sparsity: Annotated[
        float | None, typer.Option(help="Set the threshold that skips this share of FFN neurons.")
    ] = None,
    max_perplexity_ratio: Annotated[
        float | None,
        typer.Option(help="Set the sparsest threshold with at most so many times the dense model's perplexity."),
    ] = None,
    hold: Annotated[
        str | None,
        typer.Option(
            help="Whether the mean over texts meets that, or each text does. By default mean, without --texts what the "
            "curve was measured with.",
            metavar="mean|each",
        ),
    ] = None,
    dense: Annotated[
        str | None,
        typer.Option(
            help="Dense model to compare with: folder, hub name, or GGUF file. By default the one that the folder "
            "names, if it is on this machine."
        ),
    ] = None,
    sparsities: Annotated[str, typer.Option(help="Where to measure the curve, about.")] = DEFAULT_SPARSITIES,
    max_tokens: Annotated[int, typer.Option(min=2, help="Tokens of each text at most.")] = 16384,
    count_prompts: Annotated[
        bool,
        typer.Option(
            "--count-prompts",
            help="Count the tokens of prompts, too, in the sparsity of completions and chats, not of answers alone.",
        ),
    ] = False,
    time: Annotated[
        bool, typer.Option("--time/--no-time", help="Time decoding by the path that lte generate takes.")
    ] = True,
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences per forward pass.")] = 8,
    dtype: Annotated[str, typer.Option(help="Of the weights.", metavar="float32|bfloat16|float16")] = "float32",
    kernels: KernelsOption = "auto",
    json: Annotated[Path | None, typer.Option(help="Also write the curve to this file.")] = None,
    **given: Any,
) -> None:
    """Measures the curve of quality, sparsity, bytes and time over a folder's one threshold, and sets the threshold.

    The folder remembers the curve: `--target-sparsity` of this command without `--texts`, of `lte eval`, `generate` and
    `bench`, and `from_pretrained(folder, target_sparsity=0.6)` pick other points of it. No weight is changed. Give each
    kind of text that the model is for as a file of its own: kinds count the same, and the report says by how much each
    misses the target.

    Example: `lte calibrate out --texts articles.jsonl --texts code.jsonl --target-sparsity 0.6`
    """
    held: Any = hold or "mean"
    goal = SparsityGoal(target_sparsity=target_sparsity, max_perplexity_ratio=max_perplexity_ratio, hold=held)
    check_choice("dtype", dtype, DTYPE_NAMES)
    check_choice("kernels", kernels, KERNELS)
    measuring = Measuring(_parse(sparsities), max_tokens, batch_size, dtype, kernels, count_prompts, time)
    if json is not None:
        check_place("json", json)
    found = check_folder_of_lte(model)
    if not texts:
        _check_idle(goal)
        curve = _remembered(found, goal, hold)
    else:
        data = build(DataConfig, {**given, "train": texts})
        check_sources(data)
        check_seed("data_seed", data.data_seed)
        sources = dict(zip(names_of(texts), texts, strict=True))
        known = _dense_model(found, dense, needed=goal.max_perplexity_ratio is not None)

        # From here on torch is loaded.
        from lte.cli.calibration import measure

        quiet_transformers()
        curve = measure(model, sources, data, measuring, goal, known)

    from lte.cli.calibration import report, save

    save(model, found, curve)
    report(model, curve, json)
    if curve.chosen is None and goal.is_set:
        from lte.eval.threshold_curve import raise_missed

        raise_missed(curve, goal)


def check_folder_of_lte(model: str) -> dict[str, Any]:
    """What the config of an LTE folder on this machine holds.

    Raises:
        ValueError: for anything else, a GGUF file, a dense model or one of another method say.
    """
    rule = "model must be a folder of an LTE model on this machine, whose threshold can be moved"
    path = Path(model).expanduser()
    if is_gguf(path):
        raise ValueError(f"{rule}, got the GGUF file {model}, which holds a dense model; `lte train` makes it sparse")
    found = check_model("model", model)
    if not path.is_dir():
        raise ValueError(f"{rule}, got {model}; download it, and give the folder")
    if not found:
        # What is wrong with its config says the loading.
        from lte.eval.models import load_config

        quiet_transformers()
        load_config(model)
    settings = found.get("lte") or found.get("lte_method")
    if not isinstance(settings, dict):
        raise ValueError(f"{rule}, got {model}, a dense one; `lte train` makes it sparse")
    name = settings.get("name", LteConfig.name)
    if name != LteConfig.name:
        raise ValueError(f"{rule}, got {model} of the method {name}; `lte.calibrate_` sets what that decides by")
    if not os.access(path, os.W_OK):
        raise ValueError(f"{rule} and written, got {model}, in which nothing can be written; copy it")
    return found


def names_of(texts: Sequence[str]) -> list[str]:
    """What the report calls each source: the file's name, or where several have it, the source as it was given.

    Raises:
        ValueError: for a source that is given twice.
    """
    twice = [text for text in texts if list(texts).count(text) > 1]
    if twice:
        raise ValueError(f"texts must each be given once, got {twice[0]} twice; leave one out")
    short = [Path(text).name for text in texts]
    return [text if short.count(name) > 1 else name for text, name in zip(texts, short, strict=True)]


def _parse(sparsities: str) -> tuple[float, ...]:
    try:
        found = tuple(float(part) for part in sparsities.split(",") if part.strip())
    except ValueError:
        raise ValueError(f"sparsities must be numbers with commas between them, got sparsities={sparsities}") from None
    for one in found:
        check_fraction("sparsities", one)
    if not found:
        raise ValueError(f"sparsities must name at least one, got sparsities={sparsities!r}")
    return found


def _check_idle(goal: SparsityGoal) -> None:
    """Refuses flags that would do nothing without `--texts`, also those with the value that they have by default."""
    if not goal.is_set:
        raise ValueError("--texts FILE must be given to measure the curve, or a target to pick from it, got neither")
    idle = sorted(given_flags() & {*OF_TEXTS, *SHARED, "data_seed"})
    if idle:
        raise ValueError(f"--{idle[0].replace('_', '-')} must be given with --texts, got none; leave it out")


def _remembered(found: Mapping[str, Any], goal: SparsityGoal, hold: Any) -> SparsityCurve:
    """The folder's own curve, with the point that the goal picks."""
    if goal.target_sparsity is not None:
        curve = curve_of(found)
        return replace(curve, chosen=curve.at_target(goal.target_sparsity, hold))
    assert goal.max_perplexity_ratio is not None
    curve = curve_of(found, why="max_perplexity_ratio")
    return replace(curve, chosen=curve.within_ratio(goal.max_perplexity_ratio, hold))


def _dense_model(found: Mapping[str, Any], dense: str | None, needed: bool) -> str | None:
    """The dense model to compare with: the one that is given, or that the folder names and this machine has."""
    if dense is not None:
        settings = check_model("dense", dense)
        if settings.get("lte") or settings.get("lte_method"):
            raise ValueError(f"dense must be a dense model, got dense={dense}, which a method made sparse")
        return dense
    measured = found.get("lte_measurement")
    name = measured.get("model") if isinstance(measured, dict) else None
    if isinstance(name, str) and (is_gguf(name) or (Path(name).expanduser() / "config.json").is_file()):
        return name
    if needed:
        names = f"names {name}, which is not here" if name else "names none"
        raise ValueError(
            f"--max-perplexity-ratio must have a dense model to compare with, and the folder {names}; give it with "
            "--dense MODEL"
        )
    return None
