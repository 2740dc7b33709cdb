"""What `lte calibrate` does: it measures the curve of a folder, writes it into the folder, and shows it."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.table import Table

from lte.cli.calibrate import Measuring
from lte.data.batches import Batch, as_batches
from lte.data.config import DataConfig, check_sequence_length, read_documents
from lte.data.encoding import Encoder
from lte.data.rows import LmCollator, PromptsCounted, shuffled
from lte.eval.kernels import use_kernels_
from lte.eval.models import DTYPES, load_any_model, load_config
from lte.eval.threshold_curve import check_calibrated, measure_curve, prompts_of, time_curve
from lte.files import write_json_atomic
from lte.hf.acceleration import describe_kernels
from lte.hf.card import write_card
from lte.hf.dense import load_dense_model, load_tokenizer
from lte.hf.inputs import check_next_token, check_tokens
from lte.hf.saved_config import rewrite_config
from lte.hf.sparsity_curve import Choice, CurvePoint, SparsityCurve, SparsityGoal, chosen_settings
from lte.records import hardware, versions
from lte.train.processes import training_device


def measure(
    folder: str,
    sources: Mapping[str, str],
    data: DataConfig,
    measuring: Measuring,
    goal: SparsityGoal,
    dense: str | None,
) -> SparsityCurve:
    """The curve of a folder; what it chose by the goal is not written yet.

    Args:
        folder: of an LTE model.
        sources: of each text, by its name.
        data: how files are read.
        measuring: where and how.
        goal: what the threshold shall meet.
        dense: the dense model's name, or `None`.

    Raises:
        ValueError: if the model does not predict the next token, or the dense one reads other tokens.
    """
    config = load_config(folder)
    check_next_token(config)
    check_sequence_length(data, getattr(config, "max_position_embeddings", None))
    tokenizer = load_tokenizer(folder)
    documents = {name: read_documents(source, data) for name, source in sources.items()}
    batches = {name: _batches(found, data, tokenizer, measuring) for name, found in documents.items()}
    other = None if dense is None else _load_dense(dense, folder, tokenizer, batches, measuring)
    model = use_kernels_(load_any_model(folder, measuring.dtype), measuring.kernels)
    for batch in chain.from_iterable(batches.values()):
        check_tokens(model, batch["input_ids"])
    prompts = prompts_of(batches, model) if measuring.time else {}
    check_calibrated(model, goal, other)

    def say(line: str) -> None:
        typer.echo(line, err=True)

    curve = measure_curve(model, batches, goal=goal, dense=other, sparsities=measuring.sparsities, say=say)
    if measuring.time:
        say(f"timing {len(curve.points)} thresholds")
        curve = time_curve(model, curve, prompts, dense=other)
    return curve.with_settings(
        dtype=measuring.dtype,
        kernels=describe_kernels(model),
        sequence_length=data.sequence_length,
        count_prompts=measuring.count_prompts,
        hardware=hardware(),
        versions=versions(),
    )


def _batches(documents: Any, data: DataConfig, tokenizer: Any, measuring: Measuring) -> list[Batch]:
    """Rows of a text, documents in a drawn order, up to `max_tokens`."""
    encoder = Encoder(data, tokenizer, progress=Console(stderr=True).is_terminal)
    rows, _ = encoder.rows(shuffled(list(documents), data), "validation", measuring.max_tokens)
    collator: Any = LmCollator(tokenizer.pad_token_id)
    collator = PromptsCounted(collator) if measuring.count_prompts else collator
    return list(as_batches(rows, None, measuring.batch_size, collator))


def _load_dense(
    dense: str, folder: str, tokenizer: Any, batches: Mapping[str, list[Batch]], measuring: Measuring
) -> Any:
    """The dense model, if its tokenizer reads the texts as the folder's does: perplexities per token compare then."""
    other = load_tokenizer(dense)
    for name, rows in batches.items():
        text = tokenizer.decode(rows[0]["input_ids"][0], skip_special_tokens=True)
        if other(text)["input_ids"] != tokenizer(text)["input_ids"]:
            raise ValueError(
                f"dense must read the same tokens as {folder}, got dense={dense}, whose tokenizer makes others of "
                f"{name}; give the model that the folder was made from"
            )
    typer.echo(f"Dense model: {dense}", err=True)
    return load_dense_model(dense, DTYPES[measuring.dtype]).to(training_device()).eval()


def save(folder: str, before: Mapping[str, Any], curve: SparsityCurve) -> None:
    """Has a folder remember its curve and run at the point that was chosen; its weights stay as they are.

    Args:
        folder: of an LTE model.
        before: what its `config.json` holds.
        curve: the new one.
    """
    path = Path(folder).expanduser()
    chosen = curve.chosen
    rewrite_config(path, {"lte_curve": curve.to_dict()} if chosen is None else chosen_settings(before, curve, chosen))
    write_card(path, load_config(folder))


