"""What transformers with lte writes for a prompt, and by how little each of its decisions was taken."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

import lte

LOGIT_GAP, SCORE_GAP = 1e-4, 1e-5


@dataclass(frozen=True)
class Reference:
    """A greedy continuation.

    Attributes:
        prompt: token ids.
        tokens: what was written.
        logit_gaps: by written token: between the two largest logits.
        score_gaps: by position of prompt and continuation: between tau and the nearest score of any layer.
    """

    prompt: list[int]
    tokens: list[int]
    logit_gaps: list[float]
    score_gaps: list[float]

    def difference(self, tokens: list[int]) -> str | None:
        """Why other tokens may differ from these, in words; `None` if they are the same.

        Raises:
            AssertionError: if nothing was close enough to a tie before the first difference.
        """
        assert len(tokens) == len(self.tokens)
        first = next((i for i, pair in enumerate(zip(tokens, self.tokens, strict=True)) if len(set(pair)) > 1), None)
        if first is None:
            return None
        gap, score = self.logit_gaps[first], min(self.score_gaps[: len(self.prompt) + first])
        assert gap <= LOGIT_GAP or score <= SCORE_GAP, (
            f"token {first} differs: {tokens[first]} for {self.tokens[first]}, where the logits were {gap:.1e} and the "
            f"nearest score before it {score:.1e} from a tie"
        )
        return f"token {first}: logits {gap:.1e} apart, nearest score {score:.1e} from tau"


@torch.no_grad()
def reference(model: Any, prompt: list[int], count: int) -> Reference:
    """The greedy continuation of a prompt by `count` tokens."""
    ids = torch.tensor([prompt])
    written = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False, eos_token_id=None
    )
    tokens = written[0, len(prompt) :].tolist()
    ffns = list(lte.sparse_ffns(model).values())
    for ffn in ffns:
        ffn.record_logits = True
    logits = model(written[:, :-1]).logits[0, len(prompt) - 1 :].float()
    tau = torch.tensor(ffns[0].threshold_logit).sigmoid()
    scores = torch.stack([(ffn.logits.sigmoid()[0] - tau).abs() for ffn in ffns])
    for ffn in ffns:
        ffn.record_logits, ffn.logits = False, None
    top = logits.topk(2).values
    return Reference(prompt, tokens, (top[:, 0] - top[:, 1]).tolist(), scores.amin((0, 2)).tolist())


def differences(references: list[Reference], tokens: list[list[int]]) -> list[str]:
    """What differs and why that is no fault, a line each; anything else fails."""
    found = [ref.difference(own) for ref, own in zip(references, tokens, strict=True)]
    return [line for line in found if line is not None]
