"""The rows of a mix of texts: each kind in its share of the tokens, spread evenly over the whole.

Shapes: R rows, T tokens.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from lte.data.config import DataConfig, read_documents
from lte.data.encoding import Encoder, to_dataset
from lte.data.mix import MixPart, read_mix
from lte.data.rows import LmDatasets, load_lm_datasets, shuffled
from lte.data.token_cache import row_lengths

if TYPE_CHECKING:
    import datasets

SUMMED = ("documents", "rows", "tokens", "trained_tokens", "dropped_tokens")


def load_mix(
    config: DataConfig, tokenizer: Any, max_length: int | None = None, *, progress: bool = True, trains: bool = True
) -> LmDatasets:
    """Reads, splits and tokenises all kinds of text of `config.mix`; arguments and errors as of `load_lm_datasets`.

    `trains` is as for `lte.data.mix.read_mix`.

    A kind with fewer tokens than its share is used several times over, as a pass over the data would be. Rows of all
    kinds are spread evenly among each other, so that any stretch of them holds the kinds in their shares.
    """
    parts = read_mix(config, trains=trains)
    loaded = [load_lm_datasets(part.config, tokenizer, max_length, progress=progress) for part in parts]
    rows = [_repeated(part, found) for part, found in zip(parts, loaded, strict=True)]
    calibration = None
    if config.calibration is not None:
        documents = shuffled(read_documents(config.calibration, config), config)
        calibration = Encoder(config, tokenizer, progress).rows(documents, "calibration", None)[0]
    kinds = {part.name: found.validation for part, found in zip(parts, loaded, strict=True)}
    by_name = {part.name: found.info for part, found in zip(parts, loaded, strict=True)}
    train = interleaved(rows)
    info: dict[str, Any] = {"train_source": config.mix, "validation_source": None, "kind": "mix", "kinds": by_name}
    for which in ("train", "validation"):
        counts = [found.info[which] for found in loaded]
        info[which] = {name: sum(count[name] for count in counts) for name in SUMMED}
        for name in ("sha256", "rows_sha256"):
            info[which][name] = hashlib.sha256("".join(count[name] for count in counts).encode()).hexdigest()
    used = {part.name: len(table) for part, table in zip(parts, rows, strict=True)}
    info["train"] |= {"rows": len(train), "tokens": _tokens_of(train), "rows_of_kinds": used}
    lines = tuple(
        f"{part.name}, {100 * part.share:.0f}% of the tokens: {found.announcements[0]}"
        for part, found in zip(parts, loaded, strict=True)
    )
    return LmDatasets(train, interleaved(list(kinds.values())), info, calibration, lines, kinds)


def _repeated(part: MixPart, found: LmDatasets) -> datasets.Dataset:
    """The rows of a kind, as often as its share of the tokens takes; the last time in part."""
    tokens, wanted = _tokens_of(found.train), int(part.config.max_train_tokens or 0)
    # A share ends within a row.
    rows = max(len(found.train), len(found.train) * wanted // tokens) if tokens < 0.95 * wanted else len(found.train)
    return (
        found.train.select([index % len(found.train) for index in range(rows)])
        if rows > len(found.train)
        else (found.train)
    )


def _tokens_of(rows: datasets.Dataset) -> int:
    return int(row_lengths(rows).sum())


def interleaved(tables: Sequence[datasets.Dataset]) -> datasets.Dataset:
    """The rows of all tables, those of each in their order and spread evenly over the whole.

    Where one table keeps documents apart by `position_ids`, rows of the others get positions that go on counting. Rows
    on the disk stay there.

    Raises:
        ValueError: if rows on the disk would need such positions.
    """
    if any(table.cache_files for table in tables):
        return _interleaved_on_disk(tables)
    places = [((index + 0.5) / len(table), number, index) for number, table in enumerate(tables)
              for index in range(len(table))]  # fmt: skip
    names = list(dict.fromkeys(name for table in tables for name in table.column_names))
    columns = [_columns(table, names) for table in tables]
    order = [(number, index) for _, number, index in sorted(places)]
    merged = {name: np.concatenate([columns[number][name][index] for number, index in order]) for name in names}
    lengths = [len(columns[number]["input_ids"][index]) for number, index in order]
    digest = hashlib.sha256()
    for name in sorted(merged):
        digest.update(merged[name])
    return to_dataset(merged, np.cumsum([0, *lengths]), digest.hexdigest())


def _interleaved_on_disk(tables: Sequence[datasets.Dataset]) -> datasets.Dataset:
    import datasets

    names = {tuple(sorted(table.column_names)) for table in tables}
    if len(names) > 1:
        raise ValueError(
            "label_prompts must be true to stream a mix of plain text with completions or chats that are packed, got "
            "label_prompts=False; set it, or leave out stream"
        )
    sizes = [len(table) for table in tables]
    places = np.concatenate([(np.arange(size) + 0.5) / size for size in sizes])
    # Stable, so that ties go to the first table.
    order = np.argsort(places, kind="stable")
    return datasets.concatenate_datasets(list(tables)).select(order)


def _columns(table: datasets.Dataset, names: Sequence[str]) -> dict[str, list[np.ndarray]]:
    """The rows of each column, int32 [T] each."""
    given = table.with_format("numpy")
    found = {name: [np.asarray(row, dtype=np.int32) for row in given[name]] for name in given.column_names}
    if "position_ids" in names and "position_ids" not in found:
        found["position_ids"] = [np.arange(len(row), dtype=np.int32) for row in found["input_ids"]]
    return found
