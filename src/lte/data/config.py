"""Where training text comes from: the settings, reading documents, and splitting off the held-out ones."""

from __future__ import annotations

import difflib
import glob
import json
import lzma
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from lte.config import check_choice
from lte.settings import option

Kind = Literal["text", "completion", "chat"]
Format = Literal["auto", "text", "jsonl", "json", "csv", "parquet", "hub", "builtin"]

COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
# What reading a damaged file raises, or one that nothing here can unpack (ImportError).
UNREADABLE = (ValueError, StopIteration, OSError, EOFError, lzma.LZMAError, zlib.error, ImportError)
# What `datasets` calls the reader of each format; its json reader takes lines and lists alike.
LOADERS = {"text": "text", "jsonl": "json", "json": "json", "csv": "csv", "parquet": "parquet"}
ENDINGS = {".txt": "text", ".md": "text", **{f".{name}": name for name in LOADERS}}
TEXT_FIELDS = ("text", "content", "document", "body", "article", "story", "completion")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Training and held-out text. Every field is a flag of `lte train` and a key of its YAML file.

    `train` may also be a list of sources, which are read one after the other.

    Raises:
        ValueError: for an unknown kind or format, or numbers out of range.
    """

    train: str | list[str] = option(
        "pydoc-topics", "File, glob, hub data set, or pydoc-topics (Python's help text); may be given several times."
    )
    validation: str | None = option(None, "Held-out file, glob, or hub data set; unset: documents split off train.")
    calibration: str | list[str] | None = option(
        None,
        "Text like that in use, on which the thresholds are set at the end; unset: train. A source or several.",
        affects="routing",
    )
    format: Format = option(
        "auto", "auto goes by the file's ending, also before .gz, .bz2, .xz, or .zst (pip install zstandard)."
    )
    name: str | None = option(None, "Configuration of a hub data set.")
    split: str = option("train", "Split of a hub data set given as train; of a task, in lte eval the measured one.")
    validation_split: str = option("validation", "Split of a hub data set given as validation, or of a task.")
    kind: Kind = option("text", "text: every token trains; completion: the completion; chat: the assistant's turns.")
    text_field: str = option("text", "Field that holds the text.")
    prompt_field: str = option("prompt", "Field that holds the prompt of a completion.")
    completion_field: str = option("completion", "Field that holds the completion.")
    messages_field: str = option("messages", "Field that holds the list of chat messages.")
    sequence_length: int = option(512, "Tokens per training row.")
    pack: bool = option(True, "Fill rows with several documents; completions and chats do not see each other.")
    validation_fraction: float = option(0.05, "Share of the documents that is held out when validation is unset.")
    max_train_tokens: int | None = option(None, "Use at most this many training tokens.")
    max_validation_tokens: int | None = option(None, "Use at most this many held-out tokens.", affects="nothing")
    data_seed: int = option(0, "Seed of the split and of the order of documents.")

    def __post_init__(self) -> None:
        if not self.train or not all(self.sources):
            raise ValueError(f"train must name a file, glob or data set, got train={self.train!r}")
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

    @property
    def sources(self) -> list[str]:
        """`train` as a list."""
        return [self.train] if isinstance(self.train, str) else list(self.train)

    @property
    def task(self) -> str:
        """`train` as one text, which result records name as their task."""
        return ", ".join(self.sources)

    @property
    def used_fields(self) -> list[str]:
        """The fields that documents of this `kind` need."""
        if self.kind == "completion":
            return [self.prompt_field, self.completion_field]
        return [self.text_field if self.kind == "text" else self.messages_field]


def check_sequence_length(config: DataConfig, max_position_embeddings: int | None) -> None:
    """Raises a `ValueError` if the rows are longer than the model takes; `None` is a model without such a limit."""
    if max_position_embeddings is not None and config.sequence_length > max_position_embeddings:
        raise ValueError(
            f"sequence_length must be at most {max_position_embeddings} for this model, got "
            f"sequence_length={config.sequence_length}; lower it"
        )


def _pydoc_topics() -> list[str]:
    from pydoc_data import topics

    return [text for _, text in sorted(topics.topics.items())]


BUILTIN_TEXTS: dict[str, Callable[[], list[str]]] = {"pydoc-topics": _pydoc_topics}


def read_documents(source: str | Sequence[str], config: DataConfig, split: str | None = None) -> list[Any]:
    """All documents of one or more sources that hold anything, in their order.

    Args:
        source: file, glob, hub data set or built-in text, or a list of them.
        config: format and fields.
        split: of hub data sets; `None` takes `config.split`.

    Returns:
        Strings, or for completions and chats dicts with the configured fields.

    Raises:
        ValueError: if there is no such source or field, it cannot be read, or it is empty.
    """
    sources = [source] if isinstance(source, str) else source
    documents = [document for one in sources for document in _read(one, config, split or config.split)]
    if not documents:
        raise ValueError(f"data must hold at least one document, got none in {', '.join(sources)}")
    return documents


def _read(source: str, config: DataConfig, split: str) -> list[Any]:
    if config.format == "builtin":
        check_choice("train", source, BUILTIN_TEXTS)
    if source in BUILTIN_TEXTS and config.format in ("auto", "builtin"):
        if config.kind != "text":
            raise ValueError(f"kind must be text for the built-in {source}, got kind={config.kind}")
        return BUILTIN_TEXTS[source]()
    paths = [] if config.format == "hub" else _matching_files(source)
    if paths:
        by_format: dict[str, list[str]] = {}
        for path in paths:
            by_format.setdefault(config.format if config.format != "auto" else _format_of(path), []).append(path)
        return [row for name, files in by_format.items() for row in _pick_fields(_load_files(name, files), config)]
    if config.format == "hub" or (config.format == "auto" and _looks_like_hub_name(source)):
        return _pick_fields(_load_from_hub(source, config, split), config)
    raise ValueError(_not_found(source))


def _matching_files(source: str) -> list[str]:
    pattern = str(Path(source).expanduser())
    # A file's own name goes first: it may hold the brackets of a pattern.
    found = [pattern] if Path(pattern).is_file() else sorted(glob.glob(pattern, recursive=True))  # noqa: PTH207
    paths = [path for path in found if Path(path).is_file()]
    if found and not paths:
        raise ValueError(f"data must be a file or a glob of files, got the folder {source}; try {source}/*.jsonl")
    return paths


def _load_files(name: str, paths: list[str]) -> Any:
    import datasets

    filled = [path for path in paths if Path(path).stat().st_size]
    if not filled:
        raise ValueError(f"data must hold at least one document, got the empty file {', '.join(paths)}")
    # One document per text file; pandas would take a text such as "None" for a missing value.
    options: dict[str, dict[str, Any]] = {"text": {"sample_by": "document"}, "csv": {"keep_default_na": False}}
    # `datasets` takes names for patterns, and reads another file for one with brackets.
    names = [glob.escape(path) for path in filled]
    try:
        return datasets.load_dataset(LOADERS[name], data_files=names, split="train", **options.get(name, {}))
    except (datasets.exceptions.DatasetGenerationError, *UNREADABLE) as error:
        reason = error.__cause__ or error
        packed = any(path.endswith(".zst") for path in filled)
        hint = "mend the file, or say format= if it is another one"
        if packed and (isinstance(reason, ImportError) or "zstd not supported" in str(reason)):
            hint = "pip install zstandard to unpack .zst, or pack it as .gz, .bz2 or .xz, which need nothing"
        raise ValueError(f"data must be readable as {name}, got {', '.join(filled)}: {reason}; {hint}") from error


def _load_from_hub(source: str, config: DataConfig, split: str) -> Any:
    import datasets

    try:
        return datasets.load_dataset(source, config.name, split=split)
    except (OSError, ValueError) as error:
        where = f"name={config.name}, split={split}"
        raise ValueError(f"{_not_found(source)}, and could not be loaded from the hub with {where}: {error}") from error


def _pick_fields(table: Any, config: DataConfig) -> list[Any]:
    """The filled documents of a `datasets.Dataset`."""
    names = config.used_fields
    for name in names:
        if name not in table.column_names:
            raise ValueError(
                f"the data must have a field {name!r} for kind={config.kind}, got the fields "
                f"{', '.join(table.column_names)}; name yours with the matching *_field option{_likely(table, config)}"
            )
        feature = table.features[name]
        if config.kind != "chat" and getattr(feature, "dtype", "list") not in ("string", "large_string", "null"):
            raise ValueError(f"the field {name!r} must hold text for kind={config.kind}, got {feature}")
    if config.kind == "text":
        return [text for text in table[names[0]][:] if text and text.strip()]
    # A row without a completion, or without messages, has nothing to train.
    return [row for row in table.select_columns(names).to_list() if row[names[-1]]]


def _likely(table: Any, config: DataConfig) -> str:
    """Which field probably holds the text: one of a usual name, or the one with the longest strings."""
    strings = [name for name in table.column_names if getattr(table.features[name], "dtype", "") == "string"]
    if config.kind != "text" or not strings:
        return ""
    usual = [name for name in TEXT_FIELDS if name in strings]
    head = table.select(range(min(50, len(table))))
    best = usual[0] if usual else max(strings, key=lambda name: sum(len(text or "") for text in head[name]))
    return f", probably text_field={best}"


def document_key(document: Any) -> str:
    """A string that two documents share only if they are equal."""
    return document if isinstance(document, str) else json.dumps(document)


def split_documents(documents: list[Any], config: DataConfig) -> tuple[list[Any], list[Any]]:
    """Splits whole documents by a seeded draw, so that no held-out one is trained on; one text is cut near its end.

    Copies of held-out documents are left out of the training part as well.

    Returns:
        Training and held-out documents, both in their order.

    Raises:
        ValueError: if either part would be empty.
    """
    if len(documents) == 1 and isinstance(documents[0], str):
        return _split_text(documents[0], config)
    count = max(1, round(len(documents) * config.validation_fraction))
    drawn = set(np.random.default_rng(config.data_seed).permutation(len(documents))[:count].tolist())
    held_out = [documents[i] for i in sorted(drawn)]
    copies = {document_key(document) for document in held_out}
    train = [d for i, d in enumerate(documents) if i not in drawn and document_key(d) not in copies]
    if not train:
        raise ValueError(
            f"data must hold at least two different documents to split off held-out text, got {len(documents)} and "
            f"validation_fraction={config.validation_fraction}; give validation, or lower validation_fraction"
        )
    return train, held_out


def _split_text(text: str, config: DataConfig) -> tuple[list[str], list[str]]:
    cut = int(len(text) * (1 - config.validation_fraction))
    # Between words, if there is a gap in reach.
    gap = max(text.rfind("\n", max(0, cut - 1000), cut), text.rfind(" ", max(0, cut - 1000), cut))
    cut = gap if gap > 0 else cut
    if not text[:cut].strip() or not text[cut:].strip():
        raise ValueError(
            f"validation_fraction must leave text on both sides of the split, got "
            f"validation_fraction={config.validation_fraction} for one document of {len(text)} characters; give "
            "validation, or more text"
        )
    return [text[:cut]], [text[cut:]]


def _format_of(path: str) -> str:
    bare = Path(path)
    while bare.suffix in COMPRESSED:
        bare = bare.with_suffix("")
    if bare.suffix not in ENDINGS:
        raise ValueError(
            f"format must be given for files that end in {bare.suffix or 'nothing'}: one of {', '.join(LOADERS)}, "
            f"got {path}; packed files may end in {', '.join(COMPRESSED)} after that"
        )
    return ENDINGS[bare.suffix]


def _looks_like_hub_name(source: str) -> bool:
    if source.startswith((".", "/", "~")) or Path(source).suffix in (*ENDINGS, *COMPRESSED):
        return False
    return source.count("/") == 1 or (source.count("/") == 0 and not Path(source).suffix)


def _not_found(source: str) -> str:
    path = Path(source).expanduser()
    inside = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, inside, n=3) + difflib.get_close_matches(source, BUILTIN_TEXTS, n=1)
    hint = f"; near it are {', '.join(near)}" if near else ""
    return f"data must be an existing file, glob or hub data set, got {source}, which matches nothing{hint}"
