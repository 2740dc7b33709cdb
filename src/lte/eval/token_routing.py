"""Which experts each token of a text switches on, recorded on the hard path that generates.

Shapes: L layers, T tokens, E experts of a layer, K strongest tokens of an expert, V distinct tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lte.eval.flops import count_linear_weights
from lte.eval.inference import hard_inference, model_device
from lte.eval.next_tokens import NextTokens, next_tokens
from lte.hf.families import family_of
from lte.hf.inputs import check_tokens, unwrapped
from lte.hf.install import require_sparse_ffns
from lte.nn.sparse_ffn import SparseFfn

# Per weight; bf16 weights, fp32 routers.
_FLOPS = {"attention": 2, "ffn": 2, "routers": 2}
_WEIGHT_BYTES = {"attention": 2, "ffn": 2, "routers": 4}


@dataclass(frozen=True)
class TokenRouting:
    """The routing of one text in hard mode.

    Attributes:
        packed: bits of the active experts, the first expert in the highest bit, uint8 [L, T, ceil(E / 8)].
        logits: router logits, fp32 [L, T, E].
        expert_size: neurons of an expert.
        threshold_logit: above which an expert is active.
    """

    packed: np.ndarray
    logits: np.ndarray
    expert_size: int
    threshold_logit: float = 0.0

    @property
    def shape(self) -> tuple[int, int, int]:
        """L, T, E."""
        layers, tokens, experts = self.logits.shape
        return layers, tokens, experts

    @property
    def active(self) -> np.ndarray:
        """Whether an expert is active, bool [L, T, E]."""
        return np.unpackbits(self.packed, axis=-1, count=self.shape[2]).astype(bool)

    @property
    def active_experts(self) -> np.ndarray:
        """How many experts are active, int64 [L, T]."""
        return self.active.sum(-1)

    @property
    def layer_sparsity(self) -> list[float]:
        """Share of FFN neurons not computed per token, by layer, [L]."""
        return [1 - float(share) for share in self.expert_use.mean(-1)]

    @property
    def sparsity(self) -> float:
        """Share of FFN neurons not computed, mean over tokens and layers."""
        return 1 - float(self.expert_use.mean())

    @property
    def expert_use(self) -> np.ndarray:
        """Share of tokens that activate each expert, float64 [L, E]."""
        return self.active.mean(1)

    @property
    def union(self) -> float:
        """Share of the experts that at least one token activates."""
        return float(self.active.any(1).mean())


def routed_part(model: Any) -> nn.Module:
    """The part of an LTE model that reads a text: without its head, and of an encoder-decoder the encoder."""
    inner = unwrapped(model)
    return inner.get_encoder() if inner.config.is_encoder_decoder else inner.base_model


def predicts_next(model: Any) -> bool:
    """Whether a model writes token by token and has the head for it."""
    inner = unwrapped(model)
    writes = next(iter(family_of(inner.config).models)) == "AutoModelForCausalLM"
    return writes and inner.get_output_embeddings() is not None


def record_text(model: Any, token_ids: Sequence[int]) -> tuple[TokenRouting, NextTokens | None]:
    """As `record_routing`, and what the same pass predicts; `None` of a model that does not write token by token."""
    if not predicts_next(model):
        return record_routing(model, token_ids), None
    routing, output = _record(model, token_ids, model)
    return routing, next_tokens(output.logits[0], token_ids)


def record_routing(model: Any, token_ids: Sequence[int]) -> TokenRouting:
    """Runs one text through an LTE model in hard mode, accelerated or plain as it is, and keeps its routing.

    All tokens go through in one pass. Of an encoder-decoder only the encoder runs.

    Args:
        model: an LTE model.
        token_ids: the text, [T].

    Raises:
        ValueError: for a dense model, no tokens or some that the model does not have, or router logits that are not
            finite.
    """
    require_sparse_ffns(model)
    return _record(model, token_ids, routed_part(model))[0]


def _record(model: Any, token_ids: Sequence[int], part: nn.Module) -> tuple[TokenRouting, Any]:
    if len(token_ids) == 0:
        raise ValueError("token_ids must hold at least one token, got none")
    ffns = list(require_sparse_ffns(part).values())
    check_tokens(model, torch.tensor([list(token_ids)]))
    ids = torch.tensor([list(token_ids)], device=model_device(part))
    with recorded_logits(ffns), hard_inference(part):
        output = part(input_ids=ids, use_cache=False)
        found = [_layer_routing(ffn, len(token_ids)) for ffn in ffns]
    packed, logits = (np.stack(layers) for layers in zip(*found, strict=True))
    size = ffns[0].num_neurons // ffns[0].num_experts
    return TokenRouting(packed, logits, size, ffns[0].threshold_logit), output


@contextmanager
def recorded_logits(ffns: Sequence[SparseFfn]) -> Iterator[None]:
    """Has FFNs keep the router logits of each pass in a block."""
    before = [ffn.record_logits for ffn in ffns]
    for ffn in ffns:
        ffn.record_logits, ffn.logits = True, None
    try:
        yield
    finally:
        for ffn, did in zip(ffns, before, strict=True):
            ffn.record_logits, ffn.logits = did, None


def _layer_routing(ffn: SparseFfn, tokens: int) -> tuple[np.ndarray, np.ndarray]:
    logits: Tensor | None = ffn.logits
    assert logits is not None
    # Some blocks flatten [B, T] before their FFN.
    logits = logits.reshape(tokens, -1)
    if not torch.isfinite(logits).all():
        raise ValueError("router scores must be numbers, got NaN or infinity; the model's weights are damaged")
    # The comparison of the hard path itself, in its dtype.
    active = (logits > ffn.threshold_logit).cpu().numpy()
    return np.packbits(active, axis=-1), logits.float().cpu().numpy()


@dataclass(frozen=True)
class StrongestTokens:
    """The tokens of a text that switch each expert on most, strongest first, each distinct token once.

    Attributes:
        positions: where in the text the token has its highest router score, int32 [L, E, K]; -1 where no further
            token switches the expert on.
        scores: that score, fp32 [L, E, K].
        switched_on: how many of the token's occurrences switch the expert on, int32 [L, E, K].
    """

    positions: np.ndarray
    scores: np.ndarray
    switched_on: np.ndarray


def strongest_tokens(routing: TokenRouting, token_ids: Sequence[int], count: int = 8) -> StrongestTokens:
    """Finds the K = `count` tokens with the highest router scores for each expert.

    Args:
        routing: of the text.
        token_ids: the text, [T].
        count: K.

    Raises:
        ValueError: if there are more or fewer ids than the routing has tokens.
    """
    layers, tokens, experts = routing.shape
    if len(token_ids) != tokens:
        raise ValueError(f"token_ids must be the {tokens} tokens of the routing, got {len(token_ids)}")
    _, kinds = np.unique(np.asarray(token_ids), return_inverse=True)
    order = np.argsort(kinds, kind="stable")
    starts = np.flatnonzero(np.diff(kinds[order], prepend=-1))
    positions = np.full((layers, experts, count), -1, dtype=np.int32)
    scores = np.zeros((layers, experts, count), dtype=np.float32)
    switched_on = np.zeros((layers, experts, count), dtype=np.int32)
    active = routing.active
    for layer in range(layers):
        best = _best_positions(routing.logits[layer], order, starts)
        on = np.add.reduceat(active[layer][order].astype(np.int32), starts)
        logits = np.take_along_axis(routing.logits[layer], best, axis=0)
        top = np.argsort(-logits, axis=0, kind="stable")[:count]
        found = np.take_along_axis(on, top, axis=0)
        kept = len(top)
        positions[layer, :, :kept] = np.where(found > 0, np.take_along_axis(best, top, axis=0), -1).T
        raw = np.take_along_axis(logits, top, axis=0).astype(np.float64)
        scores[layer, :, :kept] = np.where(found > 0, 1 / (1 + np.exp(-raw)), 0).T
        switched_on[layer, :, :kept] = found.T
    return StrongestTokens(positions, scores, switched_on)


def _best_positions(logits: np.ndarray, order: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """Where each distinct token has its highest logit, the first of equals, int [V, E]."""
    places = np.split(order, starts[1:])
    return np.stack([place[logits[place].argmax(0)] for place in places])


def selectivity(routing: TokenRouting, token_ids: Sequence[int]) -> np.ndarray:
    """How far the token alone tells that an expert is on: 1 - p / q, at least 0, float64 [L, E].

    p is the share of tokens that activate it, q the chance that it is on at another place of a token at which it is on.
    0 is an expert that does not care which token it is, near 1 one that is seldom on, and then for the same tokens.
    Tokens that occur once say nothing of q; without any other it is not a number.

    Args:
        routing: of a text with L layers, T tokens, E experts.
        token_ids: the text, [T].
    """
    _, kinds, counts = np.unique(np.asarray(token_ids), return_inverse=True, return_counts=True)
    order, starts = np.argsort(kinds, kind="stable"), np.cumsum(counts) - counts
    often = counts > 1
    on = np.add.reduceat(routing.active[:, order].astype(np.float64), starts, axis=1)[:, often]
    again = (on * (on - 1) / (counts[often, None] - 1)).sum(1)
    with np.errstate(invalid="ignore", divide="ignore"):
        # p and q of the same tokens.
        return np.clip(1 - on.sum(1) ** 2 / counts[often].sum() / again, 0, 1)


def counts_at(routing: TokenRouting, thresholds: np.ndarray) -> np.ndarray:
    """How many experts of all layers would be on for each token at other thresholds, with the scores as they are.

    Args:
        routing: of the text.
        thresholds: as logits, [K].

    Returns:
        int64 [K, T].
    """
    ordered = np.sort(routing.logits.transpose(1, 0, 2).reshape(routing.shape[1], -1), axis=1)
    return ordered.shape[1] - np.stack([np.searchsorted(row, thresholds, side="right") for row in ordered], axis=1)


@dataclass(frozen=True)
class TextCost:
    """Work of a token at batch size 1, mean over a text, by the conventions of `lte.eval.flops`.

    Attributes:
        flops: FLOPs per token by part: attention, ffn, routers; their sum is `flops_per_token`.
        dense_flops: those of the dense model.
        bytes: weight bytes per token by part, weights in bf16 and routers in fp32.
        dense_bytes: those of the dense model.
    """

    flops: dict[str, float]
    dense_flops: dict[str, float]
    bytes: dict[str, float]
    dense_bytes: dict[str, float]


def text_cost(model: Any, routing: TokenRouting) -> TextCost:
    """What the tokens of a text cost an LTE model; of an encoder-decoder, its encoder."""
    weights = count_linear_weights(routed_part(model))
    by_layer = zip(weights.ffn, routing.layer_sparsity, strict=True)
    ffn = sum(count * (1 - sparsity) for count, sparsity in by_layer)
    common = {"attention": float(weights.attention)}
    read = {**common, "ffn": ffn, "routers": float(sum(weights.router))}
    dense = {**common, "ffn": float(sum(weights.ffn)), "routers": 0.0}

    def times(factors: dict[str, int], counts: dict[str, float]) -> dict[str, float]:
        return {part: factors[part] * count for part, count in counts.items()}

    return TextCost(times(_FLOPS, read), times(_FLOPS, dense), times(_WEIGHT_BYTES, read), times(_WEIGHT_BYTES, dense))
