"""What a data set is, in one line: the columns that are used and how, and a row as the model will see it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby, islice
from typing import Any

import numpy as np

from lte.config import IGNORED
from lte.data.chats import Chat
from lte.data.config import DataConfig, Documents
from lte.data.shapes import Tokens

# Around what trains, and how much of a stretch of text and how many stretches are shown.
OPEN, CLOSE = "[[", "]]"
MOST_CHARS, MOST_STRETCHES = 120, 8


def announce(documents: Documents, row: str, count: int | None = None) -> str:
    """One line on a data set.

    Args:
        documents: as they were read.
        row: a row, from `row_as_seen` or `document_as_read`.
        count: of the documents, where they were not kept.
    """
    columns = documents.columns
    by_use: dict[str, list[str]] = {}
    for name, use in columns.used.items():
        by_use.setdefault(use, []).append(name)
    used = ", ".join(use if names == [use] else f"{use} from {' and '.join(names)}" for use, names in by_use.items())
    parts = [f"{documents.source}: {len(documents) if count is None else count} documents of kind {documents.kind}"]
    parts[0] += f" ({used})" if used else ""
    parts += ["not used: " + ", ".join(sorted(map(str, columns.unused)))] if columns.unused else []
    if columns.left_out:
        parts.append("left out: " + ", ".join(f"{count} rows {reason}" for reason, count in columns.left_out.items()))
    return f"{'; '.join(parts)}; trained is what stands in {OPEN} {CLOSE}: {row}"


def announce_task(name: str, info: Mapping[str, Any], row: Mapping[str, Any], tokenizer: Any) -> str:
    """One line on a task's data, whose columns are known.

    Args:
        name: of the task.
        info: counts and origin of the part that the row is of.
        row: of tokens, with labels of its own, of an encoder-decoder's answer, or of a whole row; or a prompt.
        tokenizer: of the model.
    """
    labels = row.get("labels")
    if labels is not None and np.ndim(labels) == 0:
        shown = _in_one_line([(tokenizer.decode(row["input_ids"]), False), (f" {labels}", True)])
    elif labels is None or len(labels) != len(row["input_ids"]):
        answer = [] if labels is None else [(tokenizer.decode(labels), True)]
        shown = _in_one_line([(tokenizer.decode(row["input_ids"]), False), *answer])
    else:
        shown = row_as_seen(row, tokenizer)
    return (
        f"{name}: {info['examples']} examples from {info['origin']}; trained is what stands in {OPEN} {CLOSE}: {shown}"
    )


def row_as_seen(row: Mapping[str, Any], tokenizer: Any) -> str:
    """A row of tokens as text in one line, what trains in double brackets."""
    ids, labels = (np.asarray(row[name]).tolist() for name in ("input_ids", "labels"))
    stretches: list[tuple[str, bool]] = []
    before, end = "", 0
    for trained, group in islice(groupby(label != IGNORED for label in labels), MOST_STRETCHES + 1):
        start, end = end, end + len(list(group))
        # By what is added: alone, a stretch may lose the space before it.
        text = tokenizer.decode(ids[:end])
        stretches.append(
            (text.removeprefix(before) if text.startswith(before) else tokenizer.decode(ids[start:end]), trained)
        )
        before = text
    return _in_one_line(stretches)


def document_as_read(document: Any, config: DataConfig) -> str:
    """A document before it is tokenised, as `row_as_seen`; of a chat the template will make another text."""
    if isinstance(document, Chat):
        return _in_one_line(list(_turns(document[config.messages_field])))
    if isinstance(document, Tokens):
        row = {"input_ids": document.ids, "labels": document.labels}
        stretches = groupby(zip(*row.values(), strict=True), key=lambda pair: pair[1] != IGNORED)
        return _in_one_line([(" ".join(str(token) for token, _ in group), trained) for trained, group in stretches])
    if isinstance(document, str):
        return _in_one_line([(document, True)])
    return _in_one_line([(document[config.prompt_field], False), (document[config.completion_field], True)])


def _turns(messages: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, bool]]:
    for message in messages:
        yield f"{message['role']}: ", False
        content = "\n".join(str(message[name]) for name in ("content", "tool_calls") if message.get(name))
        yield content, message["role"] == "assistant" and message.get("weight") != 0
        yield "\n", False


def _in_one_line(stretches: Sequence[tuple[str, bool]]) -> str:
    shown = []
    joined = [
        ("".join(text for text, _ in group), trained) for trained, group in groupby(stretches, lambda pair: pair[1])
    ]
    for text, trained in joined[:MOST_STRETCHES]:
        half = MOST_CHARS // 2
        short = text if len(text) <= MOST_CHARS else f"{text[:half]} ... {text[-half:]}"
        # With the line ends spelled out.
        plain = short.replace("\\", "\\\\").replace("\n", "\\n").replace("\r", "\\r").replace("\t", "\\t")
        shown.append(f"{OPEN}{plain}{CLOSE}" if trained else plain)
    return "".join(shown) + (" ..." if len(joined) > MOST_STRETCHES else "")
