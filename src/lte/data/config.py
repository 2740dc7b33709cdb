"""Where training text comes from: the settings, reading documents, and splitting off the held-out ones."""

from __future__ import annotations

import difflib
import glob
import json
import sys
import sysconfig
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Literal, get_args

from lte.config import check_choice
from lte.data.files import ENDINGS, FORMATS, OPENERS, Row, Table, arrow_rows, open_table
from lte.data.shapes import Columns, Tokens, documents_of, template_parts
from lte.files import sha256s, stay_offline_without_hub
from lte.settings import option

Kind = Literal["auto", "text", "completion", "chat", "tokens"]
Format = Literal["auto", "text", "jsonl", "json", "csv", "tsv", "parquet", "hub", "builtin"]


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Training and held-out text. Every field is a flag of `lte train` and a key of its YAML file.

    `train` may also be a list of sources, which are read one after the other.

    Raises:
        ValueError: for an unknown kind or format, or numbers out of range.
    """

    train: str | list[str] = option(
        "pydoc-topics",
        "File, glob, hub data set, or text that comes with Python: pydoc-topics (its help) or python-library (its "
        "sources); may be given several times.",
    )
    validation: str | None = option(None, "Held-out file, glob, or hub data set; unset: documents split off train.")
    calibration: str | list[str] | None = option(
        None,
        "Text like that in use, on which the thresholds are set at the end; unset: train. A source or several.",
        affects="routing",
    )
    format: Format = option("auto", "auto goes by the file's ending, also before .gz, .bz2, .xz, or .zst.")
    name: str | None = option(None, "Configuration of a hub data set.")
    split: str = option("train", "Split of a hub data set given as train; of a task, in lte eval the measured one.")
    validation_split: str = option("validation", "Split of a hub data set given as validation, or of a task.")
    kind: Kind = option(
        "auto",
        "text: every token trains; completion: the completion; chat: the assistant's turns; tokens: what labels say. "
        "auto goes by the columns: text-field before messages, prompt with completion, and input_ids.",
    )
    text_field: str = option("text", "Field that holds the text.")
    prompt_field: str = option("prompt", "Field that holds the prompt of a completion.")
    completion_field: str = option("completion", "Field that holds the completion.")
    prompt_template: str | None = option(
        None, "Prompt of a completion made of columns, '{instruction}\\n{input}\\n' say; unset: the prompt field."
    )
    messages_field: str = option("messages", "Field that holds the list of chat messages.")
    sequence_length: int = option(512, "Tokens per training row.")
    pack: bool = option(True, "Fill rows with several documents; completions and chats do not see each other.")
    validation_fraction: float = option(0.05, "Share of the documents that is held out when validation is unset.")
    max_train_tokens: int | None = option(None, "Use at most this many training tokens.")
    max_validation_tokens: int | None = option(None, "Use at most this many held-out tokens.", affects="nothing")
    data_seed: int = option(0, "Seed of the split and of the order of documents.")
    mix: str | None = option(
        None,
        "YAML file with several kinds of text in place of train, each with a weight and a part that is held out and "
        "measured by its name (docs/data.md); to train on it needs max_train_tokens.",
    )
    mix_folder: str | None = option(
        None, "Folder of the files that a mix names; unset: the working directory.", affects="nothing"
    )
    piece_chars: int | None = option(
        None,
        "Cut texts that are longer into pieces of about so many characters, which are shuffled like documents, so that "
        "few tokens are of many books; unset: keep them whole.",
    )
    label_prompts: bool = option(
        False,
        "Train on prompts as well, and fill rows with completions and chats as with text: documents see each other.",
    )
    stream: bool = option(
        False,
        "Read text of any size: it is tokenised once, document by document, into files that all processes share; the "
        "hash of a document decides whether it is held out (docs/data.md).",
    )
    token_cache: str | None = option(
        None, "Folder of the tokens of streamed text; unset: lte/tokens in the user's cache folder.", affects="nothing"
    )

    def __post_init__(self) -> None:
        if not self.train or not all(self.sources):
            raise ValueError(f"train must name a file, glob or data set, got train={self.train!r}")
        check_choice("kind", self.kind, get_args(Kind))
        check_choice("format", self.format, get_args(Format))
        if self.prompt_template is not None:
            template_parts(self.prompt_template)
            if self.kind not in ("auto", "completion"):
                raise ValueError(f"prompt_template must be given with kind=completion, got kind={self.kind}")
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
        if self.piece_chars is not None and self.piece_chars < 1:
            raise ValueError(f"piece_chars must be at least 1 or unset, got piece_chars={self.piece_chars}")
        if self.mix is not None and self.train != type(self).train:
            raise ValueError(
                f"train must be left out with a mix, which names the text of each kind, got train={self.train!r}"
            )
        if self.mix is not None and self.validation is not None:
            raise ValueError(
                f"validation must be left out with a mix, whose kinds have their own, got validation={self.validation}"
            )

    @property
    def sources(self) -> list[str]:
        """`train` as a list."""
        return [self.train] if isinstance(self.train, str) else list(self.train)

    @property
    def task(self) -> str:
        """`train` as one text, or the name of the mix, which result records name as their task."""
        if self.mix is not None:
            return Path(self.mix).stem
        return ", ".join(self.sources)


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


def _python_library() -> list[str]:
    """The sources of Python's standard library, without its tests, in the order of their paths."""
    root = Path(sysconfig.get_path("stdlib"))
    left_out = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__", "pydoc_data"}
    files = sorted(path.relative_to(root).as_posix() for path in root.rglob("*.py"))
    kept = [name for name in files if not left_out & set(Path(name).parts)]
    return [text for name in kept if (text := (root / name).read_text(encoding="utf-8", errors="replace")).strip()]


