"""The option `--kernels`."""

from __future__ import annotations

from typing import Annotated

import typer

KernelsOption = Annotated[
    str,
    typer.Option(
        help="What computes an LTE model's FFNs: auto is the kernels where they can, off is plain PyTorch, int8 is the "
        "kernels on weights rounded to 8 bits.",
        metavar="auto|off|int8",
    ),
]
