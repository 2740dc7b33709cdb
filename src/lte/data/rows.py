"""Text data sets and batches. `data_config` reads and splits the documents, `encoding` turns them into rows.

Shapes: B rows, T tokens. The label of an ignored token is -100.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset, IterableDataset

from lte.config import IGNORED
from lte.data.announcement import announce, row_as_seen
from lte.data.config import (
    DataConfig,
    check_sequence_length,
    cut_long_texts,
    document_key,
    read_documents,
    split_documents,
)
from lte.data.encoding import Encoder
from lte.data.shapes import Tokens
from lte.hf.inputs import padding_masks, predicts_next_token

if TYPE_CHECKING:
    import datasets

MULTIPLE = 8
"""Rows are padded to a multiple of so many tokens."""


class TokenRows(Dataset[dict[str, Tensor]]):
    """Rows of token ids made by hand, with their labels; `input_ids` and `labels` are int64 [T] each."""

    def __init__(self, input_ids: Sequence[np.ndarray], labels: Sequence[np.ndarray]):
        self.input_ids, self.labels = input_ids, labels

    def __len__(self) -> int:
        return len(self.input_ids)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {
            "input_ids": torch.from_numpy(np.asarray(self.input_ids[index], dtype=np.int64)),
            "labels": torch.from_numpy(np.asarray(self.labels[index], dtype=np.int64)),
        }


@dataclass(frozen=True)
class LmDatasets:
    """Rows to train on and held-out rows, both in torch format.

    Attributes:
        train: `input_ids`, `labels`, and for packed completions and chats `position_ids`; int64 [T] each.
        validation: the same of other documents.
        info: JSON-ready. Of each part: documents, rows, tokens (padding excluded), trained_tokens (labelled),
            dropped_tokens (lost to truncation or a last partial row, not to a limit), truncated_documents,
            unlabelled_documents (left out: nothing to train), sha256 of the texts and rows_sha256 of the tokens.
        calibration: rows on which the thresholds are set, as `train`; `None` for those of `train`.
        announcements: a line on each part: which columns were used and how, and a row as the model will see it.
        kinds: of a mix the held-out rows of each kind of text by its name, which `validation` holds together.
    """

    train: datasets.Dataset
    validation: datasets.Dataset
    info: dict[str, Any]
    calibration: datasets.Dataset | None = None
    announcements: tuple[str, ...] = ()
    kinds: Mapping[str, datasets.Dataset] = field(default_factory=dict)


class LmCollator:
    """Stacks rows of one length as they are, without a mask, so that attention stays on its fastest path.

    Rows of different lengths are padded on the right, with an `attention_mask`. Rows that carry `position_ids` get
    none, since transformers keeps packed documents apart only without a mask: there the padding is one more document,
    with positions from 0 and labels of -100.

    Args:
        pad_token_id: `None` if all rows have one length.
        multiple: of which rows are padded to one.
        eos_token_id: which ends a document in the rows, for losses that must not look beyond one.
    """

    def __init__(self, pad_token_id: int | None, multiple: int = MULTIPLE, eos_token_id: int | None = None):
        self.pad_token_id, self.multiple, self.eos_token_id = pad_token_id, multiple, eos_token_id

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        names = [n for n in ("input_ids", "labels", "attention_mask", "position_ids") if n in rows[0]]
        columns = {name: [torch.as_tensor(row[name]) for row in rows] for name in names}
        lengths = [len(row) for row in columns["input_ids"]]
        if len(set(lengths)) == 1:
            return {name: torch.stack(values) for name, values in columns.items()}
        if self.pad_token_id is None:
            raise ValueError(
                "pad_token_id must be a token for rows of different lengths, got pad_token_id=None; take the "
                "tokenizer's eos_token_id"
            )
        if "position_ids" not in columns:
            columns.setdefault("attention_mask", [torch.ones_like(row) for row in columns["input_ids"]])
        width = -(-max(lengths) // self.multiple) * self.multiple
        missing = [width - length for length in lengths]
        fill = {"input_ids": self.pad_token_id, "labels": IGNORED, "attention_mask": 0, "position_ids": 0}
        batch = {
            name: torch.stack([F.pad(row, (0, gap), value=fill[name]) for row, gap in zip(rows, missing, strict=True)])
            for name, rows in columns.items()
        }
        for row, length in zip(batch.get("position_ids", ()), lengths, strict=False):
            row[length:] = torch.arange(len(row) - length)
        return batch


class PaddingCollator:
    """Batches of padded rows, with an `attention_mask`; labels are those of whole rows, or of an answer's tokens.

    On the right whatever the tokenizer's own side is: encoders number their positions from the left, and heads on
    decoders find the last token that is no padding. Prompts to continue are padded on the left.

    Args:
        tokenizer: knows the padding of what the model reads.
        side: right or left.
        multiple: of which rows are padded to one.
    """

    def __init__(self, tokenizer: Any, side: str = "right", multiple: int = MULTIPLE):
        self.tokenizer, self.side, self.multiple = tokenizer, side, multiple

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        features = [{name: value for name, value in row.items() if name != "labels"} for row in rows]
        batch = dict(
            self.tokenizer.pad(features, pad_to_multiple_of=self.multiple, padding_side=self.side, return_tensors="pt")
        )
        labels = [row["labels"] for row in rows if "labels" in row]
        if labels and isinstance(labels[0], Sequence):
            width = -(-max(map(len, labels)) // self.multiple) * self.multiple
            labels = [[*row, *[IGNORED] * (width - len(row))] for row in labels]
        return {**batch, "labels": torch.tensor(labels)} if labels else batch


class PromptsCounted:
    """Gives the batches of a collator a `token_mask` of all tokens that are not padding, on whichever side that is:
    those of prompts, too, whose labels are -100.
    """

    def __init__(self, collator: Any):
        self.collator, self.eos_token_id = collator, getattr(collator, "eos_token_id", None)

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        # Some collators change their rows.
        ids = [torch.as_tensor(row["input_ids"]).clone() for row in rows]
        batch = self.collator(rows)
        return {**batch, "token_mask": _tokens_of(ids, batch)}


def _tokens_of(rows: Sequence[Tensor], batch: Mapping[str, Tensor]) -> Tensor:
    """Which tokens of a batch are those of its rows, bool [B, T].

    Raises:
        ValueError: for a batch that does not say so and does not hold the rows as they are.
    """
    ids, attention = batch["input_ids"], batch.get("attention_mask")
    if attention is not None and attention.shape == ids.shape:
        return attention.bool()
    mask = torch.ones_like(ids, dtype=torch.bool)
    if len(ids) != len(rows) and ids.numel() == sum(map(len, rows)):  # one row of all
        return mask
    for number, row in enumerate(rows if len(ids) == len(rows) else ()):
        padding = ids.shape[1] - len(row)
        if padding >= 0 and torch.equal(ids[number, : len(row)].cpu(), row):
            mask[number, len(row) :] = False
        elif padding >= 0 and torch.equal(ids[number, padding:].cpu(), row):
            mask[number, :padding] = False
        else:
            break
    else:
        if len(ids) == len(rows):
            return mask
    raise ValueError(
        "count_prompts must get batches that tell which tokens are padding, got one without an attention_mask [B, T] "
        "and with other tokens than its rows; add the mask in the collator"
    )


def token_mask(batch: Mapping[str, Tensor]) -> Tensor:
    """Which positions count in the routing losses and in every statistic: bool [B, T].

    A token counts if it is not padding and its own label is not -100: the prompt of a completion routes, but neither
    the losses nor the stated sparsity are about it. The label is that of the position itself, not of the token that
    it predicts: the expert choice for a token is paid when that token is fed in. So the first token of a row counts,
    although nothing predicts it.
    """
    mask = batch["labels"] != IGNORED
    if "attention_mask" in batch:
        mask = mask & batch["attention_mask"].bool()
    return mask


def routing_masks(
    model: Any, ffn_names: Iterable[str], batch: Mapping[str, Tensor], *, skip_ignored_labels: bool = True
) -> dict[str, Tensor]:
    """Which tokens count in the routing losses and statistics of each FFN, bool [B, T] by name: none that is padding.

    Where the model predicts the next token, labels of -100 mark what is not counted either (`token_mask`). Labels of
    other heads say nothing of the kind: those of masked language models are -100 at most tokens, all of which route.
    A `token_mask` (bool, [B, T]) of the batch goes before all of this.
    """
    if "token_mask" in batch:
        return dict.fromkeys(ffn_names, batch["token_mask"])
    if skip_ignored_labels and "labels" in batch and predicts_next_token(model):
        return dict.fromkeys(ffn_names, token_mask(batch))
    return padding_masks(model, ffn_names, batch)


def calibration_batches(dataset: Any, num_tokens: int, batch_size: int, collator: Any) -> Iterator[dict[str, Tensor]]:
    """Batches of rows spread evenly over `dataset`, `num_tokens` tokens in all (prompts included) or all there are.

    Spread, because rows in the order of their source begin with a few documents on one subject. With rows of
    different lengths the number of tokens is an estimate from 256 of them. Of a stream, which has no length, the first
    rows are taken.

    Raises:
        ValueError: if the data set is empty, or its rows hold no `input_ids`.
    """
    streams = isinstance(dataset, IterableDataset) or not hasattr(dataset, "__getitem__")
    if streams:
        rows = []
        for row in dataset:
            rows.append(row)
            num_tokens -= _row_length(row)
            if num_tokens <= 0:
                break
    else:
        total = len(dataset)
        probes = min(256, total)
        tokens = max(1, sum(_row_length(dataset[index * total // probes]) for index in range(probes)))
        wanted = min(total, max(1, -(-num_tokens * probes // tokens)))
        rows = [dataset[index * total // wanted] for index in range(wanted)]
    if not rows:
        raise ValueError("dataset must hold at least one row, got 0 rows")
    for start in range(0, len(rows), batch_size):
        yield collator(rows[start : start + batch_size])


def _row_length(row: Mapping[str, Any]) -> int:
    """Tokens of a row: those of `input_ids`, or of the longest sequence in rows of other trainers, preferences say."""
    if "input_ids" in row:
        return len(row["input_ids"])
    lengths = [len(value) for value in row.values() if hasattr(value, "__len__") and not isinstance(value, str)]
    if not lengths:
        raise ValueError(f"rows must hold input_ids, got {', '.join(row)}; tokenise the data set first")
    return max(lengths)


def mean_row_tokens(dataset: Any) -> float:
    """Tokens of a row of a data set, mean over its first 256 rows."""
    lengths = [len(dataset[index]["input_ids"]) for index in range(min(256, len(dataset)))]
    return sum(lengths) / len(lengths)


def load_lm_datasets(
    config: DataConfig, tokenizer: Any, max_length: int | None = None, *, progress: bool = True
) -> LmDatasets:
    """Reads, splits and tokenises the text of a `DataConfig`; the same settings and tokenizer give the same rows.

    Plain text is packed: documents, training ones in a seeded order, each closed by the end-of-text token, are cut
    into rows of `sequence_length` tokens. The last partial row is dropped in training; in the held-out part it is
    padded with labels of -100, so that every token is in one row once.

    Completions and chats are packed whole, next to each other: `position_ids` start from 0 in each, by which
    transformers keeps attention within each (sdpa and eager; flash attention in batches of one row only, so take
    `pack=False` there), and the first label of each is -100. A prompt that is too long loses its beginning, a
    completion its end, a chat its beginning. With `pack=False` every document has rows of its own. With `stream` the
    rows lie on the disk, see `lte.data.streams`.

    Args:
        config: where the text is.
        tokenizer: a transformers tokenizer with an end-of-text token.
        max_length: longest sequence the model takes, its `max_position_embeddings`.
        progress: whether to show progress bars.

    Raises:
        ValueError: for missing files or fields, unknown formats, empty data, or rows longer than the model takes.
    """
    check_sequence_length(config, max_length)
    if tokenizer.eos_token_id is None:
        raise ValueError("tokenizer must have an end-of-text token, got eos_token=None; set tokenizer.eos_token")
    if config.stream:
        return _streamed(config, tokenizer)
    read = {"train": read_documents(config.sources, config)}
    if config.validation is not None:
        read["validation"] = read_documents(config.validation, config, config.validation_split)
    if config.calibration is not None:
        read["calibration"] = read_documents(config.calibration, config)
    documents = read["train"]
    info: dict[str, Any] = {
        "train_source": config.train,
        "validation_source": config.validation,
        "kind": documents.kind,
    }
    if config.validation is None:
        train, held_out = split_documents(documents, config)
        # A single text that was cut in two counts one more after the split than before.
        info["copies_removed"] = max(0, len(documents) - len(train) - len(held_out))
    else:
        train, held_out = documents, read["validation"]
        _warn_of_shared(train, held_out)
    if config.piece_chars is not None:
        train, held_out = cut_long_texts(train, config), shuffled(cut_long_texts(held_out, config), config)
    parts = {"train": shuffled(train, config), "validation": held_out}
    if "calibration" in read:
        parts["calibration"] = shuffled(read["calibration"], config)
    if documents.kind == "completion":
        _warn_of_joins(documents, config)
    limits = {"train": config.max_train_tokens, "validation": config.max_validation_tokens}
    encoder = Encoder(config, tokenizer, progress)
    rows = {part: encoder.rows(texts, part, limits.get(part)) for part, texts in parts.items()}
    for part, texts in {**parts, "train": train}.items():
        info[part] = {"documents": len(texts), **rows[part][1], "sha256": _digest(texts)}
    calibration = rows["calibration"][0] if "calibration" in rows else None
    lines = tuple(announce(found, row_as_seen(rows[part][0][0], tokenizer)) for part, found in read.items())
    return LmDatasets(rows["train"][0], rows["validation"][0], info, calibration, lines)


def _streamed(config: DataConfig, tokenizer: Any) -> LmDatasets:
    from lte.data.streams import streamed_parts

    rows, info = streamed_parts(config, tokenizer)
    lines = tuple(info.pop("announcements"))
    return LmDatasets(rows["train"], rows["validation"], info, rows.get("calibration"), lines)


def shuffled(items: list[Any], config: DataConfig) -> list[Any]:
    """The items in the order that `data_seed` draws."""
    return [items[i] for i in np.random.default_rng(config.data_seed).permutation(len(items))]


def _digest(documents: list[Any]) -> str:
    digest = hashlib.sha256()
    for index, document in enumerate(documents):
        text = document_key(document) if isinstance(document, Tokens) else json.dumps(document)
        digest.update((b"\0" if index else b"") + text.encode())
    return digest.hexdigest()


def _warn_of_joins(documents: list[Any], config: DataConfig) -> None:
    """Prompts and completions follow each other as they are, and so may run into one word."""
    ends = [document[config.prompt_field][-1:] + document[config.completion_field][:1] for document in documents]
    joined = [i for i, pair in enumerate(ends) if len(pair) == 2 and pair.isascii() and pair.isalnum()]
    if joined:
        first = documents[joined[0]]
        shown = first[config.prompt_field][-20:] + first[config.completion_field][:20]
        warnings.warn(
            f"{len(joined)} of {len(documents)} prompts run into their completion without a space, {shown!r} say; "
            f"prompt_template='{{{config.prompt_field}}}\\n' puts a line end between them",
            stacklevel=3,
        )


def _warn_of_shared(train: list[Any], held_out: list[Any]) -> None:
    known = {document_key(document) for document in train}
    shared = sum(document_key(document) in known for document in held_out)
    if shared:
        warnings.warn(f"{shared} of {len(held_out)} held-out documents are also in the training data", stacklevel=3)