BUILTIN_TEXTS: dict[str, Callable[[], list[str]]] = {
    "pydoc-topics": _pydoc_topics,
    "python-library": _python_library,
}


class Documents(list[Any]):
    """Documents of one kind, and what they were made of.

    Attributes:
        kind: text, completion, chat or tokens.
        source: what they are from.
        columns: which were used, and which not.
    """

    def __init__(self, documents: Iterable[Any], kind: Kind, source: str, columns: Columns):
        super().__init__(documents)
        self.kind, self.source, self.columns = kind, source, columns


def iterate_documents(
    source: str | Sequence[str], config: DataConfig, columns: Columns, split: str | None = None
) -> Iterator[Any]:
    """As `read_documents`, but one document after the other as they are read, of any kind and maybe none.

    Args:
        source: as there.
        config: as there.
        columns: gets what was used, once all were read.
        split: as there.
    """
    sources = [source] if isinstance(source, str) else source
    return (document for one in sources for document in _read(one, config, split or config.split, columns))


def source_states(source: str | Sequence[str], config: DataConfig, split: str | None = None) -> list[Any]:
    """What changes when a source does: of files their SHA-256, of hub data sets what `datasets` knows them by.

    Sizes and times do not say it: a file may be written twice in a second, or get the time of another one.
    """
    found: list[Any] = []
    for one in [source] if isinstance(source, str) else source:
        is_builtin = one in BUILTIN_TEXTS and config.format in ("auto", "builtin")
        paths = [] if config.format == "hub" or is_builtin else _matching_files(one)
        whole = [Path(path).resolve() for path in paths]
        found += [[str(path), sha256] for path, sha256 in zip(whole, sha256s(whole), strict=True)]
        if is_builtin:
            found.append([one, sys.version])
        elif not paths:
            found.append([one, load_from_hub(one, config, split or config.split)._fingerprint])
    return found


def read_documents(source: str | Sequence[str], config: DataConfig, split: str | None = None) -> Documents:
    """All documents of one or more sources that hold anything, in their order.

    Args:
        source: file, glob, hub data set or built-in text, or a list of them.
        config: format and fields.
        split: of hub data sets; `None` takes `config.split`.

    Returns:
        Strings; for completions dicts with the configured fields; `Chat`s with the configured field and what their rows
        hold beside it; or `Tokens`.

    Raises:
        ValueError: if there is no such source or field, it cannot be read, it is empty, or of several kinds.
    """
    sources, columns = [source] if isinstance(source, str) else list(source), Columns()
    documents = list(iterate_documents(sources, config, columns, split))
    if not documents:
        left_out = "".join(f", {count} rows {reason}" for reason, count in columns.left_out.items())
        raise ValueError(f"data must hold at least one document, got none in {', '.join(sources)}{left_out}")
    kinds: list[Kind] = sorted({kind_of(document, config) for document in documents})
    if len(kinds) > 1:
        raise ValueError(
            f"data must be of one kind, got {' and '.join(kinds)} in {', '.join(sources)}; train on them one after the "
            "other, or say kind="
        )
    return Documents(documents, kinds[0], ", ".join(sources), columns)


def kind_of(document: Any, config: DataConfig) -> Kind:
    """The kind of a document: text, completion, chat or tokens."""
    if isinstance(document, dict):
        return "chat" if config.messages_field in document else "completion"
    return "text" if isinstance(document, str) else "tokens"


def _read(source: str, config: DataConfig, split: str, columns: Columns) -> Iterable[Any]:
    if config.format == "builtin":
        check_choice("train", source, BUILTIN_TEXTS)
    if source in BUILTIN_TEXTS and config.format in ("auto", "builtin"):
        if config.kind not in ("auto", "text"):
            raise ValueError(f"kind must be text for the built-in {source}, got kind={config.kind}")
        return BUILTIN_TEXTS[source]()
    paths = [] if config.format == "hub" else _matching_files(source)
    if paths:
        return chain.from_iterable(_tables(paths, config, columns))
    if config.format == "hub" or (config.format == "auto" and _looks_like_hub_name(source)):
        return documents_of(_hub_table(source, config, split), config, columns)
    raise ValueError(_not_found(source))


