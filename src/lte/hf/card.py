"""The model card of a saved folder: what made the model, what was measured, and how to load it.

Everything comes from the model's config, so that a folder, a copy on the hub and a model that was loaded again say the
same.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData, try_to_load_from_cache

from lte.hf.families import saved_head
from lte.hf.sparsity_curve import describe_choice, readable_curve

CARD_FILE = "README.md"
MARKER = "<!-- Written by lte from config.json; without this line lte leaves the card as it is. -->"

_METHODS = {"lte": "[Learn-To-be-Efficient](https://arxiv.org/abs/2402.06126)"}


def write_card(folder: str | Path, config: Any, title: str | None = None) -> None:
    """Writes `README.md` into a folder, if it has none or one that lte wrote; what goes wrong is a warning.

    Args:
        folder: of the model.
        config: of the model.
        title: the model's name; `None` takes the folder's.
    """
    path = Path(folder) / CARD_FILE
    try:
        if path.exists() and MARKER not in path.read_text(encoding="utf-8", errors="replace"):
            return
        model_card(config, title or Path(folder).resolve().name).save(path)
    except Exception as error:
        # The weights beside it are worth more.
        warnings.warn(f"the model card {path} could not be written ({type(error).__name__}: {error})", stacklevel=2)


def model_card(config: Any, title: str) -> ModelCard:
    """The card of a model with this config.

    Args:
        config: of an LTE model or one of another method; its `lte_measurement` holds what was measured, if anything.
        title: the model's name.
    """
    settings: dict[str, Any] = getattr(config, "lte", None) or {}
    measured = getattr(config, "lte_measurement", None) or {}
    base = measured.get("model") or _loaded_from(config)
    on_hub = base.count("/") == 1 and not base.startswith((".", "/", "~")) and not Path(base).exists()
    license_name = _license(base)
    data = ModelCardData(
        base_model=base if on_hub else None,
        license=license_name,
        library_name="transformers",
        tags=["lte", "activation-sparsity"],
    )
    method = str(settings.get("name"))
    lines = [
        f"---\n{data.to_yaml()}\n---\n\n{MARKER}\n\n# {title}",
        f"A {str(config.model_type).removeprefix('lte_')} model whose FFNs compute a part of their neurons for each "
        f"token, made with `lte` by the method {_METHODS.get(method, method)}.",
        "\n".join(_table(base, settings, measured, license_name)),
        "Sparsity is the share of FFN neurons that a token does not compute, the mean over layers. It differs from "
        "text to text.",
        *_curve_section(config),
        "## How to load it",
        "transformers alone refuses this folder, so that it never runs dense by accident. Install `lte` from its "
        "source, then:",
        f"```python\n{_loading_code(config)}\n```",
    ]
    return ModelCard("\n\n".join(lines) + "\n")


def _loaded_from(config: Any) -> str:
    """The dense model that was loaded and converted, as far as the config knows; empty after a reload of our folder."""
    name = getattr(config, "_name_or_path", None) or ""
    file = Path(name).expanduser() / "config.json"
    if (
        name
        and file.is_file()
        and json.loads(file.read_text(encoding="utf-8")).get("model_type", "").startswith("lte_")
    ):
        return ""
    return name


def _table(base: str, settings: dict[str, Any], measured: dict[str, Any], license_name: str | None) -> list[str]:
    rows = {
        # A path of the machine that made it is nobody else's business.
        "base model": base if base.count("/") <= 1 and not base.startswith((".", "/", "~")) else Path(base).name,
        "method": settings.get("name"),
        "target sparsity": _percent(settings.get("target_sparsity")),
        "measured sparsity": _measured(measured),
    }
    if measured.get("tokens"):
        data = measured.get("data", {})
        source = data.get("source")
        names = ", ".join(Path(name).name for name in ([source] if isinstance(source, str) else source or []))
        split = f", {measured['split']} split" if measured.get("split") else ""
        rows["measured on"] = f"{measured['tokens']:,} tokens of {names or 'held-out text'}{split}"
    if measured.get("value") is not None:
        metric = measured.get("metric", "value")
        if measured.get("value_before") is not None:
            rows[f"{metric} before training"] = f"{measured['value_before']:.4g}"
        rows[f"{metric} of this model"] = f"{measured['value']:.4g}"
    rows["licence"] = license_name or "that of the base model, which lte does not know"
    return ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items() if value)]


def _measured(measured: dict[str, Any]) -> str:
    interpolated = " (interpolated on the curve below)" if measured.get("interpolated") else ""
    return f"{_percent(measured.get('sparsity'))}{interpolated}" if "sparsity" in measured else "not measured"


def _curve_section(config: Any) -> list[str]:
    """The curve over the threshold as paragraphs; nothing where none was measured."""
    curve = readable_curve(getattr(config, "lte_curve", None))
    if curve is None:
        return []
    names = ", ".join(curve.tokens)
    headings = ("sparsity", "perplexity", "of the dense model's", "weight MB per token", "ms per token")
    rows = [f"| {' | '.join(headings)} |", "|---|---|---|---|---|"]
    for point in curve.points:
        numbers = (curve.perplexity_ratio(point), point.bytes_per_token / 1e6, point.ms_per_token)
        cells = ["" if value is None else f"{value:.4g}" for value in numbers]
        rows.append(f"| {_percent(point.sparsity)} | {point.perplexity:.4g} | {' | '.join(cells)} |")
    if curve.dense is not None:
        dense = curve.dense
        time = "" if dense.ms_per_token is None else f"{dense.ms_per_token:.4g}"
        rows.append(f"| dense | {dense.perplexity:.4g} | 1 | {dense.bytes_per_token / 1e6:.4g} | {time} |")
    chosen = describe_choice(config)
    hardware = curve.settings.get("hardware")
    return [
        "## Other sparsities",
        f"One threshold decides for all layers and tokens. Over it, on {sum(curve.tokens.values()):,} tokens of {names}"
        f"{f', timed on {hardware}' if hardware and curve.points[0].ms_per_token is not None else ''}:",
        "\n".join(rows),
        *([] if chosen is None else [chosen]),
        "`from_pretrained(folder, target_sparsity=0.6)` picks one of these sparsities, or one between them, without "
        "training.",
    ]


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f}%"


def _license(base: str) -> str | None:
    """The licence that the base model's own card names, if that card is on this machine."""
    try:
        folder = Path(base).expanduser() / CARD_FILE
        cached = folder if folder.is_file() else try_to_load_from_cache(base, CARD_FILE)
        return ModelCard.load(cached).data.license if isinstance(cached, str | Path) else None
    except (ValueError, OSError):
        # No name of the hub, or a card without readable fields: the licence is unknown.
        return None


def _loading_code(config: Any) -> str:
    head, folder = saved_head(config), '.from_pretrained("path/of/this/folder")'
    if head is None:
        own = str(config.architectures[0]).removeprefix("Lte")
        return f"import lte\n\nmodel = lte.sparse_class({own}){folder}  # {own}: the class that it was made from"
    return f"import lte  # registers the model's class\nfrom transformers import {head}\n\nmodel = {head}{folder}"
