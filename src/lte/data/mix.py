"""The YAML file of a mix: several kinds of text, each with a weight and a held-out part of its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lte.config import check_choice
from lte.data.config import BUILTIN_TEXTS, DataConfig
from lte.settings import parse_settings, read_mapping

OWN = (
    *("train", "validation", "format", "name", "split", "validation_split", "kind", "text_field", "prompt_field"),
    *("completion_field", "prompt_template", "messages_field", "validation_fraction", "max_validation_tokens"),
    "piece_chars",
)
"""Settings of `DataConfig` that each kind may have for itself; all others are the same for all."""


RESERVED = ("per_word", "before")
"""Names that no kind has: `perplexity_per_word` and `perplexity_before` are numbers of the whole text."""


@dataclass(frozen=True)
class MixPart:
    """One kind of text.

    Attributes:
        name: by which its held-out part is reported.
        share: of the training tokens.
        config: of its text alone; its `max_train_tokens` are its share of them.
    """

    name: str
    share: float
    config: DataConfig

    def described(self) -> dict[str, Any]:
        """What decides which rows it gives, JSON-ready."""
        values = vars(self.config)
        return {"name": self.name, "share": self.share, **{name: values[name] for name in OWN}}


def read_mix(config: DataConfig, *, trains: bool = True) -> tuple[MixPart, ...]:
    """The kinds of text of `config.mix`, in the order of the file.

    Args:
        config: with a mix.
        trains: whether anything trains on it. Where nothing does, `max_train_tokens` may be left out, and each kind
            has one row to train on.

    Raises:
        ValueError: for a missing file, unknown keys, a name that is no part of a metric's name or would be that of
            another metric, weights that are not positive, or a mix to train on without `max_train_tokens`.
    """
    path = Path(str(config.mix)).expanduser()
    content = read_mapping(path, "mix")
    if not content or not all(isinstance(values, dict) for values in content.values()):
        raise ValueError(f"mix must hold a mapping for each kind of text, `books: {{train: FILE, weight: 1}}`: {path}")
    if trains and config.max_train_tokens is None:
        raise ValueError("max_train_tokens must be given with a mix, of which each kind gets its share, got None")
    weights = {name: _weight(name, values, path) for name, values in content.items()}
    return tuple(
        _part(str(name), weights[name] / sum(weights.values()), values, config, path)
        for name, values in content.items()
    )


def _weight(name: Any, values: Mapping[Any, Any], path: Path) -> float:
    if not (isinstance(name, str) and name.replace("-", "_").isidentifier()):
        raise ValueError(f"names of a mix must be words like wikipedia or python-code, got {name!r} in {path}")
    if name in RESERVED:
        raise ValueError(f"names of a mix must not be those of other metrics, got {name} in {path}; take another name")
    weight = values.get("weight", 1)
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < float("inf"):
        raise ValueError(f"weight must be a positive number, got weight={weight!r} for {name} in {path}")
    return float(weight)


def _part(name: str, share: float, values: Mapping[Any, Any], config: DataConfig, path: Path) -> MixPart:
    own = {str(key).replace("-", "_"): value for key, value in values.items() if key != "weight"}
    for key in own:
        check_choice(f"key of {name} in {path}", key, OWN)
    if "train" not in own:
        raise ValueError(f"train must be given for each kind of text of a mix, got none for {name} in {path}")
    parsed = parse_settings(own, {DataConfig: ""}, f"{name} of {path}")
    for key in ("train", "validation"):
        if parsed.get(key) is not None:
            sources = [parsed[key]] if isinstance(parsed[key], str) else parsed[key]
            found = [_below(config.mix_folder, source) for source in sources]
            parsed[key] = found[0] if isinstance(parsed[key], str) else found
    tokens = max(config.sequence_length, round(share * int(config.max_train_tokens or 0)))
    alone = replace(config, mix=None, mix_folder=None, calibration=None, max_train_tokens=tokens)
    return MixPart(name, share, replace(alone, **parsed))


def _below(folder: str | None, source: str) -> str:
    if folder is None or source in BUILTIN_TEXTS:
        return source
    return str(Path(folder).expanduser() / source)
