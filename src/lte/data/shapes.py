"""Which columns of a table are used, and how: rows become documents.

A document is a text; a dict with prompt and completion; a `Chat`; or `Tokens`.
"""

from __future__ import annotations

import string
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any

from lte.config import IGNORED
from lte.data.chats import PICTURES, Chat, check_no_image, read_messages, read_tools
from lte.data.files import Repeated, Row, Table, as_text, parse_json

if TYPE_CHECKING:
    import numpy as np

    from lte.data.config import DataConfig

TEXT_FIELDS = ("text", "content", "document", "body", "article", "story", "completion")
PREFERENCES = ("chosen", "rejected")
CONVERSATIONS = ("conversations", "conversation")
INSTRUCTION, INPUT, OUTPUT, SYSTEM, HISTORY = "instruction", "input", "output", "system", "history"
# `functions` is the older name of tools at OpenAI.
TOOLS, FUNCTIONS, TEMPLATE_OPTIONS = "tools", "functions", "chat_template_kwargs"
BESIDE_MESSAGES = {TOOLS: "tools", FUNCTIONS: "tools", TEMPLATE_OPTIONS: "options of the template"}
IDS, LABELS, ATTENTION, POSITIONS = "input_ids", "labels", "attention_mask", "position_ids"
# Which tokens train, as TRL and others have it.
TOKEN_MASKS = ("completion_mask", "assistant_masks", "assistant_mask", "loss_mask")
# By which a row as a whole says that it does not train: the rejected ones of TRL's unpaired preferences, say.
ROW_MARKS = ("label", "kto_tag", "train", "weight")


class Tokens:
    """A row that is tokenised already.

    Attributes:
        ids: int32 [T].
        labels: int32 [T], -100 where nothing trains.
    """

    __slots__ = ("ids", "labels")

    def __init__(self, ids: np.ndarray, labels: np.ndarray):
        self.ids, self.labels = ids, labels


@dataclass
class Shape:
    """How rows become documents.

    Attributes:
        columns: those that are used, with what for; those that only some rows have included.
        make: the document of a row, `None` if it holds none.
        checks: columns that are only looked at, to refuse pictures and leave out rows that are not to train.
    """

    columns: dict[str, str]
    make: Callable[[Row], Any]
    checks: tuple[str, ...] = ()


@dataclass
class Columns:
    """What was used of one or several tables, and what was not.

    Attributes:
        used: columns, with what for.
        unused: columns.
        left_out: number of rows by the reason.
    """

    used: dict[str, str] = field(default_factory=dict)
    unused: set[str] = field(default_factory=set)
    left_out: dict[str, int] = field(default_factory=dict)


def documents_of(table: Table, config: DataConfig, found: Columns) -> Iterator[Any]:
    """The documents in a table, as they are read; `found` gets what was used for them.

    Raises:
        ValueError: for a table without the columns, or a row that cannot be read, with its line or number.
    """
    if not table.columns:
        return
    shape = find_shape(table, config)
    seen = set(table.columns)
    for number, row in table.read({*shape.columns, *shape.checks}):
        seen |= row.keys()
        try:
            mark = _untrained_by(row, shape.checks)
            document = None if mark else shape.make(row)
        except ValueError as error:
            raise ValueError(f"{table.name}, {table.unit} {number}: {error}") from None
        if document is None:
            reason = f"marked {mark}={row[mark]}" if mark else f"without {next(iter(shape.columns))}"
            found.used |= {mark: "which rows train"} if mark else {}
            found.left_out[reason] = found.left_out.get(reason, 0) + 1
            continue
        if isinstance(document, Chat):
            document.origin = f"{table.name}, {table.unit} {number}"
        yield document
    found.used |= {name: use for name, use in shape.columns.items() if name in seen}
    found.unused = (found.unused | seen) - found.used.keys()


def find_shape(table: Table, config: DataConfig) -> Shape:
    """The shape of a table for `config.kind`, or for `auto` that which its columns have.

    Raises:
        ValueError: if it has not the columns.
    """
    has = set(table.columns)
    prompt = _first(has, config.prompt_field, INSTRUCTION if config.prompt_field == "prompt" else "")
    completion = _first(has, config.completion_field, OUTPUT if config.completion_field == "completion" else "")
    chat = _first(has, config.messages_field, *CONVERSATIONS)
    kind: str = config.kind
    if kind == "auto":
        there = {"text": config.text_field in has, "chat": chat, "completion": prompt and completion}
        there["tokens"] = IDS in has
        kind = "completion" if config.prompt_template else next((name for name in there if there[name]), "text")
    if kind == "text" and config.text_field in has:
        return Shape({config.text_field: "text"}, lambda row: _filled(_text(row, config.text_field)))
    if kind == "tokens" and IDS in has:
        labels = dict.fromkeys((LABELS, ATTENTION, *TOKEN_MASKS), "which of them train")
        return Shape({IDS: "tokens", **labels}, _tokens, (POSITIONS,))
    if kind == "chat" and chat:
        return _conversation(config, chat)
    if kind == "completion" and completion and config.prompt_template:
        return _templated(config, completion, table)
    if kind in ("completion", "chat") and prompt and completion:
        return _pair(config, prompt, completion, kind)
    raise ValueError(_lacking(table, config, kind))


