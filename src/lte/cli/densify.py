"""`lte densify`: from a folder of LTE or another method back to the stock dense model, a layer at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from lte.cli.command import Interrupted, quiet_transformers, reports_errors
from lte.cli.convert import DtypeOption, OutputOption, announce, check_streamed
from lte.progress import shown_on


@reports_errors
def densify(
    model: Annotated[str, typer.Argument(help="Folder or hub name of a sparse model.", show_default=False)],
    output: OutputOption,
    dtype: DtypeOption = None,
) -> None:
    """Writes a sparse folder's stock dense model, without routers, for engines that know nothing of lte.

    transformers loads the folder without lte, and llama.cpp's converter makes a GGUF file of it. All neurons run for
    every token, in the order in which they were grouped. It takes the memory of a layer, and goes on after a stop.

    Example: `lte densify out --output out-dense`
    """
    check_streamed("densify", model, output, dtype)

    import torch  # takes seconds

    from lte.runs.conversion import densify_folder

    quiet_transformers()
    console = Console()
    with shown_on(console):
        try:
            found = densify_folder(model, Path(output), dtype=None if dtype is None else getattr(torch, dtype))
        except KeyboardInterrupt:
            raise Interrupted(f"the layers that are written stay in {output}; the same command goes on") from None
    announce(console, found)