def report(folder: str, curve: SparsityCurve, json: Path | None) -> None:
    """Prints a curve and what was chosen of it, and writes both to a file if one is given."""
    console = Console()
    config = load_config(folder)
    console.print(curve_table(curve, config.lte["threshold"], f"{folder} over its threshold"))
    point = next((each for each in curve.points if each.threshold == config.lte["threshold"]), None)
    if curve.chosen is not None:
        for line in describe_misses(curve, curve.chosen):
            console.print(line, highlight=False, soft_wrap=True)
    elif point is not None:
        asked = {"target_sparsity": config.lte["target_sparsity"]}
        as_trained = Choice(asked=asked, hold=curve.hold, point=point, interpolated=False)
        console.print("The threshold stays where it was.")
        for line in describe_misses(curve, as_trained):
            console.print(line, highlight=False, soft_wrap=True)
    if json is not None:
        write_json_atomic(json, {"model": folder, "curve": curve.to_dict(), "rows": curve_rows(curve)})


def curve_rows(curve: SparsityCurve) -> list[dict[str, Any]]:
    """The points of a curve as flat rows, with what follows from several fields of them."""
    return [_row(curve, point) for point in curve.points]


def _row(curve: SparsityCurve, point: CurvePoint) -> dict[str, Any]:
    return {
        "threshold": point.threshold,
        "sparsity": point.sparsity,
        "text_sparsity": {name: text.sparsity for name, text in point.texts.items()},
        "perplexity": point.perplexity,
        "perplexity_ratio": curve.perplexity_ratio(point),
        "text_perplexity": {name: text.perplexity for name, text in point.texts.items()},
        "bytes_per_token": point.bytes_per_token,
        "ms_per_token": point.ms_per_token,
    }


def curve_table(curve: SparsityCurve, threshold: float | None, title: str) -> Table:
    """The points of a curve by the logit of the threshold, see `CurvePoint.logit`; a star marks where the model is."""
    several, timed = len(curve.tokens) > 1, any(point.ms_per_token is not None for point in curve.points)
    between = [curve.chosen.point] if curve.chosen is not None and curve.chosen.interpolated else []
    columns = ["logit", "sparsity", *(curve.tokens if several else ()), "perplexity"]
    columns += [*([] if curve.dense is None else ["of dense"]), "MB per token", *(["ms per token"] if timed else [])]
    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column, justify="right", overflow="fold")
    for point in sorted([*curve.points, *between], key=lambda each: each.threshold):
        texts = [f"{100 * text.sparsity:.1f}%" for text in point.texts.values()]
        ratio = curve.perplexity_ratio(point)
        mark = "* " if point.threshold == threshold else ""
        row = [f"{mark}{point.logit:.2f}", f"{100 * point.sparsity:.1f}%"]
        row += [*(texts if several else []), f"{point.perplexity:.4g}", *([] if ratio is None else [f"{ratio:.3f}"])]
        row += [f"{point.bytes_per_token / 1e6:.3g}", *([_milliseconds(point.ms_per_token)] if timed else [])]
        table.add_row(*row)
    if (dense := curve.dense) is not None:
        row = ["dense", "", *([""] * len(curve.tokens) if several else []), f"{dense.perplexity:.4g}", "1"]
        row += [f"{dense.bytes_per_token / 1e6:.3g}", *([_milliseconds(dense.ms_per_token)] if timed else [])]
        table.add_row(*row)
    return table


def _milliseconds(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


def describe_misses(curve: SparsityCurve, choice: Choice) -> list[str]:
    """What was chosen, and by how much the sparsity of each text misses the target, a line each."""
    ((what, value),) = choice.asked.items()
    held = "each text" if choice.hold == "each" else "the mean over texts"
    lines = [
        f"At threshold {choice.point.threshold:.6g} the sparsity is {100 * choice.point.sparsity:.2f}%, "
        f"{'interpolated between measured points' if choice.interpolated else 'measured'}; asked for was "
        f"{what.replace('_', '-')} {value:g} on {held}."
    ]
    target = choice.target_sparsity
    for name, miss in sorted(choice.misses.items(), key=lambda pair: pair[1]):
        text = choice.point.texts[name]
        lines.append(
            f"  {name}: {100 * text.sparsity:.2f}%, {100 * miss:+.2f} points of {100 * target:.4g}%, perplexity "
            f"{text.perplexity:.4g}, {curve.tokens[name]:,} tokens"
        )
    return lines
