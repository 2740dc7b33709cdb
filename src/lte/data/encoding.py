"""Documents to rows of tokens: tokenising, labelling, packing. Texts, completions, chats, and tokens.

Shapes: R rows, T tokens. The label of an ignored token is -100.
"""

from __future__ import annotations

import hashlib
import json
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from lte.config import IGNORED
from lte.data.chat_writer import ChatWriter
from lte.data.config import DataConfig, kind_of
from lte.data.shapes import Tokens

if TYPE_CHECKING:
    import datasets

# Tokenisers run their threads over the texts of a call and keep much beside the ids until it ends: pieces of long
# documents give all threads work, and batches bound the memory (10 MB of text grew the process by 100 to 230 MB).
PIECE_CHARS = 1 << 17
BATCH_CHARS = 1 << 21
# What templates write after the mark that ends a turn, a line's end say, has fewer tokens.
CLOSING = 3
WORD_GAP = re.compile(r"\S(?= [^\W\d_])")
# Token ids and labels of one document, int32 [T] each.
Example = tuple[np.ndarray, np.ndarray]
# Columns of rows one after the other, and the offsets of the rows.
Columns = tuple[dict[str, np.ndarray], np.ndarray]


class Encoder:
    """Turns documents into rows of tokens."""

    def __init__(self, config: DataConfig, tokenizer: Any, progress: bool):
        self.config, self.tokenizer, self.progress = config, tokenizer, progress
        self.eos = tokenizer.eos_token_id
        self.chat_writer: ChatWriter | None = None
        # What the tokenizer puts before a text by itself, for example its begin-of-text token.
        bare, full = self.encode(["a"])[0].tolist(), tokenizer("a")["input_ids"]
        starts = [i for i in range(len(full)) if full[i : i + len(bare)] == bare]
        self.prefix = np.array(full[: starts[0]] if starts else [], dtype=np.int32)

    def encode(self, texts: list[str]) -> list[np.ndarray]:
        """Token ids of each text, without special tokens of the tokenizer's own."""
        found = self.tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
        return [np.array(ids, dtype=np.int32) for ids in found["input_ids"]]

    def rows(self, documents: list[Any], part: str, limit: int | None) -> tuple[datasets.Dataset, dict[str, Any]]:
        """Rows of the `part` train, validation or calibration, of at most `limit` tokens, and their counts."""
        counts = {"dropped_tokens": 0, "truncated_documents": 0, "unlabelled_documents": 0}
        kind = kind_of(documents[0], self.config) if documents else "text"
        text = kind == "text"
        labelled = self._text(documents, limit, part) if text else self._labelled(kind, documents, limit, part, counts)
        examples = list(labelled)
        if self.config.label_prompts and not text:
            examples = [(self._closed(ids),) * 2 for ids, _ in examples]
        tokens = sum(len(ids) for ids, _ in examples)
        text = text or self.config.label_prompts
        if text and self.config.pack:
            columns, offsets = self._blocks(examples, keep_rest=part == "validation")
            counts["dropped_tokens"] = max(0, tokens - len(columns["input_ids"]))
        else:
            columns, offsets = self._whole(examples)
        if not examples and counts["unlabelled_documents"]:
            raise ValueError(
                f"{part} data must hold labels to train on, got {len(documents)} documents without any: chats in which "
                "no assistant speaks or all turns are marked as untrained, or rows whose labels are all -100"
            )
        if len(offsets) < 2:
            raise ValueError(
                f"{part} data must fill at least one row of sequence_length={self.config.sequence_length} tokens, got "
                f"{len(documents)} documents with {tokens} tokens to train; give more, or lower sequence_length"
            )
        for what, count in counts.items():
            if count and what != "dropped_tokens":
                warnings.warn(f"{what.replace('_', ' ')} in the {part} data: {count} of {len(documents)}", stacklevel=3)
        digest = hashlib.sha256()
        for name in sorted(columns):
            digest.update(columns[name])
        found = {
            "rows": len(offsets) - 1,
            "tokens": tokens - (counts["dropped_tokens"] if text else 0),
            "trained_tokens": int((columns["labels"] != IGNORED).sum()),
            **counts,
            "rows_sha256": digest.hexdigest(),
        }
        return to_dataset(columns, offsets, digest.hexdigest()), found

    def stream(
        self, documents: Iterable[Any], part: str, limit: int | None, counts: dict[str, int]
    ) -> Iterator[Columns]:
        """Rows of documents as they come, some at a time, with the offsets of these rows [R + 1].

        They are those of `rows`, but for completions and chats, whose rows also end where a batch of documents does.

        Args:
            documents: of one kind; no more are read than the limit takes.
            part: train, validation or calibration.
            limit: of tokens.
            counts: to which documents, tokens and all else that `rows` counts is added.
        """
        length, room = self.config.sequence_length, limit
        rest, pad_rest = np.empty(0, dtype=np.int32), part == "validation"
        for batch in _by_size(documents, counts):
            kind = kind_of(batch[0], self.config)
            encoded = self._text(batch, room, part) if kind == "text" else None
            examples = list(encoded or self._labelled(kind, batch, room, part, counts))
            if self.config.label_prompts and kind != "text":
                examples = [(self._closed(ids),) * 2 for ids, _ in examples]
            taken = sum(len(ids) for ids, _ in examples)
            counts["tokens"] += taken
            if self.config.pack and (kind == "text" or self.config.label_prompts):
                ids = np.concatenate([rest, *(ids for ids, _ in examples)])
                end = len(ids) - len(ids) % length
                rest = ids[end:]
                columns = {"input_ids": ids[:end], "labels": ids[:end]}
                yield columns, np.arange(0, end + 1, length)
            elif examples:
                yield self._whole(examples)
            room = None if room is None else room - taken
            # The next document of several kinds may be longer than what is left.
            if room is not None and (room <= 0 or (kind != "text" and room < length)):
                break
        if len(rest) and pad_rest:
            yield self._blocks([(rest, rest)], keep_rest=True)
        elif len(rest):
            counts["tokens"] -= len(rest)
            counts["dropped_tokens"] += len(rest)

    def _closed(self, ids: np.ndarray) -> np.ndarray:
        """A document with the end-of-text token as its last one, and nothing of a template's after it."""
        ends = np.flatnonzero(ids[-CLOSING:] == self.eos)
        if len(ends):
            return ids[: len(ids) - min(CLOSING, len(ids)) + ends[-1] + 1]
        return np.append(ids, np.int32(self.eos))

    def _text(self, documents: list[str], limit: int | None, part: str) -> Iterator[Example]:
        """Documents between the tokenizer's begin-of-text token and the end-of-text token, cut off at the limit."""
        pieces = [piece for document in documents for piece in _pieces(document)]
        held: list[np.ndarray] = []
        room = limit if limit is not None else np.iinfo(np.int64).max
        for batch in self._batches(pieces, lambda piece: len(piece[0]), part):
            for ids, (_, first, last) in zip(self.encode([piece[0] for piece in batch]), batch, strict=True):
                held += [self.prefix, ids] if first else [ids]
                if not last and sum(map(len, held)) < room:
                    continue
                closed = len(ids) > 0 and ids[-1] == self.eos
                document = np.concatenate(held if closed else [*held, np.array([self.eos], dtype=np.int32)])[:room]
                held, room = [], room - len(document)
                yield document, document
                if room == 0:
                    return

    def _labelled(
        self, kind: str, documents: list[Any], limit: int | None, part: str, counts: dict[str, int]
    ) -> Iterator[Example]:
        """Documents of at most `sequence_length` tokens each, until the next one would exceed the limit."""
        readers: dict[str, Callable[[list[Any]], Iterator[tuple[Example, int]]]]
        readers = {"completion": self._completions, "chat": self._chats, "tokens": self._tokens}
        encode = readers[kind]
        total = 0
        for batch in self._batches(documents, _size, part):
            for (ids, labels), too_long in encode(batch):
                if not (labels[1:] != IGNORED).any():
                    counts["unlabelled_documents"] += 1
                    continue
                total += len(ids)
                if limit is not None and total > limit:
                    return
                counts["dropped_tokens"] += too_long
                counts["truncated_documents"] += too_long > 0
                yield ids, labels

    def _batches(self, items: list[Any], size: Callable[[Any], int], part: str) -> Iterable[list[Any]]:
        """Items in batches of about `BATCH_CHARS`, behind a progress bar."""
        ends = np.cumsum([size(item) for item in items]) // BATCH_CHARS
        bounds = [0, *(np.flatnonzero(np.diff(ends)) + 1).tolist(), len(items)]
        batches = [items[start:end] for start, end in pairwise(bounds)]
        from rich.progress import track  # `import lte` does without

        return track(batches, f"tokenising {part} text", disable=not self.progress, transient=True)

    def _completions(self, documents: list[dict[str, str]]) -> Iterator[tuple[Example, int]]:
        """Prompt and completion with the end-of-text token; labels on the latter."""
        length, field = self.config.sequence_length, self.config.completion_field
        prompts = self.encode([document[self.config.prompt_field] or "" for document in documents])
        completions = self.encode([document[field] for document in documents])
        for prompt, completion in zip(prompts, completions, strict=True):
            whole = np.append(completion, np.int32(self.eos))
            kept = whole[:length]
            head = self.prefix[: length - len(kept)]
            tail = prompt[max(0, len(prompt) - (length - len(kept) - len(head))) :]
            ids = np.concatenate([head, tail, kept])
            labels = np.concatenate([np.full(len(head) + len(tail), IGNORED, dtype=np.int32), kept])
            yield (ids, labels), len(self.prefix) + len(prompt) + len(whole) - len(ids)

    def _tokens(self, documents: list[Tokens]) -> Iterator[tuple[Example, int]]:
        """Tokens as they are; rows that are too long are cut into several."""
        length, size = self.config.sequence_length, max(len(self.tokenizer), self.tokenizer.vocab_size)
        for document in documents:
            highest = int(max(document.ids.max(), document.labels.max()))
            if highest >= size:
                raise ValueError(
                    f"input_ids must be of the model's tokenizer, below {size}, got {highest}; tokenise the text anew"
                )
            starts = range(0, len(document.ids), length)
            pieces = [
                (document.ids[start : start + length], document.labels[start : start + length]) for start in starts
            ]
            # Pieces with nothing to train go, but that of a document without any tells that there is none.
            for piece in [piece for piece in pieces if (piece[1][1:] != IGNORED).any()] or pieces[:1]:
                yield piece, 0

    def _chats(self, documents: list[dict[str, Any]]) -> Iterator[tuple[Example, int]]:
        """Chats as the tokenizer's template writes them; labels on the assistant's turns and their closing marks."""
        length = self.config.sequence_length
        for ids, trained in zip(*self._assistant_tokens(documents), strict=True):
            tokens = np.array(ids, dtype=np.int32)
            labels = np.where(np.array(trained, dtype=bool), tokens, np.int32(IGNORED))
            yield (tokens[-length:], labels[-length:]), max(0, len(tokens) - length)

    def _assistant_tokens(self, chats: list[dict[str, Any]]) -> tuple[list[Any], list[Any]]:
        """Token ids of each chat, and which of them the assistant says."""
        if not self.tokenizer.chat_template:
            raise ValueError(
                "tokenizer must have a chat template for kind=chat, got chat_template=None; use an instruction-tuned "
                "model's tokenizer, set tokenizer.chat_template (lte train --chat-template), or use kind=completion"
            )
        if not self.tokenizer.is_fast:
            raise ValueError("tokenizer must be a fast one for kind=chat, got a slow one; use kind=completion")
        self.chat_writer = self.chat_writer or ChatWriter(self.tokenizer, self.config.messages_field)
        rendered = [self.chat_writer.spans(chat) for chat in chats]
        found = self.tokenizer(
            [text for text, _ in rendered], add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        masks = []
        for offsets, (_, spans) in zip(found["offset_mapping"], rendered, strict=True):
            starts, ends = np.array(offsets, dtype=np.int64).reshape(-1, 2).T
            inside = [(starts < end) & (ends > start) for start, end in spans]
            masks.append(np.any(inside, axis=0) if inside else np.zeros(len(starts), dtype=bool))
        return found["input_ids"], masks

    def _blocks(self, examples: list[Example], keep_rest: bool) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """All tokens one after the other in rows of `sequence_length`: columns, and the offsets of the rows [R + 1]."""
        length = self.config.sequence_length
        ids = np.concatenate([example[0] for example in examples]) if examples else np.empty(0, dtype=np.int32)
        labels, rest = ids, len(ids) % length
        if rest and keep_rest:
            pad = self.eos if self.tokenizer.pad_token_id is None else self.tokenizer.pad_token_id
            labels = np.pad(ids, (0, length - rest), constant_values=IGNORED)
            ids = np.pad(ids, (0, length - rest), constant_values=pad)
        elif rest:
            ids = labels = ids[:-rest]
        return {"input_ids": ids, "labels": labels}, np.arange(0, len(ids) + 1, length)

    def _whole(self, examples: list[Example]) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """Every document in rows of its own, or as many whole ones as fit next to each other: columns and offsets."""
        length, pack = self.config.sequence_length, self.config.pack
        if not examples:
            return {}, np.zeros(1, dtype=np.int64)
        ids, labels = (np.concatenate([example[i] for example in examples]) for i in (0, 1))
        ends = np.cumsum([len(example[0]) for example in examples])
        starts = np.concatenate([[0], ends[:-1]])
        columns = {"input_ids": ids, "labels": labels}
        if not pack:
            # Only plain text can be longer than a row.
            offsets = [row for start, end in zip(starts, ends, strict=True) for row in range(start, end, length)]
            return columns, np.array([*offsets, ends[-1]])
        # What stands before an example in its row belongs to another one and must not predict its first token.
        labels[starts] = IGNORED
        columns["position_ids"] = (np.arange(len(ids)) - np.repeat(starts, ends - starts)).astype(np.int32)
        offsets = [0]
        for start, end in zip(starts.tolist(), ends.tolist(), strict=True):
            if end - offsets[-1] > length:
                offsets.append(start)
        return columns, np.array([*offsets, ends[-1]])


def _size(document: Any) -> int:
    return len(document.ids) if isinstance(document, Tokens) else len(json.dumps(document))


def _by_size(documents: Iterable[Any], counts: dict[str, int]) -> Iterator[list[Any]]:
    """Documents in lists of about `BATCH_CHARS`, which are counted when they are used."""
    batch: list[Any] = []
    chars = 0
    for document in documents:
        batch.append(document)
        chars += _size(document)
        if chars >= BATCH_CHARS:
            counts["documents"] += len(batch)
            yield batch
            batch, chars = [], 0
    if batch:
        counts["documents"] += len(batch)
        yield batch


def _pieces(text: str) -> Iterator[tuple[str, bool, bool]]:
    """A text in pieces of at most `PIECE_CHARS`, with whether each is the first and the last.

    Cuts are before the space in front of a word, where tokenisers of words cut as well; else after a line.
    """
    start = 0
    while len(text) - start > PIECE_CHARS:
        window = text[start : start + PIECE_CHARS]
        near_end = max(1, len(window) - 1000)
        gaps = [near_end + match.end() for match in WORD_GAP.finditer(window[near_end:])]
        cut = gaps[-1] if gaps else window.rfind("\n") + 1 or len(window)
        yield window[:cut], start == 0, False
        start += cut
    yield text[start:], start == 0, True


def to_dataset(columns: Mapping[str, np.ndarray], offsets: np.ndarray, fingerprint: str) -> datasets.Dataset:
    """A data set in torch format whose row i holds the values from `offsets[i]` to `offsets[i + 1]` of each column."""
    import datasets
    import pyarrow

    bounds = pyarrow.array(offsets.astype(np.int32))
    table = {name: pyarrow.ListArray.from_arrays(bounds, pyarrow.array(values)) for name, values in columns.items()}
    rows = datasets.Dataset(datasets.table.InMemoryTable(pyarrow.table(table)), fingerprint=fingerprint[:16])
    rows.set_format("torch")
    return rows
