"""What a task is: where its data lies, how a row becomes an example, and what is measured.

To add a task, put an object of one of these classes into `TASKS` of a file in `lte.data.tasks.sets`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from lte.config import check_choice
from lte.data.chats import Chat, read_messages
from lte.data.files import as_text

Row = Mapping[str, Any]
Example = dict[str, Any]


@dataclass(frozen=True)
class HubData:
    """A data set on the hub.

    Attributes:
        path: its name, owner/name.
        name: its configuration.
        converted: folder in its branch `refs/convert/parquet`, for data sets whose own branch holds a script, which
            `datasets` no longer runs.
        splits: what it calls a split, where that is not what we call it.
    """

    path: str
    name: str | None = None
    converted: str | None = None
    splits: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Task:
    """A data set and its metrics.

    Attributes:
        name: as `--task` and `get_task` take it.
        metrics: keys of `lte.eval.metrics.METRICS`, or perplexity; the main one first.
        files: names of the file of each split in its original form, the preferred one first, without .gz, .bz2, .xz.
        folders: where the files lie below the data folder, beside the data folder itself.
        hub: the same on the hub.
        columns: what sources call a field of ours; the first one that a row has counts.
        headerless: column names of the splits whose file has no header line.
        measured_split: what is measured where nobody says otherwise.
        further_splits: measured as well, by the suffix of their metrics.
    """

    name: str
    metrics: tuple[str, ...]
    files: Mapping[str, tuple[str, ...]]
    folders: tuple[str, ...]
    hub: HubData
    columns: Mapping[str, tuple[str, ...]]
    headerless: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    measured_split: str = "test"
    further_splits: Mapping[str, str] = field(default_factory=dict)

    @property
    def main_metric(self) -> str:
        """The metric that a result record gives as its value."""
        return self.metrics[0]

    def check_split(self, split: str) -> None:
        """Raises a `ValueError` that names the splits there are, if `split` is none of them."""
        check_choice("split", split, tuple(self.files))

    def examples(self, rows: Sequence[Row], origin: str) -> list[Example]:
        """The examples of a split's rows; rows that hold none are left out.

        Args:
            rows: as their source holds them.
            origin: where they are from, for error messages.

        Raises:
            ValueError: for a missing column, a label that is none, or rows without a single example.
        """
        found = []
        for number, row in enumerate(rows, 1):
            try:
                example = self._example(row, origin)
            except ValueError as error:
                raise error if origin in str(error) else ValueError(f"{origin}, row {number}: {error}") from None
            if isinstance(example, Chat):
                example.origin = f"{origin}, row {number}"
            if example is not None:
                found.append(example)
        if not found:
            raise ValueError(f"{origin} must hold examples of {self.name}, got {len(rows)} rows without any")
        return found

    def _example(self, row: Row, origin: str) -> Example | None:
        raise NotImplementedError

    def value(self, row: Row, name: str, origin: str) -> Any:
        """The value of a field of ours in a row, `None` where the row ends before it.

        Raises:
            ValueError: if the row has no such column.
        """
        for column in self.columns[name]:
            if column in row:
                return row[column]
        raise ValueError(
            f"{origin} must have a column {' or '.join(self.columns[name])} for task={self.name}, got the columns "
            f"{', '.join(map(str, row))}; is it another task's file, or a split without labels?"
        )


@dataclass(frozen=True, kw_only=True)
class ClassificationTask(Task):
    """A label, or without `labels` a number, for a text or a pair of texts.

    Examples hold `text`, `text_pair` (or `None`), and `label`.
    """

    labels: tuple[str, ...] = ()

    @property
    def head(self) -> dict[str, Any]:
        """What the config of a model with this task's head says."""
        if not self.labels:
            return {"num_labels": 1, "problem_type": "regression"}
        return {
            "num_labels": len(self.labels),
            "problem_type": "single_label_classification",
            "id2label": dict(enumerate(self.labels)),
            "label2id": {label: index for index, label in enumerate(self.labels)},
        }

    def _example(self, row: Row, origin: str) -> Example | None:
        text = as_text(self.value(row, "text", origin))
        pair = as_text(self.value(row, "text_pair", origin)) if "text_pair" in self.columns else None
        label = self.value(row, "label", origin)
        # "-" is SNLI's mark for rows whose annotators disagree, -1 the hub's for rows without a label.
        lacks_pair = "text_pair" in self.columns and pair is None
        if text is None or lacks_pair or label is None or str(label) in ("-", "-1", "-1.0", ""):
            return None
        return {"text": text, "text_pair": pair, "label": self.parse_label(label, origin)}

    def parse_label(self, label: Any, origin: str) -> int | float:
        """A label as the head's index, by name or number; a score as it is.

        Raises:
            ValueError: for anything else.
        """
        if label in self.labels:
            return self.labels.index(label)
        try:
            number = float(label)
        except (TypeError, ValueError):
            number = float("nan")
        if not self.labels and number == number:
            return number
        if number not in range(len(self.labels)):
            wanted = f"one of {', '.join(self.labels)}, or their number from 0" if self.labels else "a number"
            raise ValueError(f"label must be {wanted}, got label={label!r} in {origin}")
        return int(number)


