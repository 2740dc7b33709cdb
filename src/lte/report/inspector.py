"""The inspector: a page that shows which experts each token of a text switches on, and why."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from difflib import SequenceMatcher
from typing import Any

import numpy as np
import torch

from lte.config import LteConfig
from lte.eval.inference import hard_inference, model_device
from lte.eval.text_tokens import TextTokens, encode_text, readable_entries
from lte.eval.token_routing import (
    TokenRouting,
    counts_at,
    predicts_next,
    record_text,
    recorded_logits,
    selectivity,
    strongest_tokens,
    text_cost,
)
from lte.hf.install import require_sparse_ffns
from lte.nn.sparse_ffn import SparseFfn
from lte.report.page import MAX_TOKENS, pack_base64, read_asset, render_page

SCRIPTS = ("charts.js", "routing.js", "token_text.js", "pictures.js", "atlas.js", "token_panel.js", "inspector.js")
TITLE = "What a model learned to skip"
GENERATED_TOKENS = 60
# Shares of the experts for which the what-if slider knows the threshold.
_SHARES = np.linspace(1, 0, 21)[1:-1]


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
        reference: the text that tells what each expert is for and what is usual; `None` for the bundled one, of
            passages whose authors died long ago.
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
        longest = _longest_text(model)
        self.max_tokens = min(max_tokens, longest or max_tokens)
        known = reference or NamedText("the bundled text", read_asset("atlas.txt"))
        tokens = encode_text(tokenizer, known.text, min(MAX_TOKENS, longest or MAX_TOKENS))
        notes = [] if reference is None else _cut(tokens)
        self._reference = {"text": known.name, "tokens": _tokens(tokens), "notes": notes}
        self._reference |= _experts(tokens, record_text(model, tokens.ids)[0])

    def run(self, text: NamedText) -> dict[str, Any]:
        """What the page shows of one text, JSON-ready.

        Raises:
            ValueError: for a text without tokens, or a model whose scores are no numbers.
        """
        tokens = encode_text(self.tokenizer, text.text, self.max_tokens)
        routing, predictions = record_text(self.model, tokens.ids)
        layers, _, experts = routing.shape
        measured = getattr(self.model.config, "lte_measurement", None) or {}
        return {
            "model": self.name,
            "text": text.name,
            **_tokens(tokens),
            "notes": [*_cut(tokens), *self._notes(tokens)],
            "layers": layers,
            "experts": experts,
            "expert_size": routing.expert_size,
            "active": pack_base64(routing.packed.tobytes()),
            "sparsity": routing.sparsity,
            "target": LteConfig.from_dict(self.model.config.lte).target_sparsity,
            "measured": measured.get("sparsity"),
            "union": routing.union,
            "reads_at_once": not predicts_next(self.model),
            "next": None if predictions is None else self._next(predictions),
            "what_if": _what_if(routing),
            "cost": asdict(text_cost(self.model, routing)),
            "reference": self._reference,
        }

    def _notes(self, tokens: TextTokens) -> Iterator[str]:
        written = sum(special and bool(text) for special, text in zip(tokens.special, tokens.texts, strict=True))
        if written:
            what = "a special token (framed), which" if written == 1 else f"{written:,} special tokens (framed), which"
            yield f"The text itself holds {what} the model does not read as words."
        if self.model.config.is_encoder_decoder:
            yield (
                "This model has an encoder and a decoder. The encoder reads the text and is what you see; the decoder "
                "writes an answer, and there is none here."
            )

    def _next(self, predictions: Any) -> dict[str, Any]:
        known, places = np.unique(predictions.likeliest, return_inverse=True)
        return {
            # The first token has no surprise: the page leaves it out.
            "surprise": _packed(np.nan_to_num(predictions.surprise), "<f4"),
            "entropy": _packed(predictions.entropy, "<f4"),
            "words": readable_entries(self.tokenizer, known.tolist()),
            "likeliest": _packed(places.reshape(predictions.likeliest.shape), "<i4"),
            "probabilities": _packed(predictions.probabilities, "<f4"),
        }

    def generate(self, text: NamedText, count: int = GENERATED_TOKENS) -> Iterator[dict[str, Any]]:
        """Continues a text greedily, and tells of each token its entry and the share of the neurons it used.

        Raises:
            ValueError: for a text without tokens, or a model that does not write token by token.
        """
        if not predicts_next(self.model):
            raise ValueError("model must write token by token to continue a text, got an encoder; choose Inspect")
        ids = torch.tensor([encode_text(self.tokenizer, text.text, self.max_tokens).ids]).to(model_device(self.model))
        ffns = list(require_sparse_ffns(self.model).values())
        ends, cache, words = self.model.generation_config.eos_token_id, None, None
        with recorded_logits(ffns), hard_inference(self.model):
            for _ in range(min(count, self.max_tokens - ids.shape[1]) + 1):
                output = self.model(input_ids=ids, past_key_values=cache, use_cache=True)
                if words is not None:
                    on = [(_logits(ffn) > ffn.threshold_logit).float().mean().item() for ffn in ffns]
                    yield {"id": int(ids), "entry": words, "share": sum(on) / len(on)}
                cache, ids = output.past_key_values, output.logits[:, -1:].argmax(-1)
                if int(ids) in np.ravel(ends):
                    return
                words = readable_entries(self.tokenizer, [int(ids)])[0]

    def continued(self, text: NamedText, added: Sequence[int]) -> dict[str, Any]:
        """As `run`, of a text and the tokens that were generated after it."""
        ids = [*encode_text(self.tokenizer, text.text, self.max_tokens).ids, *added]
        return self.run(NamedText(text.name, self.tokenizer.decode(ids, skip_special_tokens=True)))


def _logits(ffn: SparseFfn) -> torch.Tensor:
    """Those of the one token that was read last."""
    assert ffn.logits is not None
    return ffn.logits


def _longest_text(model: Any) -> int | None:
    """The longest text that a model takes, if its config says so."""
    longest = getattr(model.config, "max_position_embeddings", None)
    table = next((module for name, module in model.named_modules() if name.endswith(".position_embeddings")), None)
    padding = getattr(table, "padding_idx", None)
    # RoBERTa counts positions from the one after that of the padding.
    return longest if longest is None or padding is None else longest - padding - 1


def _tokens(tokens: TextTokens) -> dict[str, Any]:
    return {
        "ids": tokens.ids,
        "tokens": tokens.texts,
        # Of the others the page shows the text.
        "entries": {str(i): entry for i, entry in enumerate(tokens.entries) if not tokens.texts[i]},
        "special": [index for index, special in enumerate(tokens.special) if special],
    }


def _cut(tokens: TextTokens) -> list[str]:
    if not tokens.truncated:
        return []
    return [f"Only the first {len(tokens):,} of {tokens.total:,} tokens are shown; the text was cut there."]


def _experts(tokens: TextTokens, routing: TokenRouting) -> dict[str, Any]:
    """What the page knows of the experts from the reference text, and what a token uses there."""
    strongest = strongest_tokens(routing, tokens.ids)
    return {
        "use": _packed(routing.expert_use, "<f4"),
        # An expert without a number is as one that does not care.
        "selectivity": _packed(np.nan_to_num(selectivity(routing, tokens.ids)), "<f4"),
        "shares": _packed(np.sort(routing.active.mean((0, 2))), "<f4"),
        "positions": _packed(strongest.positions, "<i4"),
        "scores": _packed(strongest.scores, "<f4"),
        "switched_on": _packed(strongest.switched_on, "<i4"),
        "strongest": strongest.positions.shape[-1],
    }


def _what_if(routing: TokenRouting) -> dict[str, Any]:
    """What other thresholds would switch on, if the scores stayed as they are; the model's own is among them."""
    logits = routing.logits[routing.logits < 100]  # without experts that are always on
    own = routing.threshold_logit
    steps = np.sort(np.append(np.quantile(logits, 1 - _SHARES) if logits.size else [], own))
    return {
        "thresholds": [1 / (1 + math.exp(-float(step))) for step in steps],
        "own": int(np.searchsorted(steps, own)),
        "counts": _packed(counts_at(routing, steps), "<u2"),
    }