def _tables(paths: list[str], config: DataConfig, columns: Columns) -> Iterator[Iterator[Any]]:
    filled = [path for path in paths if Path(path).stat().st_size]
    if not filled:
        raise ValueError(f"data must hold at least one document, got the empty file {', '.join(paths)}")
    formats = {path: config.format if config.format != "auto" else _format_of(path) for path in filled}
    # As ever: files of one format after those of another, whose order in the glob is by name.
    for name in dict.fromkeys(formats.values()):
        for path in filled:
            if formats[path] == name:
                yield documents_of(open_table(path, name, config.text_field), config, columns)


def _matching_files(source: str) -> list[str]:
    pattern = str(Path(source).expanduser())
    # A file's own name goes first: it may hold the brackets of a pattern.
    found = [pattern] if Path(pattern).is_file() else sorted(glob.glob(pattern, recursive=True))  # noqa: PTH207
    paths = [path for path in found if Path(path).is_file()]
    if found and not paths:
        raise ValueError(f"data must be a file or a glob of files, got the folder {source}; try {source}/*.jsonl")
    return paths


def load_from_hub(source: str, config: DataConfig, split: str) -> Any:
    """A data set of the hub, whose rows stay on the disk.

    Raises:
        ValueError: if it cannot be loaded.
    """
    import datasets

    try:
        return datasets.load_dataset(source, config.name, split=split)
    except (OSError, ValueError) as error:
        where = f"name={config.name}, split={split}"
        raise ValueError(f"{_not_found(source)}, and could not be loaded from the hub with {where}: {error}") from error


def _hub_table(source: str, config: DataConfig, split: str) -> Table:
    found = load_from_hub(source, config, split)

    def read(wanted: Collection[str]) -> Iterator[tuple[int, Row]]:
        # As Arrow has them: pictures are not decoded.
        table = found.select_columns([name for name in found.column_names if name in wanted]).with_format("arrow")
        return arrow_rows(table.iter(1000))

    return Table(source, "row", found.column_names, read)


def document_key(document: Any) -> str:
    """A string that two documents share only if they are equal."""
    if isinstance(document, Tokens):
        return f"{document.ids.tolist()} {document.labels.tolist()}"
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
    import numpy as np  # slow to load, and not needed by the settings

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


def cut_long_texts(documents: list[Any], config: DataConfig) -> list[Any]:
    """Texts longer than `piece_chars` in pieces of nearly one size, cut at the end of a line or word near by."""
    length = config.piece_chars
    if length is None:
        return documents
    pieces = (_cut(document, length) if isinstance(document, str) else [document] for document in documents)
    return list(chain.from_iterable(pieces))


def _cut(text: str, length: int) -> list[str]:
    count, start, pieces = -(-len(text) // length), 0, []
    for number in range(1, count + 1):
        end = len(text) * number // count
        if number < count:
            gap = max(text.rfind("\n", start + 1, end), text.rfind(" ", start + 1, end))
            # A text without gaps is cut anywhere.
            end = gap + 1 if gap > end - length // 2 else end
        pieces.append(text[start:end])
        start = end
    return [piece for piece in pieces if piece.strip()]


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
    while bare.suffix in OPENERS:
        bare = bare.with_suffix("")
    if bare.suffix not in ENDINGS:
        raise ValueError(
            f"format must be given for files that end in {bare.suffix or 'nothing'}: one of {', '.join(FORMATS)}, "
            f"got {path}; packed files may end in {', '.join(OPENERS)} after that"
        )
    return ENDINGS[bare.suffix]


def _looks_like_hub_name(source: str) -> bool:
    if source.startswith((".", "/", "~")) or Path(source).suffix in (*ENDINGS, *OPENERS):
        return False
    return source.count("/") == 1 or (source.count("/") == 0 and not Path(source).suffix)


def _not_found(source: str) -> str:
    path = Path(source).expanduser()
    inside = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, inside, n=3) + difflib.get_close_matches(source, BUILTIN_TEXTS, n=1)
    hint = f"; near it are {', '.join(near)}" if near else ""
    return f"data must be an existing file, glob or hub data set, got {source}, which matches nothing{hint}"


def check_sources(config: DataConfig, *, trains: bool = True) -> None:
    """Refuses files that do not exist, before anything is loaded; names on the hub are looked for when they are read.

    Args:
        config: where the text is.
        trains: whether anything trains on it; where nothing does, a mix needs no `max_train_tokens`.

    Raises:
        ValueError: says which.
    """
    if config.mix is not None:
        from lte.data.mix import read_mix

        for part in read_mix(config, trains=trains):
            check_sources(part.config)
        return
    calibration = config.calibration or []
    others = [calibration] if isinstance(calibration, str) else calibration
    for source in (*config.sources, *([config.validation] if config.validation else []), *others):
        if config.format == "hub" or (source in BUILTIN_TEXTS and config.format in ("auto", "builtin")):
            continue
        if not _matching_files(source) and not (config.format == "auto" and _looks_like_hub_name(source)):
            raise ValueError(_not_found(source))
        if not _matching_files(source):
            stay_offline_without_hub()
