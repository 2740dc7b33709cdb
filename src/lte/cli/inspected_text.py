"""`lte inspect --text` and `--serve`: the inspector's page as a file, and on a port of this machine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import transformers
import typer

from lte.cli.model_description import describe
from lte.config import check_choice
from lte.eval.kernels import KERNELS, use_kernels_
from lte.eval.models import DTYPES, load_config
from lte.hf.dense import load_tokenizer
from lte.hf.families import family_of
from lte.methods import METHODS
from lte.records import write_text_atomic
from lte.report.inspector import MAX_TOKENS, Inspector, NamedText, inspector_data, inspector_page
from lte.report.inspector_server import InspectorServer
from lte.train.processes import training_device


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
        reference: File with the text whose tokens show what an expert is for; by default the text itself.
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


def check_flags(config: TextConfig, given: Mapping[str, Any]) -> None:
    """Refuses flags that would do nothing or cannot go together.

    Raises:
        ValueError: for such flags.
    """
    if not config.serve and config.html is None:
        idle = [field.name for field in fields(TextConfig) if field.name in given and field.name != "serve"]
        if idle:
            raise ValueError(f"{_flag(idle[0])} must be given with --html FILE or --serve, got neither")
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
    check_choice("dtype", config.dtype, tuple(DTYPES))
    check_choice("kernels", config.kernels, KERNELS)


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def check_method(name_or_path: str, method: str) -> None:
    """Refuses a model without routers.

    Raises:
        ValueError: for a dense model, or one of another method.
    """
    if method not in METHODS:
        raise ValueError(
            f"model must be an LTE model to inspect a text, got {name_or_path}, a dense one: every token uses all its "
            "neurons, so there is nothing to inspect; `lte train` makes it sparse"
        )
    if not METHODS[method].sparse_ffns:
        raise ValueError(
            f"model must be an LTE model to inspect a text, got {name_or_path} of the method {method}, which has no "
            f"routers of LTE and skips {METHODS[method].about}; `lte eval` measures what it costs"
        )


def load_inspected_model(name_or_path: str, dtype: str, kernels: str) -> Any:
    """An LTE model of any kind with the head that its folder holds, on the GPU if there is one."""
    config = load_config(name_or_path)
    heads = family_of(config).models
    saved = {name.removeprefix("Lte") for name in config.architectures or ()}
    auto_class = next((auto for auto, stock in heads.items() if stock in saved), next(iter(heads)))
    path = str(Path(name_or_path).expanduser())
    model = getattr(transformers, auto_class).from_pretrained(path, dtype=DTYPES[dtype])
    return use_kernels_(model.to(training_device()).eval(), kernels)


def read_text(path: str, flag: str) -> NamedText:
    """The text in a UTF-8 file, under the file's name.

    Raises:
        ValueError: for a file that does not exist or is no UTF-8.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise ValueError(f"{flag} must be an existing text file, got {path}")
    try:
        return NamedText(file.name, file.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{flag} must be UTF-8 text, got {path}: {error}") from error


def write_inspector(model: str, method: str, config: TextConfig) -> None:
    """Writes the page of a text to a file and says what it holds."""
    assert config.text is not None
    assert config.html is not None
    text = read_text(config.text, "--text")
    check_method(model, method)
    texts = [text]
    if config.compare_text is not None:
        texts.append(read_text(config.compare_text, "--compare-text"))
    if config.compare_model is not None:
        check_method(config.compare_model, describe(config.compare_model)["method"])
    recorded = _record(model, texts, config)
    if config.compare_model is not None:
        recorded += _record(config.compare_model, texts, config)
    path = Path(config.html).expanduser()
    write_text_atomic(path, inspector_page(inspector_data(recorded)))
    for run in recorded:
        _tell(run)
    typer.echo(f"Wrote {path}; open it in a browser.")


def _record(model: str, texts: list[NamedText], config: TextConfig) -> list[dict[str, Any]]:
    inspector = _inspector(model, config)
    return [inspector.run(text) for text in texts]


def _inspector(model: str, config: TextConfig) -> Inspector:
    reference = None if config.reference is None else read_text(config.reference, "--reference")
    loaded = load_inspected_model(model, config.dtype, config.kernels)
    # The name alone: a page that is passed on need not tell where the folder was.
    folder = Path(model).expanduser()
    name = folder.resolve().name if folder.exists() and config.compare_model is None else model
    return Inspector(loaded, load_tokenizer(model), name, config.max_tokens, reference)


def _tell(run: Mapping[str, Any]) -> None:
    for shown in (run, run["reference"]):
        for note in shown["notes"]:
            typer.echo(f"{shown['text']}: {note}", err=True)
    used = f"{100 * (1 - run['sparsity']):.1f}% of the FFN neurons were used per token"
    typer.echo(f"{run['text']} on {run['model']}: {len(run['ids']):,} tokens, {used}.")


def serve_inspector(model: str, method: str, config: TextConfig) -> None:
    """Serves the page until Ctrl-C."""
    check_method(model, method)
    given = [(config.text, "--text"), (config.compare_text, "--compare-text")]
    texts = [read_text(path, flag) for path, flag in given if path is not None]
    inspector = _inspector(model, config)
    runs = [inspector.run(text) for text in texts]
    for run in runs:
        _tell(run)
    with InspectorServer(inspector, config.port, runs) as server:
        typer.echo(f"Open {server.url} in a browser of this machine; Ctrl-C ends it.")
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            typer.echo("Stopped.")
