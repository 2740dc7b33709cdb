"""A task's data as rows of tokens: what trains, and what is measured."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from lte.data.config import DataConfig, check_sequence_length, split_documents
from lte.data.encoding import Encoder
from lte.data.rows import LmCollator
from lte.data.tasks.collator import PaddingCollator
from lte.data.tasks.config import TaskConfig
from lte.data.tasks.encoding import encode_classified, encode_sources, encode_summaries, fit_sources, overlapping_rows
from lte.data.tasks.files import SplitRows, read_split
from lte.data.tasks.task import ChatTask, ClassificationTask, Example, GenerationTask, LanguageTask, Task

if TYPE_CHECKING:
    import datasets


@dataclass(frozen=True)
class TaskData:
    """Rows of a task.

    Attributes:
        train: rows to train on, `None` where they were not wanted.
        measured: rows of the split that is measured. For a generation they are prompts without labels.
        collator: makes a batch of rows that train, or of measured rows with labels.
        split: name of the measured split.
        references: of a generation: the texts that each measured row may be answered with.
        further: measured rows of further splits, by the suffix of their metrics.
        prompts: of a generation: gives the token ids of the first so many prompts of the shuffled training split,
            `None` without one.
        num_words: of the measured text, in language modelling.
        max_new_tokens: of a generated answer.
        info: JSON-ready: for `train` and `validation` (what is measured) the number of examples and tokens, where
            they are from, and the sha256.
    """

    train: Any
    measured: Any
    collator: Any
    split: str
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
    return _Loader(task, tokenizer, config, data_config, encoder_decoder).load(splits)


@dataclass(frozen=True)
class _Split:
    """The examples of a split and where they are from."""

    name: str
    examples: list[Example]
    source: SplitRows

    def info(self, **counts: Any) -> dict[str, Any]:
        digest = hashlib.sha256(json.dumps(self.examples).encode()).hexdigest()
        return {"examples": len(self.examples), **counts, **self.source.to_dict(), "sha256": digest}


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
    """Tokenises splits for one task and tokenizer."""

    task: Task
    tokenizer: Any
    config: TaskConfig
    data_config: DataConfig
    encoder_decoder: bool

    def load(self, splits: dict[str, _Split]) -> TaskData:
        limit = self.config.limit
        # Text is limited in rows, of which it is one.
        if limit is not None and not isinstance(self.task, LanguageTask):
            splits = {
                use: split if use == "train" else replace(split, examples=split.examples[:limit])
                for use, split in splits.items()
            }
        if "train" in splits:
            splits = {**splits, "train": replace(splits["train"], examples=self._shuffled(splits["train"].examples))}
        if isinstance(self.task, ClassificationTask):
            return self._classified(self.task, splits)
        if isinstance(self.task, GenerationTask):
            return self._generated(self.task, splits)
        return self._predicted(splits)

    def _info(self, splits: dict[str, _Split], counts: dict[str, dict[str, Any]]) -> dict[str, Any]:
        names = {"train": "train", "measured": "validation"}
        parts = {names.get(use, use): split.info(**counts.get(use, {})) for use, split in splits.items()}
        return {"task": self.task.name, "train_source": self.task.name, "split": splits["measured"].name, **parts}

    def _classified(self, task: ClassificationTask, splits: dict[str, _Split]) -> TaskData:
        length, limit = self.data_config.sequence_length, self.data_config.max_train_tokens
        rows, counts = {}, {}
        for use, split in splits.items():
            found, truncated = encode_classified(split.examples, self.tokenizer, length)
            if use == "train" and limit is not None:
                ends = np.cumsum([len(row["input_ids"]) for row in found])
                found = found[: max(1, int((ends <= limit).sum()))]
            tokens = sum(len(row["input_ids"]) for row in found)
            rows[use] = _table(found)
            counts[use] = {"rows": len(found), "tokens": tokens, "truncated_documents": truncated}
        return TaskData(
            train=rows.pop("train", None),
            measured=rows.pop("measured"),
            collator=PaddingCollator(self.tokenizer),
            split=splits["measured"].name,
            further=rows,
            info=self._info(splits, counts),
        )

    def _generated(self, task: GenerationTask, splits: dict[str, _Split]) -> TaskData:
        length = self.data_config.sequence_length
        new_tokens = self.config.max_new_tokens or task.max_new_tokens
        room = length if self.encoder_decoder else length - new_tokens
        prompts, counts = {}, {}
        for use, split in splits.items():
            sources = [example["source"] for example in split.examples]
            prompts[use], truncated = fit_sources(sources, task.template, self.tokenizer, room)
            counts[use] = {"truncated_documents": truncated}
        collator = PaddingCollator(self.tokenizer) if self.encoder_decoder else self._lm_collator()

        def encode(texts: list[str]) -> list[dict[str, Any]]:
            return encode_sources(texts, self.tokenizer, self._encoder("completion"), self.encoder_decoder)

        def first_prompts(count: int) -> list[list[int]]:
            return [row["input_ids"] for row in encode(prompts["train"][:count])]

        measured = encode(prompts["measured"])
        train = None
        if "train" in splits:
            train, found = self._answers(prompts["train"], splits["train"].examples)
            counts["train"] |= found
        counts["measured"]["tokens"] = sum(len(row["input_ids"]) for row in measured)
        return TaskData(
            train=train,
            measured=_table(measured),
            collator=collator,
            split=splits["measured"].name,
            references=[example["references"] for example in splits["measured"].examples],
            prompts=first_prompts if "train" in splits else None,
            max_new_tokens=new_tokens,
            info=self._info(splits, counts),
        )

    def _answers(self, prompts: list[str], examples: list[Example]) -> tuple[Any, dict[str, Any]]:
        """Rows that train, one for each reference, and their counts."""
        pairs = [
            {"prompt": prompt, "completion": reference}
            for prompt, example in zip(prompts, examples, strict=True)
            for reference in example["references"]
        ]
        # Again, lest the references of one source share a packed row.
        pairs = self._shuffled(pairs)
        limit = self.data_config.max_train_tokens
        if not self.encoder_decoder:
            return self._encoder("completion").rows(pairs, "train", limit)
        rows = encode_summaries(pairs, self.tokenizer, self.data_config.sequence_length)
        ends = np.cumsum([len(row["input_ids"]) + len(row["labels"]) for row in rows])
        rows = rows if limit is None else rows[: max(1, int((ends <= limit).sum()))]
        return _table(rows), {"rows": len(rows), "tokens": int(ends[len(rows) - 1])}

    def _predicted(self, splits: dict[str, _Split]) -> TaskData:
        chat = isinstance(self.task, ChatTask)
        encoder = self._encoder("chat" if chat else "text")
        limits = {"train": self.data_config.max_train_tokens, "measured": self.data_config.max_validation_tokens}
        rows, counts = {}, {}
        for use, split in splits.items():
            documents = split.examples if chat else [example["text"] for example in split.examples]
            part = "train" if use == "train" else "validation"
            rows[use], counts[use] = encoder.rows(documents, part, limits[use])
        measured, words = rows["measured"], None
        if not chat:
            measured = overlapping_rows(measured, self.data_config.sequence_length, self.config.limit)
            if self.config.limit is None and self.data_config.max_validation_tokens is None:
                text = "\n".join(example["text"].removesuffix("\n") for example in splits["measured"].examples) + "\n"
                # As published counts have it: an end-of-line mark is a word.
                words = len(text.split()) + text.count("\n")
        return TaskData(
            train=rows.get("train"),
            measured=measured,
            collator=self._lm_collator(),
            split=splits["measured"].name,
            num_words=words,
            info=self._info(splits, counts),
        )

    def _shuffled(self, items: list[Any]) -> list[Any]:
        order = np.random.default_rng(self.data_config.data_seed).permutation(len(items))
        return [items[index] for index in order]

    def _encoder(self, kind: Any) -> Encoder:
        return Encoder(replace(self.data_config, kind=kind), self.tokenizer, progress=False)

    def _lm_collator(self) -> LmCollator:
        return LmCollator(self.tokenizer.pad_token_id)
