"""`lte data`: what lte reads of files, and one row as a model will see it. Trains nothing."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from lte.cli.command import check_model, quiet_transformers, read_template, reports_errors, takes_settings
from lte.data.config import DataConfig, check_sources, read_documents
from lte.settings import build

# What decides how files are read and cut into rows.
SHARED = (
    *("format", "name", "split", "kind", "text_field", "prompt_field", "completion_field"),
    *("prompt_template", "messages_field", "sequence_length"),
)


@reports_errors
@takes_settings({DataConfig: "Data, as in lte train"}, only=SHARED)
def data(
    sources: Annotated[list[str], typer.Argument(help="Files, globs, hub data sets, or pydoc-topics.")],
    model: Annotated[
        str | None, typer.Option(help="Model whose tokenizer and chat template write the row; no weights are loaded.")
    ] = None,
    chat_template: Annotated[
        Path | None, typer.Option(help="File with another chat template.", exists=True, dir_okay=False)
    ] = None,
    **given: Any,
) -> None:
    """Shows what lte reads of files: the columns it uses and how, and a row as the model will see it.

    What trains stands in double brackets. With `--model` all rows are tokenised, so faults of any row are found, and
    the row is what the model gets; without, it is the document before that.

    Example: `lte data chats.jsonl --model HuggingFaceTB/SmolLM2-135M-Instruct`
    """
    from lte.data.announcement import announce, document_as_read, row_as_seen

    if chat_template is not None and model is None:
        raise ValueError("chat_template must be given with a model, whose tokenizer it is for; add --model")
    config, console = build(DataConfig, {**given, "train": sources}), Console()
    check_sources(config)
    if model is not None:
        check_model("model", model)
    documents = read_documents(sources, config)
    if model is None:
        lines = [announce(documents, document_as_read(documents[0], config))]
    else:
        from lte.data.encoding import Encoder
        from lte.hf.dense import load_tokenizer

        quiet_transformers()
        tokenizer = load_tokenizer(model)
        if chat_template is not None:
            tokenizer.chat_template = read_template(str(chat_template))
        # As many rows as documents, or more where these are longer.
        encoder = Encoder(replace(config, pack=False), tokenizer, progress=console.is_terminal)
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            rows, found = encoder.rows(documents, "train", None)
        lines = [announce(documents, row_as_seen(rows[0], tokenizer))]
        lines.append(f"{found['tokens']} tokens, {found['trained_tokens']} of which train.")
        lines += [f"Warning: {warning.message}" for warning in told]
    for line in lines:
        console.print(line, highlight=False, markup=False, soft_wrap=True)
