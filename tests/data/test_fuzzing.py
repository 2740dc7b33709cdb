"""What was written is what is read, whatever it is; and whatever a file holds, nothing but a sentence is raised."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lte.data.chat_writer import ChatWriter
from lte.data.config import DataConfig, read_documents
from tests.data.text_samples import TEMPLATE

# Any text but halves of surrogate pairs, which are refused.
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12).filter(str.strip)
# The same with what is special in the formats.
MARKS = st.text(st.sampled_from(list("a1 ,;\t\"'\\\n\r{}[]:\ufeff\u2028\x85é")), min_size=1, max_size=12).filter(
    str.strip
)
WORDS = TEXTS | MARKS
SCALARS = WORDS | st.none() | st.booleans() | st.integers() | st.floats()
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=3))
FUZZ = settings(
    max_examples=150,
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def read(path: Path, content: str | bytes, **options: Any) -> list[Any]:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return list(read_documents(str(path), DataConfig(**options)))


def read_or_sentence(path: Path, content: bytes, **options: Any) -> list[Any] | None:
    """The documents, or `None` where a sentence with the file was raised."""
    try:
        return read(path, content, **options)
    except ValueError as error:
        found = error
    assert type(found) is ValueError
    assert str(path) in str(found)
    assert " must " in str(found) or ", line " in str(found) or ", row " in str(found)
    return None


@FUZZ
@given(texts=st.lists(WORDS, min_size=1, max_size=5), extra=VALUES, as_list=st.booleans(), plain=st.booleans())
def test_json_texts_are_what_was_written(tmp_path, texts, extra, as_list, plain):
    rows = [{"text": text, "n": extra} for text in texts]
    lines = [json.dumps(row, ensure_ascii=plain) for row in rows]
    content = json.dumps(rows, ensure_ascii=plain) if as_list else "\n".join(lines)
    if not plain and "\0" in content:
        return
    assert read(tmp_path / "x.json", content) == texts


@FUZZ
@given(
    rows=st.lists(st.tuples(MARKS | TEXTS, WORDS, WORDS), min_size=1, max_size=4),
    extra=st.booleans(),
    mark=st.sampled_from(",;\t"),
)
def test_tables_are_what_was_written(tmp_path, rows, extra, mark):
    if any("\0" in value for row in rows for value in row):
        return
    file = io.StringIO(newline="")
    writer = csv.writer(file, delimiter=mark, quoting=csv.QUOTE_ALL, lineterminator="\r\n")
    writer.writerows([["note", "prompt", "completion"], *(row + ("",) * extra for row in rows)])
    found = read(tmp_path / "x.csv", file.getvalue())
    assert [(row["prompt"], row["completion"]) for row in found] == [row[1:] for row in rows]


@FUZZ
@given(text=TEXTS | MARKS)
def test_a_text_is_what_was_written(tmp_path, text):
    if "\0" not in text:
        wanted = text.replace("\r\n", "\n").replace("\r", "\n").removeprefix("\ufeff")
        assert read_or_sentence(tmp_path / "x.txt", text.encode()) in (
            [wanted],
            None if not wanted.strip() else [wanted],
        )


@FUZZ
@given(
    turns=st.lists(st.tuples(st.sampled_from(["user", "assistant", "system", "tool"]), WORDS), min_size=1, max_size=5),
    shape=st.sampled_from(["messages", "parts", "json", "sharegpt"]),
)
def test_chats_are_what_was_written(tmp_path, tokenizer, turns, shape):
    names = {"user": "human", "assistant": "gpt", "system": "system", "tool": "observation"}
    messages: Any = [{"role": role, "content": text} for role, text in turns]
    if shape == "parts":
        messages = [{"role": role, "content": [{"type": "text", "text": c} for c in text]} for role, text in turns]
    if shape == "sharegpt":
        messages = [{"from": names[role], "value": text} for role, text in turns]
    row = {"messages": json.dumps(messages) if shape == "json" else messages}
    (chat,) = read(tmp_path / "x.jsonl", json.dumps(row))
    assert [(message["role"], message["content"]) for message in chat["messages"]] == turns
    tokenizer.chat_template = TEMPLATE
    whole, spans = ChatWriter(tokenizer, "messages").spans(chat)
    assert whole == "".join(f"{role} : {text} END " for role, text in turns)
    assert [whole[start:end] for start, end in spans] == [f"{text} END " for role, text in turns if role == "assistant"]


@FUZZ
@given(
    content=st.binary(max_size=60) | TEXTS.map(str.encode),
    name=st.sampled_from(
        ["jsonl", "json", "csv", "tsv", "txt", "parquet", "jsonl.gz", "csv.zst", "txt.xz", "json.bz2"]
    ),
)
def test_no_bytes_are_a_traceback(tmp_path, content, name):
    read_or_sentence(tmp_path / f"x.{name}", content)


COLUMNS = ["text", "prompt", "completion", "messages", "conversations", "instruction", "input", "output", "input_ids"]
COLUMNS += [
    "labels",
    "system",
    "tools",
    "history",
    "label",
    "weight",
    "attention_mask",
    "chat_template_kwargs",
    "image",
]
KEYS = st.sampled_from(
    ["role", "from", "content", "value", "tool_calls", "function", "name", "arguments", "type", "text"]
)
CHATTY = st.sampled_from(["user", "human", "assistant", "gpt", "tool", "function_call", "image", "reasoning"]) | SCALARS
MESSAGE = st.dictionaries(
    KEYS, st.recursive(CHATTY, lambda i: st.lists(i, max_size=2) | st.dictionaries(KEYS, i, max_size=3)), max_size=4
)


@settings(FUZZ, max_examples=200)
@given(
    rows=st.lists(
        st.dictionaries(st.sampled_from(COLUMNS), VALUES | MESSAGE | st.lists(MESSAGE, max_size=3), max_size=5),
        min_size=1,
        max_size=3,
    ),
    kind=st.sampled_from(["auto", "text", "completion", "chat", "tokens"]),
)
def test_no_row_is_a_traceback(tmp_path, tokenizer, rows, kind):
    documents = read_or_sentence(tmp_path / "x.jsonl", json.dumps(rows).encode(), kind=kind)
    tokenizer.chat_template = TEMPLATE
    for document in documents or []:
        if isinstance(document, dict) and "messages" in document:
            said = "x.jsonl, line 1"
            try:
                ChatWriter(tokenizer, "messages").spans(document)
            except ValueError as error:
                said = str(error)
            assert "x.jsonl, line 1" in said


@pytest.mark.parametrize("damage", range(12))
def test_a_chat_with_any_field_of_another_type_is_a_sentence(tmp_path, damage):
    """Every field of a chat with tools, one after the other, as each other type."""
    wrong: Any = [None, 3, 1.5, True, "x", [], {}, [None], {"a": None}, ["x", 1], "{", "[1]"][damage]
    call = {"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}
    whole = {
        "messages": [{"role": "user", "content": "q"}, {"role": "assistant", "tool_calls": [call]}],
        "tools": [{"a": 1}],
    }

    def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
        items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        return [place for key, each in items for place in [(*path, key), *places(each, (*path, key))]]

    assert len(places(whole)) == 16
    for place in places(whole):
        row = json.loads(json.dumps(whole))
        inner = row
        for key in place[:-1]:
            inner = inner[key]
        inner[place[-1]] = wrong
        read_or_sentence(tmp_path / "x.jsonl", json.dumps(row).encode(), kind="chat")