def _packed(values: np.ndarray, dtype: str) -> str:
    return pack_base64(values.astype(dtype).tobytes())


def inspector_data(runs: Sequence[dict[str, Any]], *, served: bool = False) -> dict[str, Any]:
    """The data of a page: up to two runs side by side, none while a served page waits for a text.

    `references` holds each reference once, and a run its place there; `pairs` has the stretches of tokens that are the
    same in both runs, as starts in A and B and a length.
    """
    references: list[Any] = []
    for run in runs:
        if run["reference"] not in references:
            references.append(run["reference"])
    shown = [{**run, "reference": references.index(run["reference"])} for run in runs]
    return {
        "runs": shown,
        "references": references,
        "pairs": _pairs(*runs) if len(runs) == 2 else [],
        "served": served,
    }


def _pairs(first: dict[str, Any], second: dict[str, Any]) -> list[list[int]]:
    words = [
        [text or run["entries"].get(str(i), "") for i, text in enumerate(run["tokens"])] for run in (first, second)
    ]
    blocks = SequenceMatcher(None, words[0], words[1], autojunk=False).get_matching_blocks()
    return [[block.a, block.b, block.size] for block in blocks if block.size]


def inspector_page(data: dict[str, Any]) -> str:
    """The page for what `inspector_data` returned."""
    return render_page(
        TITLE, read_asset("inspector.html"), data, SCRIPTS, styles=("inspector.css",), connects=data["served"]
    )
