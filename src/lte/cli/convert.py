"""`lte convert`: from a dense checkpoint to an LTE folder with untrained routers, a layer at a time."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from lte.cli.command import Interrupted, check_model, quiet_transformers, reports_errors, takes_settings
from lte.cli.data import SHARED
from lte.config import DTYPE_NAMES, LteConfig, check_choice
from lte.data.config import DataConfig, check_sources
from lte.files import check_place
from lte.progress import duration, shown_on
from lte.settings import build

DEVICES = ("auto", "cpu", "cuda")
TOGETHER_TOKENS = 512
"""Tokens whose activations are in memory at once: 22 MB in fp32 for each of some tensors at F = 11008."""
TEXT_TOKENS = 16384
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
@takes_settings({LteConfig: "Sparsity", DataConfig: "Text, as in lte train"}, only=(*SETTINGS, *SHARED))
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
    texts: Annotated[
        list[str] | None,
        typer.Option(
            help="File, glob, or hub data set on which groupings compare when neurons are active (contribution, "
            "coactivation, chunks, and always_on); give it once for each."
        ),
    ] = None,
    calibration_tokens: Annotated[
        int | None, typer.Option(min=1, help=f"Tokens of --texts that are taken; unset: {TEXT_TOKENS}.")
    ] = None,
    **given: Any,
) -> None:
    """Converts a dense checkpoint of any size into an LTE folder with untrained routers, in the memory of a layer.

    The folder is what `lte train` makes of the same model before it trains, bit for bit in groupings by weights, and
    what it starts from: `lte train --model out-7b ...`. A conversion that was stopped goes on when the same command is
    given again.

    Groupings by activations run the model on --texts, one block at a time: a GPU takes seconds for a block of 7B
    parameters, two CPU cores some minutes.

    Example: `lte convert meta-llama/Llama-2-7b-hf --output out-7b`
    """
    config = build(LteConfig, {name: value for name, value in given.items() if name in SETTINGS})
    check_choice("device", device, DEVICES)
    check_streamed("convert", model, output, dtype)
    shared = {name: value for name, value in given.items() if name in SHARED}
    data = _check_texts(config, texts, shared, calibration_tokens)

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
            batches = None if data is None else _batches(model, data, calibration_tokens or TEXT_TOKENS)
            precision = None if dtype is None else getattr(torch, dtype)
            found = convert_folder(model, Path(output), config, calibration=batches, dtype=precision, device=device)
        except KeyboardInterrupt:
            raise Interrupted(f"the layers that are written stay in {output}; the same command goes on") from None
    announce(console, found)
    console.print(f"To train it: lte train --model {shlex.quote(output)} ...", highlight=False, markup=False)


def _check_texts(
    config: LteConfig, texts: list[str] | None, given: dict[str, Any], tokens: int | None
) -> DataConfig | None:
    """Where the text comes from, `None` for a config that goes by weights.

    Raises:
        ValueError: for text that is missing or that nothing would read.
    """
    if not config.needs_text:
        others = {"texts": texts, "calibration_tokens": tokens}
        idle = next(iter([*given, *(name for name, value in others.items() if value)]), None)
        if idle is not None:
            raise ValueError(
                f"--{idle.replace('_', '-')} must be given with a grouping by activations, got it with "
                f"grouping={config.grouping}, which goes by weights; leave it out"
            )
        return None
    if not texts:
        what = f"always_on={config.always_on}" if config.always_on else f"grouping={config.grouping}"
        raise ValueError(f"--texts must be given with {what}, which goes by activations; add --texts FILE")
    data = build(DataConfig, {**given, "train": texts})
    check_sources(data)
    return data


def _batches(model: str, data: DataConfig, tokens: int) -> list[Any]:
    """Rows of the text as `lte train` cuts and spreads them, few at a time."""
    from lte.data.rows import LmCollator, calibration_batches, load_lm_datasets
    from lte.eval.models import load_config
    from lte.hf.dense import load_tokenizer
    from lte.hf.inputs import check_next_token

    settings, tokenizer = load_config(model), load_tokenizer(model)
    check_next_token(settings)
    longest = getattr(settings, "max_position_embeddings", None)
    rows = load_lm_datasets(data, tokenizer, longest, progress=False).train
    few = max(1, TOGETHER_TOKENS // data.sequence_length)
    return list(calibration_batches(rows, tokens, few, LmCollator(tokenizer.pad_token_id)))


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
    adapter = Path(model).expanduser() / "adapter_config.json"
    if adapter.is_file() and not list(adapter.parent.glob("model*.safetensors")):
        raise ValueError(
            f"model must be a whole model to be read layer by layer, got {model}, an adapter of peft; merge it into "
            "its base (merge_and_unload) and save that, or give the base"
        )
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
