"""Chats of any common shape as messages with `role` and `content`, as TRL and transformers document them.

Read are lists of messages, also as JSON text; ShareGPT's (`from` and `value`, with its roles of tools); lists of texts
in turn; content in parts. What a row says of its turns' training is kept as `weight` 0 at those that do not train.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from lte.data.files import as_text, parse_json

ROLES = ("system", "developer", "user", "assistant", "tool")
CALLS = ("function_call", "tool_call")
# What others call a role, ShareGPT's files above all.
SPEAKERS = {
    **dict.fromkeys(("human", "prompter"), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "bing", "bard", "bot", "ai", "model", *CALLS), "assistant"),
    **dict.fromkeys(("observation", "function", "function_response", "tool_response", "tool_result"), "tool"),
}
# Fields that say whether a message, or a whole row, trains.
MARKS = ("weight", "train", "training", "label", "loss")
# By which Axolotl's files say that stretches of a turn train.
STRETCHES = ("train_detail", "training_detail")
# What templates call the text in which a model reasons before it answers.
REASONING = ("reasoning_content", "reasoning", "thinking")
TEXT_PARTS = ("text", "input_text", "output_text")
PICTURES = ("image", "images", "video", "videos", "audio", "audios")
IMAGE_MARKS = ("<image>", "<video>", "<audio>")


class Chat(dict[str, Any]):
    """A chat as a document, which also knows where it is from.

    Attributes:
        origin: file and line or row, for messages.
    """

    __slots__ = ("origin",)
    origin: str


def read_messages(value: Any) -> list[dict[str, Any]]:
    """The messages of a chat, each with `role` and `content` or `tool_calls`, and nothing that is null at that level.

    Raises:
        ValueError: for anything that is no chat of text, saying which message.
    """
    value = _from_json(value, "[{")
    if isinstance(value, Mapping) or not isinstance(value, list | tuple):
        raise ValueError(f"messages must be a list, got {_shown(value)}")
    turns = [_from_json(each, "{") for each in value]
    # A text in turn may be JSON, too.
    speaks = [isinstance(turn, Mapping) and bool({"role", "from"} & set(turn)) for turn in turns]
    turns = [turn if spoken else given for turn, spoken, given in zip(turns, speaks, value, strict=True)]
    if turns and all(isinstance(each, str) for each in turns):
        turns = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]
    found = []
    for number, turn in enumerate(turns, 1):
        try:
            found.append(_message(turn))
        except ValueError as error:
            raise ValueError(f"message {number} of {len(turns)}: {error}") from None
    return found


def read_tools(value: Any) -> list[Any]:
    """The tools of a chat, a list of JSON schemas that may be JSON text.

    Raises:
        ValueError: for anything else.
    """
    tools = _from_json(value, "[{")
    if isinstance(tools, str) and not tools.strip():
        return []
    tools = [tools] if isinstance(tools, Mapping) else tools
    if not isinstance(tools, list):
        raise ValueError(f"tools must be a list of objects, got {_shown(tools)}")
    tools = [_from_json(tool, "{") for tool in tools]
    for tool in tools:
        if not isinstance(tool, Mapping):
            raise ValueError(f"tools must be a list of objects, got one that is {_shown(tool)}")
    # ShareGPT's files and OpenAI's `functions` have the function alone, templates look for it in `function`.
    alone = [isinstance(tool.get("name"), str) and not {"type", "function"} & set(tool) for tool in tools]
    return [{"type": "function", "function": tool} if bare else tool for tool, bare in zip(tools, alone, strict=True)]


def trains(fields: Mapping[str, Any]) -> bool:
    """Whether a message may train by what its `MARKS` say, of which each is 0 or 1, true or false.

    Raises:
        ValueError: for a weight between them.
    """
    return all(_mark(fields, name) in (None, True) for name in MARKS)


def _mark(fields: Mapping[str, Any], name: str) -> bool | None:
    """What a mark says; `None` where there is none, or a label of another meaning."""
    text = str(fields.get(name)).strip().lower()
    if text in ("1", "1.0", "true", "0", "0.0", "false"):
        return text in ("1", "1.0", "true")
    if fields.get(name) is not None and name == "weight":
        raise ValueError(f"weight must be 0 or 1, got weight={fields[name]!r}; a turn trains or does not")
    return None


def check_no_image(text: str) -> None:
    """Raises a `ValueError` for a text that begins or ends with the mark of a picture."""
    for mark in IMAGE_MARKS:
        if text.strip().startswith(mark) or text.strip().endswith(mark):
            raise ValueError(f"content must be text, got the mark {mark}; lte trains on text alone, so leave it out")


def _message(turn: Any) -> dict[str, Any]:
    if not isinstance(turn, Mapping):
        raise ValueError(f"it must be an object with role and content, got {_shown(turn)}")
    pictures = [name for name in PICTURES if turn.get(name)]
    if pictures:
        raise ValueError(f"it must be text, got {pictures[0]}; lte trains on text alone")
    stretches = next((name for name in STRETCHES if turn.get(name)), None)
    if stretches:
        raise ValueError(f"a turn must train as a whole or not at all, got {stretches}; say weight 0 or 1, or drop it")
    marks = [name for name in MARKS if _mark(turn, name) is not None]
    message = {name: value for name, value in turn.items() if value is not None and name not in marks}
    role = message.pop("role", None) or message.get("from")
    if not isinstance(role, str) or not role:
        raise ValueError(f"it must have role and content (or from and value), got {', '.join(map(str, turn))}")
    if "from" in message and turn.get("role") is None:
        del message["from"]
    content = message.pop("content", None)
    content = message.pop("value", None) if content is None else content
    name = role.strip().lower()
    known = name if name in ROLES else SPEAKERS.get(name, role)
    found: dict[str, Any] = {"role": known}
    calls = message.pop("tool_calls", None) or message.pop("function_call", None)
    if name in CALLS and calls is None:
        calls, content = content, None
    if known == "tool" and isinstance(content, Mapping | list) and not _in_parts(content):
        # What a tool returned, as the text that a model reads.
        content = json.dumps(content, ensure_ascii=False)
    if content is not None:
        text, reasoning = _content(content)
        found["content"] = text
        if reasoning:
            found["reasoning_content"] = reasoning
    if calls:
        found["tool_calls"] = _calls(calls)
    elif content is None and not any(message.get(name) for name in REASONING):
        raise ValueError(f"it must have role and content, got {', '.join(map(str, turn))} with nothing in content")
    for name in REASONING:
        if name in message:
            message[name] = as_text(message[name], name)
    found |= message
    if not trains(turn) and known == "assistant":
        found["weight"] = 0
    return found


def _in_parts(content: Any) -> bool:
    parts = content if isinstance(content, list) else [content]
    return all(isinstance(part, str) or (isinstance(part, Mapping) and "type" in part) for part in parts)


def _content(content: Any) -> tuple[str, str]:
    """Text and reasoning of a message; the texts of its parts follow each other as templates write them."""
    parts = content if isinstance(content, list | tuple) else [content]
    text: list[str] = []
    reasoning: list[str] = []
    for part in parts:
        if not isinstance(part, Mapping):
            text.append(as_text(part, "content") or "")
            continue
        kind = part.get("type") or "text"
        wanted = text if kind in TEXT_PARTS else reasoning if kind in (*REASONING, "think") else None
        if wanted is None:
            raise ValueError(f"content must be text, got a part of type {kind}; lte trains on text alone")
        keys = (str(kind), "text", "value", "content")
        value = next((part[key] for key in keys if part.get(key) is not None), None)
        if value is None:
            raise ValueError(f"a part of content must have type and text, got {', '.join(map(str, part))}")
        wanted.append(as_text(value, "content") or "")
    found = "".join(text)
    check_no_image(found)
    return found, "".join(reasoning)


def _calls(value: Any) -> list[dict[str, Any]]:
    """Tool calls as templates take them: a list of objects whose `function` has a name, and arguments as an object."""
    calls = _from_json(value, "[{")
    calls = [calls] if isinstance(calls, Mapping) else calls
    if not isinstance(calls, list):
        raise ValueError(f"tool_calls must be a list of objects, got {_shown(calls)}")
    found = []
    for each in calls:
        call = _from_json(each, "{")
        outer = {name: value for name, value in call.items() if value is not None} if isinstance(call, Mapping) else {}
        function = outer.get("function", outer)
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise ValueError(f"tool_calls must have a function with a name, got {_shown(call)}")
        if "function" not in outer:
            outer = {"type": "function"}
        # As text, which APIs give, templates would put the arguments into quotation marks.
        arguments = _from_json(function.get("arguments", {}), "{")
        found.append({**outer, "function": {**function, "arguments": arguments}})
    return found


def _from_json(value: Any, first: str) -> Any:
    """What a JSON text that begins with one of the characters `first` holds; anything else as it is."""
    if not isinstance(value, str) or not value.strip() or value.strip()[0] not in first:
        return value
    try:
        return parse_json(value)
    except ValueError:
        return value


def _shown(value: Any) -> str:
    return "null" if value is None else f"{value!r:.60}"
