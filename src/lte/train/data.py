"""Text to rows of tokens: reading, splitting, tokenising, packing, batching.

Shapes: B rows, T tokens. The label of an ignored token is -100.
"""

from __future__ import annotations

import difflib
import glob
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from lte.train.data_config import DataConfig

IGNORED = -100
_FORMATS = {
    "txt": "text",
    "md": "text",
    "jsonl": "jsonl",
    "json": "jsonl",
    "csv": "csv",
    "parquet": "parquet",
}
_LOADERS = {"text": "text", "jsonl": "json", "csv": "csv", "parquet": "parquet"}


def _pydoc_topics() -> list[str]:
    from pydoc_data import topics

    return [text for _, text in sorted(topics.topics.items())]


BUILTIN_TEXTS = {"pydoc-topics": _pydoc_topics}


class TokenRows(Dataset[dict[str, Tensor]]):
    """Rows of token ids with their labels; `input_ids` and `labels` are int64 [T] each."""

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
    """Training rows, held-out rows, and a JSON-ready `info`: counts of documents and tokens, sha256 of the texts."""

    train: TokenRows
    validation: TokenRows
    info: dict[str, Any]


class LmCollator:
    """Stacks rows of one length as they are; pads rows of different lengths on the right, with a mask."""

    def __init__(self, pad_token_id: int):
        self.pad_token_id = pad_token_id

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        ids = [torch.as_tensor(row["input_ids"]) for row in rows]
        labels = [torch.as_tensor(row["labels"]) for row in rows]
        if len({len(row) for row in ids}) == 1:
            # No mask, so that attention stays on its fastest path.
            return {"input_ids": torch.stack(ids), "labels": torch.stack(labels)}
        mask = [torch.ones_like(row) for row in ids]
        return {
            "input_ids": torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=self.pad_token_id),
            "labels": torch.nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=IGNORED),
            "attention_mask": torch.nn.utils.rnn.pad_sequence(mask, batch_first=True),
        }


def token_mask(batch: Mapping[str, Tensor]) -> Tensor:
    """Which positions count in the routing losses and in every statistic: bool [B, T].

    A token counts if it is not padding and its own label is not ignored: the prompt of a completion routes, but
    neither the losses nor the stated sparsity are about it.
    """
    mask = batch["labels"] != IGNORED
    if "attention_mask" in batch:
        mask = mask & batch["attention_mask"].bool()
    return mask