@dataclass(frozen=True, kw_only=True)
class GenerationTask(Task):
    """A text for a text. Rows with the same input are one example with several references.

    Examples hold `source` and `references`.

    Attributes:
        template: the prompt around `{source}`.
        max_new_tokens: of an answer.
    """

    references: ClassVar[tuple[str, ...]] = ("reference", "reference2", "reference3")

    template: str
    max_new_tokens: int

    def examples(self, rows: Sequence[Row], origin: str) -> list[Example]:
        """As for any task, with the references of equal sources put together in the order of the first."""
        by_source: dict[str, list[str]] = {}
        for example in super().examples(rows, origin):
            by_source.setdefault(example["source"], []).extend(example["references"])
        return [{"source": source, "references": references} for source, references in by_source.items()]

    def _example(self, row: Row, origin: str) -> Example | None:
        source = self.value(row, "source", origin)
        found = [self.value(row, name, origin) for name in self.references if self._has(row, name)]
        # SciTLDR has lists of sentences, and of summaries.
        values = [each for value in found for each in (value if isinstance(value, list) else [value])]
        texts = [text for each in values if (text := as_text(each))]
        if not found:
            self.value(row, "reference", origin)
        source = " ".join(as_text(each) or "" for each in source) if isinstance(source, list) else as_text(source)
        if not source or not texts:
            return None
        return {"source": source.strip(), "references": [text.strip() for text in texts]}

    def _has(self, row: Row, name: str) -> bool:
        return any(column in row for column in self.columns.get(name, ()))


@dataclass(frozen=True, kw_only=True)
class LanguageTask(Task):
    """The next token of a text. Examples hold `text`.

    Attributes:
        lines: whether rows from the hub are the lines of one text, empty where the original has a blank line.
    """

    columns: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: {"text": ("text",)})
    lines: bool = False

    def examples(self, rows: Sequence[Row], origin: str) -> list[Example]:
        """As for any task; the lines of a text are put together as the original file has them."""
        if self.lines and len(rows) > 1:
            rows = [{"text": "".join(self.value(row, "text", origin) or " \n" for row in rows)}]
        return super().examples(rows, origin)

    def _example(self, row: Row, origin: str) -> Example | None:
        text = as_text(self.value(row, "text", origin))
        return {"text": text} if text and text.strip() else None


@dataclass(frozen=True, kw_only=True)
class ChatTask(Task):
    """The assistant's turns of a chat. Examples hold `messages`.

    The sources have a training split alone: a share of whole chats, drawn by seed, is held out from it as `validation`.

    Attributes:
        parts: tasks whose chats together are this one's, each read as it is by itself.
    """

    measured_split: str = "validation"
    parts: tuple[ChatTask, ...] = ()

    def check_split(self, split: str) -> None:
        """Raises a `ValueError` for another split than `train` and `validation`."""
        check_choice("split", split, ("train", "validation"))

    def _example(self, row: Row, origin: str) -> Example | None:
        if any(column in row for column in self.columns["messages"]):
            messages = read_messages(self.value(row, "messages", origin) or [])
        else:
            question, answer = self.value(row, "instruction", origin), self.value(row, "output", origin)
            extra = as_text(row.get("input"))
            question = f"{as_text(question)}\n\n{extra}" if extra else as_text(question) or ""
            turns = {"user": question, "assistant": as_text(answer) or ""}
            messages = [{"role": role, "content": text} for role, text in turns.items()]
        answers = [message for message in messages if message["role"] == "assistant"]
        return Chat(messages=messages) if any(a.get("content") or a.get("tool_calls") for a in answers) else None
