"""`lte unions`: what the tokens of a batch, a draft or a prompt leave off together."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from lte.cli.command import TextToRead, check_model, quiet_transformers, reports_errors
from lte.config import DTYPE_NAMES, check_choice
from lte.files import check_place, write_json_atomic


@reports_errors
def unions(
    model: Annotated[str, typer.Argument(help="Folder or hub name of an LTE model.")],
    text: TextToRead = None,
    pieces: Annotated[int, typer.Option(min=2, help="Pieces of the text, each read alone.")] = 64,
    length: Annotated[int, typer.Option(min=2, help="Tokens of a piece.")] = 256,
    oracle_layers: Annotated[
        int, typer.Option(min=0, help="Layers of which it is said what other experts would reach.")
    ] = 4,
    oracle_tokens: Annotated[int, typer.Option(min=1, help="Tokens on which that is measured.")] = 8192,
    dtype: Annotated[str, typer.Option(help="Of the weights.", metavar="|".join(DTYPE_NAMES))] = "float32",
    seed: Annotated[int, typer.Option(min=0, help="Of random tokens and of the other experts.")] = 0,
    json: Annotated[Path | None, typer.Option(help="Also write the result to this file.")] = None,
) -> None:
    """Says what several tokens leave off together: neighbours, random ones, and those of different texts.

    A batch, the check of a draft and a prompt read the union of their tokens' experts.

    Example: `lte unions out --text held-out.txt --json unions.json`
    """
    check_choice("dtype", dtype, DTYPE_NAMES)
    if json is not None:
        check_place("json", json)
    check_model("model", model)

    from lte.bench.text import read_text, text_ids, text_name
    from lte.eval.models import load_any_model
    from lte.eval.unions import UnionSettings, measure_unions
    from lte.hf.dense import load_tokenizer

    quiet_transformers()
    settings = UnionSettings(pieces, length, oracle_layers, oracle_tokens, seed)
    ids = text_ids(load_tokenizer(model), read_text(text), pieces, length)
    errors = Console(stderr=True, highlight=False)
    found = measure_unions(load_any_model(model, dtype), ids, settings, lambda said: errors.print(f"Measuring {said}"))
    found = {"model": model, "text": text_name(text), "dtype": dtype, **found}
    print_unions(Console(), found)
    if json is not None:
        write_json_atomic(json, found)


_KINDS = {
    "consecutive": "in a row",
    "random": "random, same piece",
    "texts": "different texts",
    "frequencies": "independent",
    "uniform": "independent, all alike",
}
_LEVEL = 0.05


def print_unions(console: Console, found: Mapping[str, Any]) -> None:
    """The result of `lte.eval.unions.measure_unions` as tables."""
    title = (
        f"{found['model']}: {_percent(found['sparsity'])} of the experts off for a token; off for several together, "
        f"{found['pieces']} pieces of {found['length']} tokens"
    )
    table = _table(title, ("tokens", *_KINDS.values()))
    for row in found["rows"]:
        shares = [_percent(row[name]["sparsity"]) if name in row else "" for name in _KINDS]
        table.add_row(str(row["tokens"]), *shares)
    console.print(table)
    (level,) = [each for each in found["extremes"] if each["level"] == _LEVEL]
    title = (
        f"{_percent(level['nearly_never'])} of the experts are on for at most {_percent(_LEVEL)} of the tokens, "
        f"{_percent(level['nearly_always'])} for all but that; off for tokens in a row:"
    )
    table = _table(title, ("tokens", "all", "of rare experts", "of the rest", "the rest alone", "independent"))
    for row in level["rows"]:
        parts = row["of_nearly_never"], row["of_nearly_always"] + row["of_others"]
        table.add_row(
            str(row["tokens"]), *map(_percent, (sum(parts), *parts, row["others"], row["others_frequencies"]))
        )
    console.print(table)
    if found["oracle"] is not None:
        console.print(_oracle(found["oracle"]))


_CHOICES = {
    "routers": "the model's own",
    "ideal": "its experts, best choice",
    "regrouped": "other experts, best choice",
    "neurons": "single neurons, best choice",
}


def _oracle(oracle: Mapping[str, Any]) -> Table:
    mean = oracle["mean"]
    numbers = list(mean["routers"]["sparsity"])
    title = f"Off for tokens in a row at the same share for each token, layers {', '.join(map(str, oracle['layers']))}"
    table = _table(title, ("choice", "contributions kept", *(f"{n} tokens" for n in numbers)))
    for name, heading in _CHOICES.items():
        shares = [mean[name]["sparsity"][n] for n in numbers]
        table.add_row(heading, *map(_percent, (mean[name]["kept"], *shares)))
        if "shared" in mean[name]:
            shares = [mean[name]["shared"][n] for n in numbers]
            row = (mean["routers"]["kept"], *shares)
            table.add_row(heading.replace("best choice", "one choice for all"), *map(_percent, row))
    return table


def _table(title: str, headings: tuple[str, ...]) -> Table:
    table = Table(title=title, title_justify="left")
    for number, heading in enumerate(headings):
        table.add_column(heading, justify="right" if number else "left")
    return table


def _percent(share: float | None) -> str:
    if share is None:
        return ""
    return f"{100 * share:.3g}%" if share >= 1e-5 else "0%"
