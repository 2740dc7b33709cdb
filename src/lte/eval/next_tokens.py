"""What a model expects after each token of a text, and how surprising the text was to it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

# Logits of so many tokens become fp32 at a time.
_CHUNK = 256


@dataclass(frozen=True)
class NextTokens:
    """What a model expects after each of T tokens.

    Attributes:
        surprise: of each token, given those before: -log2 of its probability, in bits, not a number for the first,
            fp32 [T].
        entropy: of what comes after each token, in bits, fp32 [T].
        likeliest: the K likeliest next tokens, likeliest first, int32 [T, K].
        probabilities: of these, fp32 [T, K].
    """

    surprise: np.ndarray
    entropy: np.ndarray
    likeliest: np.ndarray
    probabilities: np.ndarray


def next_tokens(logits: Tensor, token_ids: Sequence[int], count: int = 5) -> NextTokens:
    """Reads the predictions from the logits of a text.

    Args:
        logits: [T, V].
        token_ids: the text, [T].
        count: K, at most V.

    Raises:
        ValueError: for logits that are not numbers.
    """
    following = torch.tensor([*token_ids[1:], 0], device=logits.device)
    parts = [
        _predictions(part.float(), after, min(count, logits.shape[-1]))
        for part, after in zip(logits.split(_CHUNK), following.split(_CHUNK), strict=True)
    ]
    after, entropy, likeliest, probabilities = (torch.cat(part).cpu().numpy() for part in zip(*parts, strict=True))
    if not np.isfinite(entropy).all():
        raise ValueError("logits must be numbers, got NaN or infinity; the model's weights are damaged")
    surprise = np.concatenate([[np.nan], after[:-1]]).astype(np.float32)
    return NextTokens(surprise, entropy, likeliest.astype(np.int32), probabilities)


def _predictions(logits: Tensor, after: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    log = logits.log_softmax(-1)
    probabilities, likeliest = log.exp().topk(count, -1)
    surprise = -log.gather(-1, after[:, None])[:, 0] / math.log(2)
    # A logit of minus infinity adds nothing.
    entropy = -(log.exp() * log.clamp_min(-1e4)).sum(-1) / math.log(2)
    return surprise, entropy, likeliest, probabilities
