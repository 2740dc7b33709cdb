"""`lte inspect`: what a folder holds, and which experts the tokens of a text switch on."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from lte.cli.errors import reports_errors
from lte.cli.inspected_text import TextConfig, check_flags, serve_inspector, write_inspector
from lte.cli.model_description import describe, print_description
from lte.cli.models import quiet_transformers
from lte.cli.settings import takes_settings
from lte.records import write_json_atomic
from lte.settings import build


@reports_errors
@takes_settings({TextConfig: "Inspector"})
def inspect(
    model: Annotated[str, typer.Argument(help="Folder, hub name, or GGUF file; dense or LTE.")],
    json: Annotated[Path | None, typer.Option(help="Also write what is shown to this file.")] = None,
    **given: Any,
) -> None:
    """Says what a model is: experts, routers, target and measured sparsity, FLOPs per token. Loads no weights.

    With `--text` and `--html`, or with `--serve`, an LTE model reads a text, and a page shows which experts each token
    switches on.

    Example: `lte inspect out`, `lte inspect out --text my-text.txt --html inspect.html`, or `lte inspect out --serve`
    """
    quiet_transformers()
    config = build(TextConfig, given)
    check_flags(config, given)
    found = describe(model)
    if config.serve:
        serve_inspector(model, found["method"], config)
    elif config.html is not None:
        write_inspector(model, found["method"], config)
    else:
        print_description(found)
    if json is not None:
        write_json_atomic(json, found)
