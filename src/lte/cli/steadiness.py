"""`lte steadiness`: how much of a model's routing, and of its answers, depends on rounding."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from lte.cli.command import TextToRead, check_model, quiet_transformers, reports_errors
from lte.files import check_place, write_json_atomic


@reports_errors
def steadiness(
    model: Annotated[str, typer.Argument(help="Folder or hub name of an LTE model.")],
    text: TextToRead = None,
    prompts: Annotated[int, typer.Option(min=2, help="Pieces of the text.")] = 20,
    prompt_length: Annotated[int, typer.Option(min=1, help="Tokens of a prompt.")] = 128,
    tokens: Annotated[int, typer.Option(min=2, help="Tokens of an answer; each piece has as many more.")] = 64,
    batch_size: Annotated[int, typer.Option(min=2, help="Prompts that are read together.")] = 8,
    json: Annotated[Path | None, typer.Option(help="Also write the result to this file.")] = None,
) -> None:
    """Says how steady the routing is: decisions and tokens that number formats, batches and kernels change.

    The model reads the same text in fp32 and in bf16, alone and in a batch, in plain PyTorch and on the kernels.

    Example: `lte steadiness out --text held-out.txt --json steadiness.json`
    """
    if json is not None:
        check_place("json", json)
    check_model("model", model)

    from lte.bench.text import read_text, text_ids, text_name
    from lte.eval.steadiness import SteadinessSettings, measure_steadiness
    from lte.hf.dense import load_tokenizer

    quiet_transformers()
    settings = SteadinessSettings(prompts=prompts, prompt_length=prompt_length, tokens=tokens, batch=batch_size)
    ids = text_ids(load_tokenizer(model), read_text(text), prompts, prompt_length + tokens)
    errors = Console(stderr=True, highlight=False)
    found = measure_steadiness(model, ids, settings, lambda said: errors.print(f"Measuring {said}"))
    found["text"] = text_name(text)
    print_steadiness(Console(), found)
    if json is not None:
        write_json_atomic(json, found)


def print_steadiness(console: Console, found: Mapping[str, Any]) -> None:
    """The result of `lte.eval.steadiness.measure_steadiness` as two tables."""
    near = Table(title="Scores near the threshold, share within", title_justify="left")
    shares = found["near_threshold"]
    for heading in ("", *next(iter(shares.values())), f"{_GOAL}, layer with most"):
        near.add_column(heading, justify="right")
    for dtype, by_distance in shares.items():
        totals = [_percent(each["share"]) for each in by_distance.values()]
        near.add_row(dtype, *totals, _percent(max(by_distance[_GOAL]["by_layer"])))
    console.print(near)
    title = f"{found['model']}: {found['prompts']} texts of {found['prompt_length']} + {found['tokens']} tokens"
    pairs = Table(title=title, title_justify="left")
    headings = ("compared", "flipped decisions", "first layer", "last layer", "a layer's own", "equal tokens", "dense")
    for heading in headings:
        pairs.add_column(heading, justify="left" if heading == "compared" else "right")
    for pair in found["pairs"]:
        pairs.add_row(*_row(pair))
    console.print(pairs)


def _row(pair: Mapping[str, Any]) -> tuple[str, ...]:
    dtype = f"{pair['dtype']}: " if pair["dtype"] else ""
    if pair["note"] is not None:
        return (f"{dtype}{pair['pair'].replace('_', ' ')}: {pair['note']}",)
    answers = ["" if pair[each] is None else _percent(pair[each]["equal_tokens"]) for each in _ANSWERS]
    by_layer = pair["flips_by_layer"]
    flips = (pair["flips"], by_layer[0], by_layer[-1], pair["own_flips"])
    return (f"{dtype}{pair['one']} / {pair['other']}", *map(_percent, flips), *answers)


_ANSWERS = ("answers", "dense_answers")
# The distance that goals are about.
_GOAL = "0.1"


def _percent(share: float) -> str:
    return f"{100 * share:.3g}%"