def template_parts(template: str) -> list[tuple[str, str | None]]:
    """The parts of a prompt template, each a text and the column after it; `\\n` and `\\t` may be spelled out.

    Raises:
        ValueError: for braces that are no `{column}`, or a template without any.
    """
    try:
        parts = list(string.Formatter().parse(template.replace("\\n", "\n").replace("\\t", "\t")))
    except ValueError as error:
        raise ValueError(f"prompt_template must have columns as {{column}}, got {template!r}: {error}") from None
    odd = any(name == "" or spec or conversion for _, name, spec, conversion in parts)
    if odd or not any(name for _, name, _, _ in parts):
        raise ValueError(
            "prompt_template must have columns as {column}, and {{ and }} for braces, got "
            f"prompt_template={template!r}"
        )
    return [(text, name) for text, name, _, _ in parts]


# The shapes.


def _pair(config: DataConfig, prompt: str, completion: str, kind: str) -> Shape:
    """A prompt and its completion, or with an instruction Alpaca's; lists of messages and `kind` chat make a chat."""
    alpaca = prompt == INSTRUCTION
    extra = {INPUT: "prompt"} if alpaca else {}
    chats = {SYSTEM: "system message", HISTORY: "turns before", **BESIDE_MESSAGES}

    def make(row: Row) -> Any:
        question, answer = _value(row, prompt), _value(row, completion)
        # 0 and false are answers.
        if answer is None or answer in ("", []):
            return None
        if isinstance(question, list | tuple) or isinstance(answer, list | tuple):
            if not (isinstance(question, list | tuple) and isinstance(answer, list | tuple)):
                raise ValueError(f"{prompt} and {completion} must both be text, or both lists of messages")
            asked = [_untrained(message) for message in read_messages(question)]
            return _chat(config, row, [*asked, *read_messages(answer)])
        question, answer = _text(row, prompt) or "", str(_text(row, completion))
        given = _text(row, INPUT) if alpaca else None
        if kind == "chat":
            return _chat(config, row, _turns(row, f"{question}\n\n{given}" if given else question, answer))
        check_no_image(question)
        for name in (SYSTEM, HISTORY) if alpaca else ():
            if _value(row, name):
                raise ValueError(f"kind must be chat for rows with {name}, got kind=completion; say kind=chat")
        if alpaca:
            question += f"\n{given}\n" if given else "\n"
        return {config.prompt_field: question, config.completion_field: answer}

    used = {completion: "completion", prompt: "prompt", **extra}
    return Shape({**used, **chats} if kind == "chat" or alpaca else used, make, (*ROW_MARKS, *PICTURES))


def _templated(config: DataConfig, completion: str, table: Table) -> Shape:
    parts = template_parts(str(config.prompt_template))
    names = [name for _, name in parts if name]
    for name in names:
        if name not in table.columns:
            raise ValueError(
                f"prompt_template must name columns of the data, got {{{name}}} where {table.name} has "
                f"{', '.join(table.columns)}"
            )

    def make(row: Row) -> Any:
        answer = _text(row, completion)
        prompt = "".join(text + ((_text(row, name) or "") if name else "") for text, name in parts)
        check_no_image(prompt)
        return {config.prompt_field: prompt, config.completion_field: answer} if answer else None

    return Shape({completion: "completion", **dict.fromkeys(names, "prompt")}, make, (*ROW_MARKS, *PICTURES))


def _conversation(config: DataConfig, name: str) -> Shape:
    def make(row: Row) -> Any:
        value = _value(row, name)
        messages = read_messages(value) if value else []
        return _chat(config, row, messages) if messages else None

    used = {name: "messages", SYSTEM: "system message", **BESIDE_MESSAGES}
    return Shape(used, make, (*ROW_MARKS, *PICTURES))


def _turns(row: Row, question: str, answer: str) -> list[dict[str, Any]]:
    """A question and an answer after the pairs of the history."""
    before = [text for pair in _value(row, HISTORY) or [] for text in pair]
    texts = enumerate([*before, question, answer])
    return read_messages([{"role": ("user", "assistant")[i % 2], "content": text} for i, text in texts])


def _chat(config: DataConfig, row: Row, messages: list[dict[str, Any]]) -> Chat:
    """A chat with what its row says beside the messages."""
    system = _text(row, SYSTEM)
    if system and messages[0]["role"] not in ("system", "developer"):
        messages = [{"role": "system", "content": system}, *messages]
    tools, options = read_tools(_value(row, TOOLS) or _value(row, FUNCTIONS) or []), _value(row, TEMPLATE_OPTIONS) or {}
    options = parse_json(options) if isinstance(options, str) else options
    if not isinstance(options, Mapping):
        raise ValueError(f"{TEMPLATE_OPTIONS} must be an object, got {options!r:.60}")
    more = {TOOLS: tools, TEMPLATE_OPTIONS: options}
    return Chat({config.messages_field: messages, **{key: value for key, value in more.items() if value}})


