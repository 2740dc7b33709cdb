"""Where training text comes from."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from lte.config import check_choice

Kind = Literal["text", "completion", "chat"]
Format = Literal["auto", "text", "jsonl", "csv", "parquet", "hub", "builtin"]


def _option(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Training and held-out text. Every field is a flag of `lte train` and a key of its YAML file."""

    train: str = _option("pydoc-topics", "File, glob, hub data set, or pydoc-topics (the text that Python brings).")
    validation: str | None = _option(None, "Held-out file, glob, or hub data set; unset: documents split off train.")
    format: Format = _option("auto", "auto goes by the file's ending; else text, jsonl, csv, parquet, hub, builtin.")
    name: str | None = _option(None, "Configuration of a hub data set.")
    split: str = _option("train", "Split of a hub data set.")
    kind: Kind = _option("text", "text: every token trains; completion: the completion; chat: the assistant's turns.")
    text_field: str = _option("text", "Field that holds the text.")
    prompt_field: str = _option("prompt", "Field that holds the prompt of a completion.")
    completion_field: str = _option("completion", "Field that holds the completion.")
    messages_field: str = _option("messages", "Field that holds the list of chat messages.")
    sequence_length: int = _option(512, "Tokens per training row.")
    validation_fraction: float = _option(0.05, "Share of the documents that is held out when validation is unset.")
    max_train_tokens: int | None = _option(None, "Use at most this many training tokens.")
    max_validation_tokens: int | None = _option(None, "Use at most this many held-out tokens.")
    data_seed: int = _option(0, "Seed of the split and of the order of documents.")

    def __post_init__(self) -> None:
        check_choice("kind", self.kind, get_args(Kind))
        check_choice("format", self.format, get_args(Format))
        if self.sequence_length < 2:
            raise ValueError(f"sequence_length must be at least 2, got sequence_length={self.sequence_length}")
        if not 0 < self.validation_fraction < 1:
            raise ValueError(
                f"validation_fraction must lie in (0, 1), got validation_fraction={self.validation_fraction}"
            )
        for name in ("max_train_tokens", "max_validation_tokens"):
            value = getattr(self, name)
            if value is not None and value < self.sequence_length:
                raise ValueError(f"{name} must be at least sequence_length={self.sequence_length}, got {name}={value}")
