"""A task's data as rows of tokens: what trains, and what is measured.

Shapes: T tokens.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from lte.config import IGNORED
from lte.data.config import DataConfig, check_sequence_length, split_documents
from lte.data.encoding import Encoder
from lte.data.rows import LmCollator, PaddingCollator, TokenRows, shuffled
from lte.data.tasks.files import SplitRows, read_split
from lte.data.tasks.registry import TaskConfig
from lte.data.tasks.task import ChatTask, ClassificationTask, Example, GenerationTask, LanguageTask, Task

if TYPE_CHECKING:
    import datasets


# Texts of one call of a tokenizer: what it returns is many times as large as its text.
BATCH = 1000


@dataclass(frozen=True)
class TaskData:
    """Rows of a task.

    Attributes:
        train: rows to train on, `None` where they were not wanted.
        measured: rows of the split that is measured. For a generation they are prompts without labels.
        collator: makes a batch of rows that train, or of measured rows with labels.
        references: of a generation: the texts that each measured row may be answered with.
        further: measured rows of further splits, by the suffix of their metrics.
        prompts: of a generation: gives the token ids of the first so many prompts of the shuffled training split,
            `None` without one.
        num_words: of the measured text, in language modelling.
        max_new_tokens: of a generated answer.
        info: JSON-ready: `split`, the name of the measured one, and for `train` and `validation` (what is measured) the
            number of examples and tokens, where they are from, and the sha256.
    """

    train: Any
    measured: Any
    collator: Any
    references: list[list[str]] = field(default_factory=list)
    further: dict[str, Any] = field(default_factory=dict)
    prompts: Callable[[int], list[list[int]]] | None = None
    num_words: int | None = None
    max_new_tokens: int = 0
    info: dict[str, Any] = field(default_factory=dict)


def load_task_data(
    task: Task,
    tokenizer: Any,
    config: TaskConfig | None = None,
    data_config: DataConfig | None = None,
    *,
    train_split: str | None = "train",
    split: str | None = None,
    encoder_decoder: bool = False,
    max_length: int | None = None,
) -> TaskData:
    """Reads and tokenises a task's training split, and the one that is measured.

    Args:
        task: from `get_task`.
        tokenizer: a transformers tokenizer.
        config: where the data is; `None` takes the hub.
        data_config: `sequence_length`, `pack`, `data_seed`, `validation_fraction` (of chats), and the limits of
            tokens; nothing else of it counts.
        train_split: the split that trains; `None` reads none.
        split: the split that is measured; `None` takes the task's own.
        encoder_decoder: whether the model reads sources in an encoder.
        max_length: longest sequence the model takes.

    Raises:
        ValueError: for data that is not there or is of another form, or rows longer than the model takes.
    """
    config, data_config = config or TaskConfig(task=task.name), data_config or DataConfig()
    check_sequence_length(data_config, max_length)
    if not isinstance(task, ClassificationTask) and tokenizer.eos_token_id is None:
        raise ValueError("tokenizer must have an end-of-text token, got eos_token=None; set tokenizer.eos_token")
    uses = {"measured": split or task.measured_split, **({"train": train_split} if train_split else {})}
    splits = _read_splits(task, config.data_dir, data_config, uses)
    for use, part in splits.items():
        if use == "train":
            splits[use] = replace(part, examples=shuffled(part.examples, data_config))
        # Text is limited in rows, of which it is one.
        elif not isinstance(task, LanguageTask):
            splits[use] = replace(part, examples=part.examples[: config.limit])
    loader = _Loader(tokenizer, config, data_config, encoder_decoder, splits)
    if isinstance(task, ClassificationTask):
        found = loader.classified()
    elif isinstance(task, GenerationTask):
        found = loader.generated(task)
    else:
        found = loader.predicted(chat=isinstance(task, ChatTask))
    names = {"train": "train", "measured": "validation"}
    info = {names.get(use, use): part.info(**loader.counts.get(use, {})) for use, part in splits.items()}
    heading = {"task": task.name, "train_source": task.name, "split": splits["measured"].name}
    return replace(found, info={**heading, **info})


@dataclass(frozen=True)
class _Split:
    """The examples of a split and where they are from."""

    name: str
    examples: list[Example]
    source: SplitRows

    def info(self, **counts: Any) -> dict[str, Any]:
        digest = hashlib.sha256(json.dumps(self.examples).encode()).hexdigest()
        return {
            "examples": len(self.examples),
            **counts,
            "origin": self.source.origin,
            "origin_sha256": self.source.sha256,
            "sha256": digest,
        }


def _table(rows: list[dict[str, Any]]) -> datasets.Dataset:
    import datasets

    return datasets.Dataset.from_list(rows)


def _read_splits(task: Task, data_dir: str | None, data_config: DataConfig, uses: dict[str, str]) -> dict[str, _Split]:
    """The splits by their use: `measured`, `train`, and the suffixes of further ones that are measured."""
    for name in uses.values():
        task.check_split(name)
    if uses["measured"] == task.measured_split:
        uses = {**uses, **task.further_splits}

    def read(name: str) -> _Split:
        source = read_split(task, name, data_dir)
        return _Split(name, task.examples(source.rows, source.origin), source)

    if not isinstance(task, ChatTask):
        return {use: read(name) for use, name in uses.items()}
    whole = read("train")
    parts = dict(zip(("train", "validation"), split_documents(whole.examples, data_config), strict=True))
    return {use: replace(whole, name=name, examples=parts[name]) for use, name in uses.items()}


@dataclass(frozen=True)
class _Loader:
    """Tokenises the splits of a task; `counts` gets what is found in them."""

    tokenizer: Any
    config: TaskConfig
    data_config: DataConfig
    encoder_decoder: bool
    splits: dict[str, _Split]
    counts: dict[str, dict[str, Any]] = field(default_factory=dict)

    def classified(self) -> TaskData:
        length, limit = self.data_config.sequence_length, self.data_config.max_train_tokens
        rows = {}
        for use, split in self.splits.items():
            found, truncated = encode_classified(split.examples, self.tokenizer, length)
            found, tokens = _within(found, limit if use == "train" else None)
            rows[use] = _table(found)
            self.counts[use] = {"rows": len(found), "tokens": tokens, "truncated_documents": truncated}
        train, measured = rows.pop("train", None), rows.pop("measured")
        return TaskData(train, measured, PaddingCollator(self.tokenizer), further=rows)

    def generated(self, task: GenerationTask) -> TaskData:
        length = self.data_config.sequence_length
        new_tokens = self.config.max_new_tokens or task.max_new_tokens
        room = length if self.encoder_decoder else length - new_tokens
        prompts = {}
        for use, split in self.splits.items():
            sources = [example["source"] for example in split.examples]
            prompts[use], truncated = fit_sources(sources, task.template, self.tokenizer, room)
            self.counts[use] = {"truncated_documents": truncated}
        measured = self._prompts(prompts["measured"])
        self.counts["measured"]["tokens"] = sum(len(ids) for ids in measured)
        trains = "train" in self.splits
        return TaskData(
            train=self._answers(prompts["train"]) if trains else None,
            measured=_table([{"input_ids": ids} for ids in measured]),
            collator=PaddingCollator(self.tokenizer) if self.encoder_decoder else self._lm_collator(),
            references=[example["references"] for example in self.splits["measured"].examples],
            prompts=(lambda count: self._prompts(prompts["train"][:count])) if trains else None,
            max_new_tokens=new_tokens,
        )

    def _prompts(self, texts: list[str]) -> list[list[int]]:
        """Token ids of prompts to answer, as the training rows begin."""
        if self.encoder_decoder:
            return list(self.tokenizer(texts)["input_ids"])
        encoder = self._encoder("completion")
        return [[*encoder.prefix.tolist(), *ids.tolist()] for ids in encoder.encode(texts)]

    def _answers(self, prompts: list[str]) -> Any:
        """Rows that train, one for each reference."""
        pairs = [
            {"prompt": prompt, "completion": reference}
            for prompt, example in zip(prompts, self.splits["train"].examples, strict=True)
            for reference in example["references"]
        ]
        # Again, lest the references of one source share a packed row.
        pairs = shuffled(pairs, self.data_config)
        limit = self.data_config.max_train_tokens
        if not self.encoder_decoder:
            table, found = self._encoder("completion").rows(pairs, "train", limit)
        else:
            rows = encode_summaries(pairs, self.tokenizer, self.data_config.sequence_length)
            rows, tokens = _within(rows, limit)
            table, found = _table(rows), {"rows": len(rows), "tokens": tokens}
        self.counts["train"] |= found
        return table

    def predicted(self, *, chat: bool) -> TaskData:
        encoder = self._encoder("chat" if chat else "text")
        limits = {"train": self.data_config.max_train_tokens, "measured": self.data_config.max_validation_tokens}
        rows = {}
        for use, split in self.splits.items():
            documents = split.examples if chat else [example["text"] for example in split.examples]
            part = "train" if use == "train" else "validation"
            rows[use], self.counts[use] = encoder.rows(documents, part, limits[use])
        measured, words = rows["measured"], None
        if not chat:
            measured = overlapping_rows(measured, self.data_config.sequence_length, self.config.limit)
            if self.config.limit is None and self.data_config.max_validation_tokens is None:
                examples = self.splits["measured"].examples
                text = "\n".join(example["text"].removesuffix("\n") for example in examples) + "\n"
                # As published counts have it: an end-of-line mark is a word.
                words = len(text.split()) + text.count("\n")
        return TaskData(rows.get("train"), measured, self._lm_collator(), num_words=words)

    def _encoder(self, kind: Any) -> Encoder:
        return Encoder(replace(self.data_config, kind=kind), self.tokenizer, progress=False)

    def _lm_collator(self) -> LmCollator:
        return LmCollator(self.tokenizer.pad_token_id)


def _within(rows: list[dict[str, Any]], limit: int | None) -> tuple[list[dict[str, Any]], int]:
    """The first rows that hold at most `limit` tokens, at least one, and how many they hold.

    The labels of a summary are tokens of the decoder, and count as well.
    """
    ends = np.cumsum(
        [len(row["input_ids"]) + (len(row["labels"]) if isinstance(row["labels"], list) else 0) for row in rows]
    )
    kept = rows if limit is None else rows[: max(1, int((ends <= limit).sum()))]
    return kept, int(ends[len(kept) - 1])


def encode_classified(examples: Sequence[Example], tokenizer: Any, length: int) -> tuple[list[dict[str, Any]], int]:
    """Rows with `labels` of texts and pairs of texts, and how many of them had to be cut to `length` tokens.

    Pairs are separated as the tokenizer does it, by a new line if it puts nothing between them.
    """
    marks = tokenizer.num_special_tokens_to_add(pair=True) - tokenizer.num_special_tokens_to_add(pair=False)
    rows, cut = [], 0
    for batch in _batches(examples):
        inputs = [[example["text"].strip() for example in batch]]
        if batch[0]["text_pair"] is not None:
            inputs.append([example["text_pair"].strip() for example in batch])
            inputs = inputs if marks else [[f"{text}\n{pair}" for text, pair in zip(*inputs, strict=True)]]
        # The collator makes the mask.
        options = {"return_attention_mask": False, "verbose": False}
        found = tokenizer(*inputs, truncation=True, max_length=length, **options)
        cut += sum(len(ids) > length for ids in tokenizer(*inputs, **options)["input_ids"])
        for index, example in enumerate(batch):
            rows.append({**{name: values[index] for name, values in found.items()}, "labels": example["label"]})
    return rows, cut


def fit_sources(sources: Sequence[str], template: str, tokenizer: Any, room: int) -> tuple[list[str], int]:
    """Prompts of at most about `room` tokens, and how many sources lost their end for that.

    Raises:
        ValueError: if the template alone leaves no room, or the tokenizer does not say where its tokens lie.
    """
    if not tokenizer.is_fast:
        raise ValueError("tokenizer must be a fast one to cut sources, got a slow one; load it with use_fast=True")
    around = len(tokenizer(template.format(source=""))["input_ids"])
    if room - around < 1:
        raise ValueError(
            f"sequence_length must leave room for a source beside {around} tokens of the prompt and max_new_tokens, "
            f"got {room} for both; raise sequence_length, or lower max_new_tokens"
        )
    options = {"add_special_tokens": False, "return_offsets_mapping": True}
    ends = []
    for batch in _batches(sources):
        found = tokenizer(list(batch), truncation=True, max_length=room - around, **options)
        ends += [offsets[-1][1] if offsets else 0 for offsets in found["offset_mapping"]]
    cut = sum(end < len(source.rstrip()) for end, source in zip(ends, sources, strict=True))
    return [template.format(source=source[:end]) for source, end in zip(sources, ends, strict=True)], cut


def encode_summaries(pairs: list[dict[str, str]], tokenizer: Any, length: int) -> list[dict[str, Any]]:
    """Rows of an encoder-decoder: the prompt in `input_ids`, the completion and its end in `labels`."""
    prompts = tokenizer([pair["prompt"] for pair in pairs], truncation=True, max_length=length)["input_ids"]
    answers = tokenizer([pair["completion"] for pair in pairs], add_special_tokens=False)["input_ids"]
    return [
        {"input_ids": ids, "labels": [*answer[: length - 1], tokenizer.eos_token_id]}
        for ids, answer in zip(prompts, answers, strict=True)
    ]


def overlapping_rows(rows: Any, length: int, limit: int | None = None) -> TokenRows:
    """The tokens of packed rows in rows that begin with the last token of the row before, at most `limit` of them.

    So every token of a text but its first is predicted once, from up to `length - 1` tokens before it. The repeated
    token has the label -100, so that it is counted once, too.

    Args:
        rows: `input_ids` and `labels` [T] each, where padding has the label -100.
        length: tokens of a row.
        limit: rows at most.
    """
    ids = torch.cat([row["input_ids"][row["labels"] != IGNORED] for row in rows])
    starts = range(0, max(1, len(ids) - 1), length - 1)[:limit]
    parts = [ids[start : start + length].numpy() for start in starts]
    labels = [part if index == 0 else np.concatenate([[IGNORED], part[1:]]) for index, part in enumerate(parts)]
    return TokenRows(parts, labels)


def _batches(items: Sequence[Any]) -> Iterator[Sequence[Any]]:
    for start in range(0, len(items), BATCH):
        yield items[start : start + BATCH]
