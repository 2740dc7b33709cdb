"""The inspector: a page that shows which experts each token of a text switches on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lte.eval.text_tokens import TextTokens, encode_text
from lte.eval.token_routing import TokenRouting, record_routing, strongest_tokens, text_cost
from lte.hf.families import family_of
from lte.report.page import MAX_TOKENS, pack_base64, read_asset, render_page

SCRIPTS = ("routing.js", "token_text.js", "maps.js", "expert.js", "costs.js", "inspector.js")
TITLE = "What a model learned to skip"


@dataclass(frozen=True)
class NamedText:
    """A text and what the page calls it."""

    name: str
    text: str


class Inspector:
    """Records texts on one model for the page.

    Args:
        model: an LTE model.
        tokenizer: its tokenizer.
        name: what the page calls the model.
        max_tokens: of a text, what is beyond is left out; it is lowered to what the model takes.
        reference: the text among whose tokens the strongest of each expert are looked for, `None` for each text itself.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        name: str,
        max_tokens: int = MAX_TOKENS,
        reference: NamedText | None = None,
    ):
        self.model, self.tokenizer, self.name = model, tokenizer, name
        self.max_tokens = min(max_tokens, _longest_text(model) or max_tokens)
        self._reference: dict[str, Any] | None = None
        if reference is not None:
            tokens, routing = self._record(reference)
            self._reference = {"text": reference.name, "tokens": _tokens(tokens), "notes": _cut(tokens)}
            self._reference |= _experts(tokens, routing)

    def run(self, text: NamedText) -> dict[str, Any]:
        """What the page shows of one text, JSON-ready.

        Raises:
            ValueError: for a text without tokens, or a model whose router scores are no numbers.
        """
        tokens, routing = self._record(text)
        layers, _, experts = routing.shape
        cost = text_cost(self.model, routing)
        notes = _cut(tokens)
        if self.model.config.is_encoder_decoder:
            notes.append(
                "This model has an encoder and a decoder. The encoder reads the text and is what you see; the decoder "
                "writes an answer, and there is none here."
            )
        return {
            "model": self.name,
            "text": text.name,
            **_tokens(tokens),
            "notes": notes,
            "layers": layers,
            "experts": experts,
            "expert_size": routing.expert_size,
            "active": pack_base64(routing.packed.tobytes()),
            "sparsity": routing.sparsity,
            "union": routing.union,
            # All but the models that write token by token.
            "reads_at_once": next(iter(family_of(self.model.config).models)) != "AutoModelForCausalLM",
            "cost": {name: getattr(cost, name) for name in ("flops", "dense_flops", "bytes", "dense_bytes")},
            "reference": self._reference
            or {"text": text.name, "tokens": None, "notes": [], **_experts(tokens, routing)},
        }

    def _record(self, text: NamedText) -> tuple[TextTokens, TokenRouting]:
        tokens = encode_text(self.tokenizer, text.text, self.max_tokens)
        return tokens, record_routing(self.model, tokens.ids)


def _longest_text(model: Any) -> int | None:
    """The longest text that a model takes, if its config says so."""
    longest = getattr(model.config, "max_position_embeddings", None)
    table = next((module for name, module in model.named_modules() if name.endswith(".position_embeddings")), None)
    padding = getattr(table, "padding_idx", None)
    # RoBERTa counts positions from the one after that of the padding.
    return longest if longest is None or padding is None else longest - padding - 1


def _tokens(tokens: TextTokens) -> dict[str, Any]:
    return {"ids": tokens.ids, "tokens": tokens.texts, "entries": tokens.entries, "total_tokens": tokens.total}


def _cut(tokens: TextTokens) -> list[str]:
    if not tokens.truncated:
        return []
    return [f"Only the first {len(tokens):,} of {tokens.total:,} tokens are shown; the text was cut there."]


def _experts(tokens: TextTokens, routing: TokenRouting) -> dict[str, Any]:
    """What the page knows of the experts from a text."""
    strongest = strongest_tokens(routing, tokens.ids)
    return {
        "use": _packed(routing.expert_use, "<f4"),
        "positions": _packed(strongest.positions, "<i4"),
        "scores": _packed(strongest.scores, "<f4"),
        "switched_on": _packed(strongest.switched_on, "<i4"),
        "strongest": strongest.positions.shape[-1],
    }


def _packed(values: np.ndarray, dtype: str) -> str:
    return pack_base64(values.astype(dtype).tobytes())


def inspector_data(
    runs: Sequence[dict[str, Any]], *, served: bool = False, max_tokens: int = MAX_TOKENS
) -> dict[str, Any]:
    """The data of a page: up to two runs side by side, none while a served page waits for a text."""
    return {"runs": list(runs), "served": served, "max_tokens": max_tokens}


def inspector_page(data: dict[str, Any]) -> str:
    """The page for what `inspector_data` returned."""
    return render_page(TITLE, read_asset("inspector.html"), data, SCRIPTS, connects=data["served"])
