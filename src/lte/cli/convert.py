"""`lte convert`: from a dense checkpoint to an LTE folder with untrained routers, a layer at a time."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from lte.cli.command import Interrupted, check_model, quiet_transformers, reports_errors, takes_settings
from lte.config import DTYPE_NAMES, LteConfig, check_choice
from lte.files import check_place
from lte.progress import duration, shown_on
from lte.settings import build

DEVICES = ("auto", "cpu", "cuda")
# Those that go by activations are refused: nothing here runs the model.
SETTINGS = (
    "target_sparsity",
    "expert_size",
    "grouping",
    "router_rank",
    "threshold",
    "always_on",
    "router_context",
    "dropped_bias",
    "seed",
)

OutputOption = Annotated[str, typer.Option(help="Folder to write, a new one or one that the same command began.")]
DtypeOption = Annotated[
    str | None,
    typer.Option(
        help="Of the weights; unset: as in the checkpoint, and float32 for a GGUF file in blocks.",
        metavar="|".join(DTYPE_NAMES),
    ),
]


@reports_errors
@takes_settings({LteConfig: "Sparsity"}, only=SETTINGS)
def convert(
    model: Annotated[
        str,
        typer.Argument(help="Folder, hub name, or GGUF file, of one in parts the first; dense.", show_default=False),
    ],
    output: OutputOption,
    dtype: DtypeOption = None,
    device: Annotated[
        str, typer.Option(help="What groups the neurons; auto is a GPU if there is one.", metavar="|".join(DEVICES))
    ] = "auto",
    **given: Any,
) -> None:
    """Converts a dense checkpoint of any size into an LTE folder with untrained routers, in the memory of a layer.

    The folder is what `lte train` makes of the same model before it trains, bit for bit, and what it starts from:
    `lte train --model out-7b ...`. A conversion that was stopped goes on when the same command is given again.

    Groupings that look at activations need the model in memory and are left to `lte train`.

    Example: `lte convert meta-llama/Llama-2-7b-hf --output out-7b`
    """
    config = build(LteConfig, given)
    check_choice("device", device, DEVICES)
    check_streamed("convert", model, output, dtype)

    import torch  # takes seconds

    from lte.runs.conversion import convert_folder

    quiet_transformers()
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    elif device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device must be auto or cpu where PyTorch finds no GPU, got device=cuda")
    console = Console()
    with shown_on(console):
        try:
            found = convert_folder(
                model, Path(output), config, dtype=None if dtype is None else getattr(torch, dtype), device=device
            )
        except KeyboardInterrupt:
            raise Interrupted(f"the layers that are written stay in {output}; the same command goes on") from None
    announce(console, found)
    console.print(f"To train it: lte train --model {shlex.quote(output)} ...", highlight=False, markup=False)


def check_streamed(command: str, model: str, output: str, dtype: str | None) -> None:
    """Refuses what cannot be read or written, before anything is loaded.

    Args:
        command: its name.
        model: hub name, folder or GGUF file.
        output: folder.
        dtype: of the weights, or `None`.

    Raises:
        ValueError: says what.
    """
    if dtype is not None:
        check_choice("dtype", dtype, DTYPE_NAMES)
    settings = check_model("model", model)
    check_place("output", output, folder=True)
    if Path(model).expanduser().is_dir() and Path(model).expanduser().resolve() == Path(output).expanduser().resolve():
        raise ValueError(f"output must be another folder than model, got output={output} for both")
    # The slot of an LTE model, and that of all other methods.
    is_sparse = not settings.keys().isdisjoint({"lte", "lte_method"})
    if settings and command == "convert" and is_sparse:
        raise ValueError(f"model must be dense, got {model}, which a method changed; lte densify makes it dense again")
    if settings and command == "densify" and not is_sparse:
        raise ValueError(f"model must be an LTE folder or one of another method, got {model}, a dense one")


def announce(console: Console, found: Any) -> None:
    """Prints what a conversion did.

    Args:
        console: to print on.
        found: a `lte.runs.conversion.Conversion`.
    """
    from lte.runs.memory import peak_memory_bytes

    kept = f", {found.kept} were there" if found.kept else ""
    lines = [
        f"{found.output}: wrote {found.layers} files of weights{kept}, in {duration(found.seconds)}; peak memory "
        f"{peak_memory_bytes() / 1e9:.1f} GB."
    ]
    if not found.has_tokenizer:
        lines.append("The model brought no tokenizer; save one into the folder before you train.")
    for line in lines:
        console.print(line, highlight=False, markup=False, soft_wrap=True)
