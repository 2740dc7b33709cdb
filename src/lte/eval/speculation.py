"""How speculative decoding went: what it read at a time, and why an answer differs from that of plain decoding.

Shapes: T tokens.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.generation.streamers import BaseStreamer

from lte.eval.inference import hard_inference, model_device
from lte.eval.token_routing import recorded_logits, routed_part
from lte.hf.install import require_sparse_ffns


class PassClock(BaseStreamer):
    """A streamer that notes when tokens come, and how many at a time.

    Attributes:
        passes: how often the model said which tokens stay: its forward passes, the prompt's included.
        tokens: of the answer.
    """

    def __init__(self) -> None:
        self._times: list[float] = []
        self._counts: list[int] = []

    def put(self, value: Tensor) -> None:
        """Takes the prompt, and then what each pass has brought."""
        self._times.append(time.perf_counter())
        self._counts.append(value.numel())

    def end(self) -> None:
        """The end of the answer."""

    @property
    def passes(self) -> int:
        return len(self._counts) - 1

    @property
    def tokens(self) -> int:
        return sum(self._counts[1:])

    @property
    def ms_per_token(self) -> float:
        """From the first pass, which reads the prompt, to the last; NaN where there is no other."""
        later = sum(self._counts[2:])
        return 1e3 * (self._times[-1] - self._times[1]) / later if later else float("nan")


def match_counts(text: Sequence[int], start: int, gram: int = 8, most: int = 7) -> dict[int, list[int]]:
    """How often what followed the longest match of a text's last tokens was right, for each token from `start` on.

    As prompt lookup looks for it (`lte.hf.lookup`), at all places of an answer.

    Args:
        text: a prompt and its answer.
        start: where the answer begins.
        gram: tokens of the longest match.
        most: tokens after it that are looked at.

    Returns:
        By tokens of the match: how many there were, and for how many of these at least 1, 2, ... `most` tokens that
        followed are those of the text.
    """
    found: dict[int, list[int]] = {}
    for place in range(max(start, 2), len(text)):
        longest = (0, 0, 0)
        for end in range(1, place):
            longer = min(gram, end)
            length = next((n for n in range(longer) if text[end - 1 - n] != text[place - 1 - n]), longer)
            # As `lte.ops.lookup_kernels`, which needs Triton, has it (COPIED).
            longest = max(longest, (length, -end if length >= 4 else end, end))
        length, _, end = longest
        if length:
            counts = found.setdefault(length, [0] * (most + 1))
            known = min(most, place - end, len(text) - place)
            right = next((n for n in range(known) if text[end + n] != text[place + n]), known)
            for kept in range(right + 1):
                counts[kept] += 1
    return dict(sorted(found.items()))


@torch.no_grad()
def closest_call(model: Any, ids: Tensor) -> dict[str, float]:
    """How close a model comes to another token after a text, by rounding alone.

    Two ways to compute the same may write different tokens where the two likeliest are nearly as likely, or where a
    router score lies at the threshold: an expert that flips changes all that follows. Of the millions of scores of a
    long text some are nearly always close, so that a small `score_distance` alone says little there.

    Args:
        model: an LTE model in plain PyTorch or accelerated.
        ids: the text, [T].

    Returns:
        `logit_gap`, between the two likeliest next tokens, and `score_distance`, the smallest |G - tau| of all tokens,
        layers and experts.
    """
    ffns, part = list(require_sparse_ffns(model).values()), routed_part(model)
    tokens = ids.to(model_device(model))[None]
    distances = []
    with recorded_logits(ffns), hard_inference(model):
        logits = model(tokens, use_cache=False).logits[0, -1].double()
        for ffn in require_sparse_ffns(part).values():
            assert ffn.logits is not None
            tau = torch.sigmoid(torch.tensor(ffn.threshold_logit, dtype=torch.float64))
            distances.append((torch.sigmoid(ffn.logits.double()) - tau.to(ffn.logits.device)).abs().min().cpu())
    first, second = logits.topk(2).values.tolist()
    return {"logit_gap": first - second, "score_distance": min(each.item() for each in distances)}
