"""`lte inspect`: what a folder holds, and which experts the tokens of a text switch on."""

from __future__ import annotations

import socket
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any

import typer

from lte.cli.command import check_model, quiet_transformers, read_text_file, reports_errors, takes_settings
from lte.config import DTYPE_NAMES, KERNELS, check_choice, check_whole_number
from lte.files import check_place, write_json_atomic
from lte.report.page import MAX_TOKENS
from lte.settings import build


@dataclass(frozen=True)
class TextConfig:
    """What the inspector shows.

    Attributes:
        text: File with the text to look at, UTF-8.
        html: Write the page to this file.
        serve: Serve the page to this machine alone, with a field for texts, until Ctrl-C.
        port: Port of --serve; 0 takes a free one.
        compare_text: File with a second text to show beside the first.
        compare_model: Folder with a second LTE model to show the text on, beside the first.
        reference: File with the text whose tokens show what an expert is for and what is usual; unset: a bundled one.
        max_tokens: Tokens of a text at most; the rest is left out.
        dtype: Of the weights, float32, bfloat16 or float16.
        kernels: What computes the FFNs, auto, off or int8, as for `lte generate`.
    """

    text: str | None = None
    html: str | None = None
    serve: bool = False
    port: int = 8642
    compare_text: str | None = None
    compare_model: str | None = None
    reference: str | None = None
    max_tokens: int = MAX_TOKENS
    dtype: str = "float32"
    kernels: str = "auto"


@reports_errors
@takes_settings({TextConfig: "Inspector"})
def inspect(
    model: Annotated[str, typer.Argument(help="Folder, hub name, or GGUF file; dense or LTE.")],
    json: Annotated[Path | None, typer.Option(help="Also write what is shown to this file.")] = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Read all files first and say which are not as they were saved.")
    ] = False,
    **given: Any,
) -> None:
    """Says what a model is: experts, routers, target and measured sparsity, FLOPs per token; and whether it loads.

    Weights are not loaded for that. With `--verify` all files are read: a changed bit, a missing tensor or a NaN is an
    error that names the file.

    With `--text` and `--html`, or with `--serve`, an LTE model reads a text, and a page shows which experts each token
    switches on.

    Example: `lte inspect out`, `lte inspect out --text my-text.txt --html inspect.html`, or `lte inspect out --serve`
    """
    config = build(TextConfig, given)
    check_flags(config, given)
    check_files(config)
    if json is not None:
        check_place("json", json)
    check_model("model", model)
    if config.compare_model is not None:
        check_model("compare_model", config.compare_model)

    from lte.cli import inspection

    quiet_transformers()
    if verify:
        inspection.verify_files(model)
    found = inspection.describe(model)
    if found["fault"] is not None and (config.serve or config.html is not None):
        raise ValueError(found["fault"])
    if config.serve:
        inspection.serve_inspector(model, found["method"], config)
    elif config.html is not None:
        inspection.write_inspector(model, found["method"], config)
    else:
        inspection.print_description(found)
    if json is not None:
        write_json_atomic(json, found)
    if found["fault"] is not None:
        message = f"this describes a model that does not load: {found['fault']}"
        # A config alone is no mistake: one may ask what a model would cost.
        if any(Path(model).expanduser().glob("*model*.*")):
            raise ValueError(message)
        typer.echo(message, err=True)


def check_flags(config: TextConfig, given: Mapping[str, Any]) -> None:
    """Refuses flags that would do nothing or cannot go together.

    Raises:
        ValueError: for such flags.
    """
    if not config.serve and config.html is None:
        idle = [field.name for field in fields(TextConfig) if field.name in given and field.name != "serve"]
        if idle:
            flag = idle[0].replace("_", "-")
            raise ValueError(f"--{flag} must be given with --html FILE or --serve, got neither")
        return
    if config.serve and (config.html is not None or config.compare_model is not None):
        other = "--html" if config.html is not None else "--compare-model"
        raise ValueError(f"{other} must not be given with --serve, got both; leave one out")
    if not config.serve and config.text is None:
        raise ValueError("--html must be given with --text FILE, got none; or type texts on the page of --serve")
    if config.compare_text is not None and (config.compare_model is not None or config.text is None):
        rule = (
            "be given without --compare-model, got both" if config.compare_model else "be given with --text, got none"
        )
        raise ValueError(f"--compare-text must {rule}; compare two texts, or two models on one text")
    if "port" in given and not config.serve:
        raise ValueError(f"--port must be given with --serve, got --port {config.port} without it")
    check_choice("dtype", config.dtype, DTYPE_NAMES)
    check_choice("kernels", config.kernels, KERNELS)


def check_files(config: TextConfig) -> None:
    """Refuses texts that cannot be read, places that cannot be written, and a port that is taken.

    Raises:
        ValueError: for those.
    """
    for name in ("text", "compare_text", "reference"):
        path = getattr(config, name)
        if path is not None:
            read_text_file(f"--{name.replace('_', '-')}", path)
    check_whole_number("max_tokens", config.max_tokens, 1)
    if config.html is not None:
        check_place("html", config.html)
    if config.serve:
        try:
            with socket.socket() as probe:
                # As the server's own.
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(("127.0.0.1", config.port))
        except (OSError, OverflowError) as error:
            raise ValueError(
                f"port must be free, got port={config.port}: {error}; choose another with --port"
            ) from error
