"""Text of any size: read document by document, split by hashes, and tokenised into files on the disk."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from lte.data.announcement import announce, row_as_seen
from lte.data.config import (
    DataConfig,
    Documents,
    Kind,
    cut_long_texts,
    document_key,
    iterate_documents,
    kind_of,
    source_states,
)
from lte.data.encoding import Encoder
from lte.data.shapes import Columns
from lte.data.token_cache import RowFile, cache_folder, cached, key_of, open_rows, tokenizer_digest
from lte.progress import tracked

_COUNTS = ("documents", "tokens", "dropped_tokens", "truncated_documents", "unlabelled_documents")


def streamed_parts(config: DataConfig, tokenizer: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """The rows of each part by its name, on the disk, and what `LmDatasets.info` says of them, with `announcements`.

    Rows are in the order of the sources, as Trainer draws them at random from all of them. Where nothing is given as
    held out, a document is if its hash, with `data_seed`, is among the lowest `validation_fraction`: so a document is
    in one part with all its copies, and stays there when others are added.

    Args:
        config: with `stream`.
        tokenizer: of the model.

    Raises:
        ValueError: for sources that cannot be read, or parts without a row.
    """
    values = {name: value for name, value in asdict(config).items() if name not in ("token_cache", "mix", "mix_folder")}
    sources = {"train": source_states(config.sources, config)}
    if config.validation is not None:
        sources["validation"] = source_states(config.validation, config, config.validation_split)
    if config.calibration is not None:
        sources["calibration"] = source_states(config.calibration, config)
    key = key_of({"settings": values, "sources": sources, "tokenizer": tokenizer_digest(tokenizer)})
    folder, info = cached(cache_folder(config.token_cache), key, lambda place: _write(place, config, tokenizer))
    parts = [part for part in ("train", "validation", "calibration") if part in info]
    return {part: open_rows(folder / f"{part}.arrow") for part in parts}, info


def _write(place: Path, config: DataConfig, tokenizer: Any) -> dict[str, Any]:
    writer = _Writer(place, config, tokenizer)
    writer.write("train", writer.documents("train", held_out=False))
    writer.write("validation", writer.documents("validation", held_out=True))
    if config.calibration is not None:
        writer.write("calibration", writer.documents("calibration"))
    return {
        "train_source": config.train,
        "validation_source": config.validation,
        **writer.info,
        "announcements": writer.lines,
    }


class _Writer:
    """Writes the parts of a data set into a folder.

    Args:
        place: the folder.
        config: of the data.
        tokenizer: of the model.

    Attributes:
        info: of what was written, by part, and the kind.
        lines: announcements.
    """

    def __init__(self, place: Path, config: DataConfig, tokenizer: Any):
        self.place, self.config, self.tokenizer = place, config, tokenizer
        self.encoder = Encoder(config, tokenizer, progress=False)
        self.info: dict[str, Any] = {}
        self.lines: list[str] = []
        self.columns = Columns()

    def documents(self, part: str, held_out: bool | None = None) -> Iterator[Any]:
        """The documents of a part as they are read, long texts in pieces.

        Args:
            part: train, validation or calibration.
            held_out: of documents that are split by their hashes, which are wanted.
        """
        config, self.columns = self.config, Columns()
        splits = held_out is not None and config.validation is None
        source = config.train if splits or part == "train" else getattr(config, part)
        split = config.validation_split if part == "validation" and not splits else None
        documents = iterate_documents(source, config, self.columns, split)
        for document in tracked(documents, f"Tokenising {part} text"):
            if splits and self._is_held_out(document) != held_out:
                continue
            yield from cut_long_texts([document], config)

    def _is_held_out(self, document: Any) -> bool:
        digest = hashlib.sha256(f"{self.config.data_seed} {document_key(document)}".encode()).digest()
        return int.from_bytes(digest[:8]) < self.config.validation_fraction * 2**64

    def write(self, part: str, documents: Iterator[Any]) -> None:
        """Writes the rows of a part.

        Raises:
            ValueError: if there is none.
        """
        config = self.config
        limit = getattr(config, f"max_{part}_tokens", None)
        counts, digest, file = dict.fromkeys(_COUNTS, 0), hashlib.sha256(), RowFile(self.place / f"{part}.arrow")
        kinds: set[Kind] = set()
        for columns, offsets in self.encoder.stream(_noted(documents, digest, kinds, config), part, limit, counts):
            file.write({name: np.ascontiguousarray(values) for name, values in columns.items()}, offsets)
        rows_sha256 = file.close()
        if not file.rows:
            out = "; give validation, or raise validation_fraction" if part == "validation" else "; give more"
            raise ValueError(
                f"{part} data must fill at least one row of sequence_length={config.sequence_length} tokens, got "
                f"{counts['documents']} documents with {counts['tokens'] + counts['dropped_tokens']} tokens{out}"
            )
        for what, count in counts.items():
            if count and what.endswith("_documents"):
                warnings.warn(f"{what.replace('_', ' ')} in the {part} data: {count}", stacklevel=3)
        kind = next(iter(kinds))
        self.info.setdefault("kind", kind)  # Of the training text, which comes first.
        self.info[part] = {
            **counts,
            "rows": file.rows,
            "trained_tokens": file.trained_tokens,
            "rows_sha256": rows_sha256,
            "sha256": digest.hexdigest(),
        }
        self._announce(part, kind, counts["documents"])

    def _announce(self, part: str, kind: Kind, count: int) -> None:
        if part == "validation" and self.config.validation is None:
            return
        source = self.config.task if part == "train" else str(getattr(self.config, part))
        row = row_as_seen(open_rows(self.place / f"{part}.arrow")[0], self.tokenizer)
        self.lines.append(announce(Documents([], kind, source, self.columns), row, count))


def _noted(documents: Iterator[Any], digest: Any, kinds: set[Kind], config: DataConfig) -> Iterator[Any]:
    """Documents as they pass, with a checksum of them.

    Raises:
        ValueError: if they are of several kinds.
    """
    for document in documents:
        kinds.add(kind_of(document, config))
        if len(kinds) > 1:
            raise ValueError(
                f"data must be of one kind, got {' and '.join(sorted(kinds))} in {config.task}; train on them one "
                "after the other, or say kind="
            )
        digest.update(json.dumps(document_key(document)).encode())
        yield document