def calibration_batches(
    dataset: Dataset[Any], num_tokens: int, batch_size: int, collator: Any
) -> Iterator[dict[str, Tensor]]:
    """Batches of rows spread evenly over `dataset` until `num_tokens` tokens or the data set are used up."""
    total = len(dataset)  # type: ignore[arg-type]
    length = max(1, len(dataset[0]["input_ids"]))
    wanted = min(total, max(1, -(-num_tokens // length)))
    picks = [index * total // wanted for index in range(wanted)]
    for start in range(0, wanted, batch_size):
        yield collator([dataset[index] for index in picks[start : start + batch_size]])


def load_lm_datasets(config: DataConfig, tokenizer: Any, max_length: int | None = None) -> LmDatasets:
    """Reads, splits and tokenises the text of a `DataConfig`.

    Plain text is packed: documents in a seeded order, each closed by the end-of-text token, cut into rows of
    `sequence_length` tokens. The last partial row is dropped in training and kept in the held-out part. Completions
    and chats keep one row each, cut on the left if they are too long.

    Args:
        config: where the text is.
        tokenizer: a transformers tokenizer with an end-of-text token.
        max_length: longest sequence the model takes.

    Raises:
        ValueError: for missing files or fields, unknown formats, empty data, or rows longer than the model takes.
    """
    if max_length is not None and config.sequence_length > max_length:
        raise ValueError(
            f"sequence_length must be at most {max_length} for this model, got sequence_length={config.sequence_length}"
        )
    if tokenizer.eos_token_id is None:
        raise ValueError("tokenizer must have an end-of-text token, got eos_token=None")
    train = read_documents(config.train, config)
    if config.validation is None:
        train, held_out = _split_documents(train, config)
    else:
        held_out = read_documents(config.validation, config)
    order = np.random.default_rng(config.data_seed).permutation(len(train))
    rows = {
        "train": _rows([train[i] for i in order], config, tokenizer, config.max_train_tokens, drop_last=True),
        "validation": _rows(held_out, config, tokenizer, config.max_validation_tokens, drop_last=False),
    }
    info: dict[str, Any] = {"train_source": config.train, "kind": config.kind}
    for name, documents in (("train", train), ("validation", held_out)):
        if len(rows[name]) == 0:
            raise ValueError(
                f"{name} data must fill at least one row of sequence_length={config.sequence_length} tokens, got "
                f"{len(documents)} documents with fewer; give more text or a smaller sequence_length"
            )
        digest = hashlib.sha256("\0".join(json.dumps(document) for document in documents).encode()).hexdigest()
        tokens = int(sum(len(row) for row in rows[name].input_ids))
        info[name] = {"documents": len(documents), "tokens": tokens, "sha256": digest}
    return LmDatasets(rows["train"], rows["validation"], info)


def read_documents(source: str, config: DataConfig) -> list[Any]:
    """All documents of a source: strings, or for completions and chats dicts with the configured fields."""
    if source in BUILTIN_TEXTS and config.format in ("auto", "builtin"):
        return list(BUILTIN_TEXTS[source]())
    import datasets

    paths = sorted(glob.glob(str(Path(source).expanduser()), recursive=True))  # noqa: PTH207, takes absolute patterns
    if config.format == "hub" or (config.format == "auto" and not paths and _looks_like_hub_name(source)):
        table = datasets.load_dataset(source, config.name, split=config.split)
    else:
        if not paths:
            raise ValueError(_not_found(source))
        loader = _LOADERS[_format_of(paths[0]) if config.format == "auto" else config.format]
        options = {"sample_by": "document"} if loader == "text" else {}
        table = datasets.load_dataset(loader, data_files=paths, split="train", **options)
    documents = _pick_fields(table, config)
    if not documents:
        raise ValueError(f"data must hold at least one document, got none in {source}")
    return documents


def _pick_fields(table: Any, config: DataConfig) -> list[Any]:
    names = {
        "text": [config.text_field],
        "completion": [config.prompt_field, config.completion_field],
        "chat": [config.messages_field],
    }[config.kind]
    for name in names:
        if name not in table.column_names:
            raise ValueError(
                f"the data must have a field {name!r} for kind={config.kind}, got the fields "
                f"{', '.join(table.column_names)}; name yours with the matching *_field option"
            )
    if config.kind == "text":
        return [text for text in table[names[0]] if text and text.strip()]
    return [{name: row[name] for name in names} for row in table]


def _split_documents(documents: list[Any], config: DataConfig) -> tuple[list[Any], list[Any]]:
    """Splits whole documents by a seeded draw; a single text is cut at its end instead."""
    if len(documents) == 1 and isinstance(documents[0], str):
        cut = int(len(documents[0]) * (1 - config.validation_fraction))
        return [documents[0][:cut]], [documents[0][cut:]]
    count = max(1, round(len(documents) * config.validation_fraction))
    if count >= len(documents):
        raise ValueError(f"data must hold at least two documents to split off held-out text, got {len(documents)}")
    held_out = set(np.random.default_rng(config.data_seed).permutation(len(documents))[:count].tolist())
    train = [document for i, document in enumerate(documents) if i not in held_out]
    return train, [documents[i] for i in sorted(held_out)]


def _rows(documents: list[Any], config: DataConfig, tokenizer: Any, limit: int | None, drop_last: bool) -> TokenRows:
    if config.kind == "text":
        return _packed_rows(documents, config.sequence_length, tokenizer, limit, drop_last)
    encode = _encode_completion if config.kind == "completion" else _encode_chat
    ids, labels, total = [], [], 0
    for document in documents:
        row_ids, row_labels = encode(document, config, tokenizer)
        row_ids, row_labels = row_ids[-config.sequence_length :], row_labels[-config.sequence_length :]
        total += len(row_ids)
        if limit is not None and total > limit:
            break
        ids.append(np.array(row_ids, dtype=np.int32))
        labels.append(np.array(row_labels, dtype=np.int32))
    return TokenRows(ids, labels)


def _packed_rows(documents: list[str], length: int, tokenizer: Any, limit: int | None, drop_last: bool) -> TokenRows:
    parts: list[np.ndarray] = []
    total = 0
    for start in range(0, len(documents), 256):
        for ids in tokenizer(documents[start : start + 256])["input_ids"]:
            if not ids or ids[-1] != tokenizer.eos_token_id:
                ids = [*ids, tokenizer.eos_token_id]
            parts.append(np.array(ids, dtype=np.int32))
            total += len(ids)
        if limit is not None and total >= limit:
            break
    tokens = np.concatenate(parts) if parts else np.empty(0, dtype=np.int32)
    tokens = tokens[:limit]
    whole = len(tokens) // length
    rows = list(tokens[: whole * length].reshape(-1, length))
    if not drop_last and len(tokens) - whole * length > 1:
        rows.append(tokens[whole * length :])
    return TokenRows(rows, rows)


def _encode_completion(document: dict[str, str], config: DataConfig, tokenizer: Any) -> tuple[list[int], list[int]]:
    prompt = tokenizer(document[config.prompt_field])["input_ids"]
    completion = tokenizer(document[config.completion_field], add_special_tokens=False)["input_ids"]
    completion = [*completion, tokenizer.eos_token_id]
    return [*prompt, *completion], [IGNORED] * len(prompt) + completion


def _encode_chat(document: dict[str, Any], config: DataConfig, tokenizer: Any) -> tuple[list[int], list[int]]:
    """Tokens of a chat; labels on what each assistant turn adds to the rendered text before it."""
    if not tokenizer.chat_template:
        raise ValueError("tokenizer must have a chat template for kind=chat, got none; use kind=completion instead")
    messages = document[config.messages_field]
    ids: list[int] = []
    labels: list[int] = []
    for count, message in enumerate(messages, start=1):
        rendered = _render(tokenizer, messages[:count])
        if message["role"] == "assistant":
            opening = _render(tokenizer, messages[: count - 1], add_generation_prompt=True)
            labels += [IGNORED] * (len(opening) - len(labels)) + rendered[len(opening) :]
        ids = rendered
        labels += [IGNORED] * (len(ids) - len(labels))
    return ids, labels[: len(ids)]


def _render(tokenizer: Any, messages: list[Any], **options: Any) -> list[int]:
    text = tokenizer.apply_chat_template(messages, tokenize=False, **options) if messages else ""
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def _format_of(path: str) -> str:
    ending = Path(path.removesuffix(".gz").removesuffix(".xz").removesuffix(".zst")).suffix.lstrip(".")
    if ending not in _FORMATS:
        raise ValueError(
            f"format must be given for files that end in .{ending}: one of {', '.join(_LOADERS)}, got {path}"
        )
    return _FORMATS[ending]


def _looks_like_hub_name(source: str) -> bool:
    return not Path(source).suffix and not source.startswith((".", "/", "~")) and source.count("/") <= 1


def _not_found(source: str) -> str:
    folder = Path(source).expanduser().parent
    names: Iterable[str] = (path.name for path in folder.iterdir()) if folder.is_dir() else ()
    near = difflib.get_close_matches(Path(source).name, list(names), n=3)
    hint = f"; near it are {', '.join(near)}" if near else ""
    return f"data must be an existing file, glob or hub data set, got {source}, which matches nothing{hint}"