def _untrained(message: dict[str, Any]) -> dict[str, Any]:
    return {**message, "weight": 0} if message["role"] == "assistant" else message


def _tokens(row: Row) -> Tokens | None:
    import numpy as np  # slow to load, and not needed by the settings

    ids = _ints(row, IDS)
    if ids is None or not len(ids):
        return None
    labels = _ints(row, LABELS)
    labels = ids if labels is None else labels
    columns = {name: _ints(row, name) for name in (ATTENTION, POSITIONS, *TOKEN_MASKS)}
    for name, values in {LABELS: labels, **columns}.items():
        if values is not None and len(values) != len(ids):
            raise ValueError(f"{name} must be as long as {IDS}, got {len(values)} values for {len(ids)} tokens")
    if ids.min() < 0 or ((labels < 0) & (labels != IGNORED)).any():
        raise ValueError(f"{IDS} must be at least 0, and {LABELS} too or {IGNORED}, got {min(ids.min(), labels.min())}")
    for name in TOKEN_MASKS:
        mask = columns[name]
        labels = labels if mask is None else np.where(mask != 0, labels, IGNORED)
    attended, positions = columns[ATTENTION], columns[POSITIONS]
    if attended is not None:
        kept = np.flatnonzero(attended)
        if len(kept) and kept[-1] - kept[0] + 1 != len(kept):
            raise ValueError(f"{ATTENTION} must be 0 at the ends of a row alone, got zeros between tokens")
        ids, labels = ids[kept], labels[kept]
        positions = positions if positions is None else positions[kept]
    if positions is not None and (np.diff(positions) != 1).any():
        raise ValueError(f"{POSITIONS} must count up through a row, got a packed row; give each document its own")
    return Tokens(ids.astype(np.int32), labels.astype(np.int32)) if len(ids) else None


# Values.


def _first(has: set[str], *names: str) -> str | None:
    return next((name for name in names if name in has), None)


def _value(row: Row, name: str) -> Any:
    if isinstance(row.get(name), Repeated):
        raise ValueError(f"the field {name!r} must be there once, got several columns of that name")
    return row.get(name)


def _text(row: Row, name: str) -> str | None:
    return as_text(row.get(name), f"the field {name!r}")


def _filled(text: str | None) -> str | None:
    return text if text and text.strip() else None


def _ints(row: Row, name: str) -> np.ndarray | None:
    value = _value(row, name)
    if isinstance(value, str):
        value = parse_json(value)
    if value is None:
        return None
    if not isinstance(value, list | tuple) or not all(type(each) is int and -(2**31) <= each < 2**31 for each in value):
        raise ValueError(f"{name} must be a list of whole numbers, got {value!r:.60}")
    import numpy as np

    return np.array(value, dtype=np.int64)


def _untrained_by(row: Row, checks: tuple[str, ...]) -> str | None:
    """The mark by which a row says that it does not train, `None` if none does.

    Raises:
        ValueError: for a row with pictures or sound.
    """
    for name in checks:
        value = row.get(name)
        if name in PICTURES and value:
            raise ValueError(f"rows must be text alone, got {name}; lte does not train on pictures or sound")
        text = str(value).strip().lower()
        if name in ROW_MARKS and (text == "false" or (name == "weight" and text in ("0", "0.0"))):
            return name
    return None


def _lacking(table: Table, config: DataConfig, kind: str) -> str:
    if set(PREFERENCES) <= set(table.columns):
        field = "completion_field" if config.prompt_field in table.columns else "messages_field"
        return (
            f"the data must have one answer for each prompt, got pairs with {' and '.join(PREFERENCES)}, which are "
            f"preferences; give {field}={PREFERENCES[0]} to train on the better answers alone, or train on pairs with "
            f"TRL's DPOTrainer and lte.RoutingMixin (docs/training.md) ({table.name})"
        )
    names = {"chat": config.messages_field, "completion": config.completion_field, "tokens": IDS}
    name = names.get(kind, config.text_field)
    if kind == "completion" and name in table.columns:
        name = config.prompt_field
    likely = _likely(table) if kind == "text" else ""
    shapes = "; or give messages, prompt and completion, instruction and output, or input_ids"
    shapes = shapes if config.kind in ("auto", "text") else ""
    return (
        f"the data must have a field {name!r} for kind={kind}, got the fields {', '.join(table.columns)}; name yours "
        f"with the matching *_field option{likely}{shapes} ({table.name})"
    )


def _likely(table: Table) -> str:
    """Which field probably holds the text: one of a usual name, or the one with the longest strings."""
    lengths: dict[str, int] = {}
    for _, row in islice(table.read(table.columns), 50):
        for name, value in row.items():
            if isinstance(value, str):
                lengths[name] = lengths.get(name, 0) + len(value)
    usual = [name for name in TEXT_FIELDS if name in lengths]
    best = usual[0] if usual else max(lengths, key=lambda name: lengths[name], default=None)
    return f", probably text_field={best}" if best else ""
