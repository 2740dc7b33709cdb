"""Chats of every shape: what the template gets, what trains, and what is said of chats that cannot be written."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from lte.data.chat_writer import ChatWriter
from lte.data.chats import read_messages, read_tools
from lte.data.config import DataConfig, read_documents
from tests.data.text_samples import TAGGED, TEMPLATE, labelled, load, write_jsonl

USER, SAID = {"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2"}
CALL = {"type": "function", "function": {"name": "f", "arguments": {"city": "Bern"}}}
# Writes whatever a message has.
WHOLE = (
    "{{ tools | tojson if tools else '' }}{% for m in messages %}<{{ m.role }}>{{ m.reasoning_content or '' }}|"
    "{{ m.content or '' }}{% for t in m.tool_calls or [] %}{{ t.function.name }}({{ t.function.arguments | tojson }})"
    "{% endfor %}{% endfor %}"
)


def chats(path: Path, *rows: dict[str, Any], **options: Any) -> list[Any]:
    return list(read_documents(write_jsonl(path, list(rows)), DataConfig(**options)))


def written(tokenizer: Any, chat: dict[str, Any], template: str = WHOLE) -> str:
    tokenizer.chat_template = template
    return ChatWriter(tokenizer, "messages").spans(chat)[0]


class TestMessages:
    @pytest.mark.parametrize(
        "given",
        [
            [USER, SAID],
            json.dumps([USER, SAID]),
            [json.dumps(USER), json.dumps(SAID)],
            ["w1", "w2"],
            [{"from": "human", "value": "w1"}, {"from": "gpt", "value": "w2"}],
            [{"role": "human", "content": "w1"}, {"role": "Model", "content": "w2", "name": None}],
            [{"role": "user", "content": [{"type": "text", "text": "w1", "image": None}]}, SAID],
            [{"role": "user", "content": [{"type": "text", "value": "w"}, "1"]}, SAID],
            [{"role": "user", "content": {"text": "w1"}}, {**SAID, "weight": 1, "train": True, "loss": "true"}],
        ],
    )
    def test_all_shapes_are_the_same_messages(self, given):
        assert read_messages(given) == [USER, SAID]

    def test_shapes_of_tools(self):
        wanted = [{"role": "assistant", "tool_calls": [CALL]}, {"role": "tool", "content": "3"}]
        function = CALL["function"]
        as_text = json.dumps(function["arguments"])
        for calls in (
            {"from": "function_call", "value": json.dumps(function)},
            {"role": "assistant", "content": None, "tool_calls": json.dumps([CALL])},
            {"role": "assistant", "tool_calls": [function]},
            {"role": "assistant", "function_call": {"name": "f", "arguments": as_text}},
            {"role": "assistant", "tool_calls": [{**CALL, "function": {"name": "f", "arguments": as_text}}]},
        ):
            assert read_messages([calls, {"from": "observation", "value": "3"}]) == wanted
        found = read_messages([{"role": "tool", "content": {"degrees": 3}}, {"role": "function", "content": ["a", 1]}])
        assert [message["content"] for message in found] == ['{"degrees": 3}', '["a", 1]']
        wrapped = [{"type": "function", "function": {"name": "f"}}]
        assert read_tools(json.dumps([{"name": "f"}])) == read_tools([json.dumps({"name": "f"})]) == wrapped

    def test_reasoning_is_apart_from_the_answer(self):
        parts = [{"type": "reasoning", "value": "so"}, {"type": "text", "value": "w2"}]
        assert read_messages([{"role": "assistant", "content": parts}]) == [{**SAID, "reasoning_content": "so"}]
        # null that is written in the arguments of a call is an argument.
        call = {"function": {"name": "f", "arguments": {"city": None}}}
        assert read_messages([{"role": "assistant", "tool_calls": [call]}])[0]["tool_calls"] == [call]

    @pytest.mark.parametrize(
        ("given", "message"),
        [
            ([USER, None], "message 2 of 2: it must be an object with role and content, got null"),
            ([{"role": "user", "content": None}], "message 1 of 1: it must have role and content, .* with nothing in"),
            ([{"content": "a"}], "it must have role and content .*, got content"),
            ("a question", "messages must be a list, got 'a question'"),
            ({"role": "user"}, "messages must be a list, got {'role'"),
            ([{"role": "user", "content": [{"type": "image", "image": "x.png"}]}], "got a part of type image"),
            ([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}], "got a part of type image_url"),
            ([{"role": "user", "content": "<image>\nWhat?"}], "got the mark <image>"),
            ([{"role": "user", "content": "What?", "images": ["x.png"]}], "it must be text, got images"),
            ([{"role": "user", "content": [{"type": "text"}]}], "a part of content must have type and text, got type"),
            ([{"role": "assistant", "tool_calls": ["f"]}], "tool_calls must have a function with a name, got 'f'"),
            ([{"role": "assistant", "tool_calls": "f"}], "tool_calls must be a list of objects, got 'f'"),
            ([{**SAID, "weight": 0.5}], "weight must be 0 or 1, got weight=0.5"),
            ([{"role": "user", "content": "\ud800"}], "half a surrogate pair"),
        ],
    )
    def test_what_is_no_chat_of_text_is_refused(self, given, message):
        with pytest.raises(ValueError, match=message):
            read_messages(given)

    def test_pictures_and_tools_of_a_row(self, tmp_path):
        with pytest.raises(ValueError, match=r"x.jsonl, line 2: rows must be text alone, got images"):
            chats(tmp_path / "x.jsonl", {"messages": [USER, SAID], "images": []}, {"messages": [USER], "images": ["x"]})
        with pytest.raises(ValueError, match="line 1: tools must be a list of objects, got one that is 'f'"):
            chats(tmp_path / "x.jsonl", {"messages": [USER, SAID], "tools": ["f"]})


class TestRows:
    def test_sharegpt_is_a_chat_without_being_told(self, tmp_path, tokenizer):
        turns = [{"from": "human", "value": "w1"}, {"from": "gpt", "value": "w2"}]
        rows = [{"conversations": turns, "system": f"w{i}", "id": i} for i in range(10, 14)]
        found = load(tokenizer, train=write_jsonl(tmp_path / "x.jsonl", rows), pack=False)
        assert tokenizer.decode(found.train[0]["input_ids"]).endswith("END user : w1 END assistant : w2 END")
        assert tokenizer.decode(labelled(found.train)) == "w2 END w2 END w2 END"
        line = "4 documents of kind chat (messages from conversations, system message from system); not used: id; "
        assert line in found.announcements[0]
        assert found.announcements[0].endswith("END user : w1 END assistant :[[ w2 END]]")

    def test_marks_keep_turns_and_rows_from_training(self, tmp_path, tokenizer):
        marked = [USER, {**SAID, "weight": 0}, USER, {"role": "assistant", "content": "w3"}]
        rows = [{"messages": marked}] * 2 + [{"messages": [USER, SAID], "label": False, "n": 1}]
        path = write_jsonl(tmp_path / "x.jsonl", [*rows, {"messages": [USER, {**SAID, "train": False}], "n": 2}])
        for template in (TEMPLATE, TAGGED):
            tokenizer.chat_template = template
            with pytest.warns(UserWarning, match="unlabelled documents"):
                found = load(tokenizer, train=path, validation=write_jsonl(tmp_path / "v.jsonl", rows[:1]), pack=False)
            assert tokenizer.decode(labelled(found.train)) == "w3 END w3 END"
            assert "left out: 1 rows marked label=False" in found.announcements[0]

    def test_no_label_at_all_is_said(self, tmp_path, tokenizer):
        path = write_jsonl(tmp_path / "x.jsonl", [{"messages": [USER, {**SAID, "label": False}], "n": i} for i in "ab"])
        with pytest.raises(ValueError, match="train data must hold labels to train on, got 2 documents without any"):
            load(tokenizer, train=path, validation=path, kind="chat")

    def test_prompts_and_completions_of_messages_are_chats(self, tmp_path, tokenizer):
        rows = [
            {"prompt": [USER, SAID, USER], "completion": [{"role": "assistant", "content": f"w{i}"}]} for i in (3, 4)
        ]
        path = write_jsonl(tmp_path / "x.jsonl", rows)
        found = load(tokenizer, train=path, validation=path, pack=False)
        assert sorted(tokenizer.decode(labelled([row])) for row in found.train) == ["w3 END", "w4 END"]

    def test_arguments_of_other_tools_are_not_added(self, tmp_path, tokenizer):
        def row(**arguments: Any) -> dict[str, Any]:
            call = {"type": "function", "function": {"name": "f", "arguments": arguments}}
            return {"messages": [USER, {"role": "assistant", "content": None, "tool_calls": [call]}]}

        rows = [row(city="Bern"), row(zone="CET", n=1)]
        path = tmp_path / "x.parquet"
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        for found in (read_documents(str(path), DataConfig()), chats(tmp_path / "x.jsonl", *rows)):
            texts = [written(tokenizer, chat) for chat in found]
            assert texts == [
                '<user>|w1<assistant>|f({"city": "Bern"})',
                '<user>|w1<assistant>|f({"zone": "CET", "n": 1})',
            ]


class TestTemplate:
    def test_gets_tools_reasoning_and_options(self, tmp_path, tokenizer):
        said = {**SAID, "thinking": "so "}
        row = {"messages": [USER, said], "tools": '[{"name": "f"}]', "chat_template_kwargs": {"mood": "calm"}}
        (chat,) = chats(tmp_path / "x.jsonl", row)
        tools = '[{"type": "function", "function": {"name": "f"}}]'
        assert written(tokenizer, chat, "{{ mood }}" + WHOLE) == f"calm{tools}<user>|w1<assistant>so |w2"

    def test_says_what_it_does_not_write(self, tokenizer):
        chat = {"messages": [USER, {**SAID, "reasoning": "so"}], "tools": [{"name": "f"}]}
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            assert written(tokenizer, chat, TEMPLATE) == "user : w1 END assistant : w2 END "
        assert {str(warning.message).split(",")[0] for warning in told} == {
            "the chat template writes no tools",
            "the chat template writes no reasoning",
        }
        with pytest.raises(
            ValueError, match=r"template must write tool_calls, got one without, .* \(the chat that begins"
        ):
            written(tokenizer, {"messages": [USER, {"role": "assistant", "tool_calls": [CALL]}]}, TEMPLATE)

    def test_takes_content_in_parts_where_it_knows_no_other(self, tokenizer):
        parts = "{% for m in messages %}{{ m.role }}:{% for p in m.content %}{{ p.text }}{% endfor %} {% endfor %}"
        assert written(tokenizer, {"messages": [USER, SAID]}, parts) == "user:w1 assistant:w2 "

    def test_roles_are_those_it_knows(self, tokenizer):
        chat = {"messages": [{"role": "critic", "content": "w3"}, SAID]}
        with pytest.raises(
            ValueError, match=r"role must be one of system, .* got role='critic' in the chat that begins"
        ):
            written(tokenizer, chat)
        known = "{% if messages[0].role == 'critic' %}Critic: {{ messages[0].content }}{% endif %}"
        assert written(tokenizer, chat, known + "{{ messages[1].content if messages[1] else '' }}") == "Critic: w3w2"

    @pytest.mark.parametrize(
        ("template", "message"),
        [
            ("{{ raise_exception('no system role') }}", r"got TemplateError for .*x.jsonl, line [123]: no system role"),
            ("{% for m in messages %}{{ m.role + m.name }}{% endfor %}", "got UndefinedError for .* line .*'name'"),
            ("{{ messages[0].content + 1 }}", "got TypeError for .*x.jsonl, line"),
            ("{% for m in messages %}{{ m.role }", "the chat template must be Jinja, got unexpected '}' in its line 1"),
        ],
    )
    def test_a_fault_of_it_says_in_which_chat(self, tmp_path, tokenizer, template, message):
        path = write_jsonl(tmp_path / "x.jsonl", [{"messages": [USER, SAID], "n": i} for i in range(3)])
        tokenizer.chat_template = template
        with pytest.raises(ValueError, match=message):
            load(tokenizer, train=path, validation=path)


def test_functions_alone_are_tools_and_marks_of_other_tools_count(tmp_path: Path) -> None:
    function, pair = {"name": "f", "parameters": {}}, {"messages": [USER, SAID]}
    marked = {**pair, "kto_tag": False}
    (found,) = chats(tmp_path / "functions.jsonl", {**pair, "functions": [function]}, marked)
    assert found["tools"] == [{"type": "function", "function": function}]
    assert read_tools([CALL]) == [CALL]
    with pytest.raises(ValueError, match=r"message 1 of 1: a turn must train as a whole .* got train_detail"):
        read_messages([{**SAID, "train_detail": [{"begin_offset": 0, "end_offset": 1, "train": False}]}])
