"""Chats as a tokenizer's template writes them, and which of that the assistant says."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from typing import Any

import jinja2
import numpy as np

from lte.data.chats import REASONING, ROLES
from lte.data.files import as_text

# The tags in a chat template around what the assistant says, and a private-use character that stands in for them.
GENERATION_TAG, MARK = re.compile(r"{%(-?)\s*(?:end)?generation\s*(-?)%}"), "\ue000"
PROBE = "\ue001"


class ChatWriter:
    """Writes chats by the template of a tokenizer.

    Args:
        tokenizer: with a chat template.
        field: of the messages in a chat.
    """

    def __init__(self, tokenizer: Any, field: str):
        self.tokenizer, self.field = tokenizer, field
        self.template: str = tokenizer.get_chat_template()
        # Not by return_assistant_tokens_mask: where a turn ends with a space that no token's offsets hold, its mask
        # goes on to the end of the chat (transformers 5.23).
        self.marked = GENERATION_TAG.sub(rf"{{%\1 if true %}}{MARK}{{% endif \2%}}", self.template)
        self.in_parts = self._takes_parts_alone()
        self.warned: set[str] = set()

    def spans(self, chat: Mapping[str, Any]) -> tuple[str, list[tuple[int, int]]]:
        """A chat as text, and from which character to which the assistant speaks in it and trains.

        Between the template's generation tags if it has them, else what each turn adds to the text before it.

        Raises:
            ValueError: for a chat that the template cannot write, saying which.
        """
        origin = getattr(chat, "origin", "") or f"the chat that begins {chat[self.field][:1]!s:.80}"
        options = {"tools": chat.get("tools"), **chat.get("chat_template_kwargs", {})}
        messages = [self._message(message, origin) for message in chat[self.field]]
        if options["tools"] and "tools" not in self.template:
            self._warn("the chat template writes no tools, so those of the data are not seen by the model")
        spoken = [i for i, message in enumerate(chat[self.field]) if message["role"] == "assistant"]
        trained = [chat[self.field][i].get("weight", 1) != 0 for i in spoken]

        def render(count: int, **more: Any) -> str:
            return self._render(messages[:count], origin, {**options, **more}) if count else ""

        whole = render(len(messages))
        as_text(whole, origin)
        parts = render(len(messages), chat_template=self.marked).split(MARK) if self.marked != self.template else []
        if len(parts) > 1 and "".join(parts) == whole:
            bounds = np.cumsum([len(part) for part in parts]).tolist()
            spans = list(zip(bounds[::2], bounds[1::2], strict=False))
            if all(trained):
                return whole, spans
            if len(spans) == len(spoken):
                return whole, [span for span, trains in zip(spans, trained, strict=True) if trains]
        spans = []
        for index in (i for i, trains in zip(spoken, trained, strict=True) if trains):
            before, after = render(index, add_generation_prompt=True), render(index + 1)
            if index == 0:
                # What opens an answer where nothing was said before: templates write no empty chats.
                opening = render(1, add_generation_prompt=True).removeprefix(after)
                before = after[: after.find(opening) + len(opening)] if opening in after else ""
            if not (whole.startswith(after) and after.startswith(before)):
                raise ValueError(
                    "the chat template must write the beginning of a chat as it writes it in the whole chat, got one "
                    f"that changes turn {index + 1} of {len(messages)}; mark the assistant's text in the template with "
                    f"{{% generation %}}, or give chats with one answer each ({origin})"
                )
            spans.append((len(before), len(after)))
        return whole, spans

    def _message(self, message: Mapping[str, Any], origin: str) -> dict[str, Any]:
        """A message in the names and forms that the template knows."""
        found = {name: value for name, value in message.items() if name not in (*REASONING, "weight")}
        role = found["role"]
        if role not in ROLES and role not in self.template:
            raise ValueError(
                f"role must be one of {', '.join(ROLES)} or one that the chat template names, got role={role!r} in "
                f"{origin}"
            )
        if found.get("tool_calls") and "tool_calls" not in self.template:
            raise ValueError(
                f"the chat template must write tool_calls, got one without, in which they would be lost ({origin}); "
                "take a tokenizer for tools, or leave such chats out"
            )
        reasoning = next((message[name] for name in REASONING if message.get(name)), None)
        if reasoning is not None:
            names = [name for name in REASONING if name in self.template]
            if not names:
                self._warn("the chat template writes no reasoning, so that of the data is not trained on")
            found |= dict.fromkeys(names, reasoning)
        if self.in_parts and isinstance(found.get("content"), str):
            found["content"] = [{"type": "text", "text": found["content"]}]
        return found

    def _takes_parts_alone(self) -> bool:
        """Whether the template writes a content in parts, and not one that is text, as those of models of pictures."""
        if "content" not in self.template:
            return False

        def writes(content: Any) -> bool:
            try:
                return PROBE in self._render([{"role": "user", "content": content}], "", {})
            except ValueError:
                return False

        return not writes(PROBE) and writes([{"type": "text", "text": PROBE}])

    def _render(self, messages: list[dict[str, Any]], origin: str, options: Mapping[str, Any]) -> str:
        try:
            return str(self.tokenizer.apply_chat_template(messages, tokenize=False, **options))
        except jinja2.TemplateSyntaxError as error:
            raise ValueError(f"the chat template must be Jinja, got {error} in its line {error.lineno}") from error
        # Templates are programs: they may raise anything.
        except Exception as error:
            raise ValueError(
                f"the chat template must write every chat, got {type(error).__name__} for {origin}: {error}; mend the "
                "chat or the template (lte train --chat-template)"
            ) from error

    def _warn(self, text: str) -> None:
        if text not in self.warned:
            self.warned.add(text)
            warnings.warn(text, stacklevel=2)
