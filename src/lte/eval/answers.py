"""Greedy answers of a model, and how far two sets of them agree.

Shapes: N prompts, P tokens of a prompt, T tokens of an answer.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from lte.eval.inference import hard_inference, model_device

# Tokens on the left of each row of a batch with padding, as beside a longer prompt.
PADDING = 16


def row_inputs(model: Any, ids: Tensor, padding: int = 0) -> dict[str, Tensor]:
    """What a model reads of rows of tokens [B, T], on its device: all of one length, with padding on the left."""
    ids = ids.to(model_device(model))
    if not padding:
        return {"input_ids": ids}
    pad = getattr(model.config, "pad_token_id", None) or 0
    mask = torch.cat([ids.new_zeros(len(ids), padding), torch.ones_like(ids)], dim=1)
    found = {"input_ids": torch.cat([ids.new_full((len(ids), padding), pad), ids], dim=1), "attention_mask": mask}
    if "position_ids" in inspect.signature(model.forward).parameters:
        found["position_ids"] = (mask.cumsum(1) - 1).clamp_min(0)
    return found


def next_inputs(model: Any, tokens: Tensor, before: dict[str, Tensor]) -> dict[str, Tensor]:
    """What a model reads after `row_inputs` or this: one more token of each row [B]."""
    found = {"input_ids": tokens.to(model_device(model))[:, None]}
    if "attention_mask" in before:
        mask = before["attention_mask"]
        found["attention_mask"] = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
    if "position_ids" in before:
        found["position_ids"] = before["position_ids"][:, -1:] + 1
    return found


def generate_greedily(model: Any, prompts: Tensor, tokens: int, **settings: Any) -> Any:
    """What `generate` gives for prompts [B, P]: just T likeliest tokens, whatever the model's own settings say.

    Args:
        model: a decoder.
        prompts: of one length.
        tokens: T.
        settings: more of `generate`'s.
    """
    ids = prompts.to(model_device(model))
    likeliest = {"do_sample": False, "repetition_penalty": 1.0, "eos_token_id": None, "pad_token_id": 0}
    return model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, **likeliest, **settings)


def greedy_answers(model: Any, prompts: Tensor, tokens: int, batch: int = 1, padding: int = 0) -> Tensor:
    """The likeliest next tokens, module by module and so never by whole decoding steps; no token ends an answer.

    Args:
        model: a decoder; an LTE model is in hard mode meanwhile.
        prompts: [N, P].
        tokens: T.
        batch: prompts that are answered together.
        padding: tokens of padding on the left of each.

    Returns:
        int64 [N, T] on the CPU.
    """
    takes = inspect.signature(model.forward).parameters
    fewer = {"logits_to_keep": 1} if "logits_to_keep" in takes else {}
    found = []
    with hard_inference(model):
        for rows in prompts.split(batch):
            cache, inputs, answer = DynamicCache(), row_inputs(model, rows, padding), list[Tensor]()
            for _ in range(tokens):
                logits = model(**inputs, past_key_values=cache, use_cache=True, **fewer).logits[:, -1]
                answer.append(logits.float().argmax(-1))
                inputs = next_inputs(model, answer[-1], inputs)
            found.append(torch.stack(answer, dim=1).cpu())
    return torch.cat(found)


def first_difference(one: Tensor, other: Tensor) -> int | None:
    """Where two answers [T] first differ, `None` if they do not."""
    places = (one != other).nonzero()
    return int(places[0]) if len(places) else None


def agreement(one: Tensor, other: Tensor) -> dict[str, Any]:
    """How far answers [N, T] agree, JSON-ready.

    Returns:
        `equal_tokens`: share of the tokens that are equal place by place; `before_difference`: share of the tokens that
        come before the first difference of their answer; `equal_answers`: how many answers are equal as a whole, out of
        `answers`; `first_differences`: where, `None` for equal ones.
    """
    differences = [first_difference(*pair) for pair in zip(one, other, strict=True)]
    length = one.shape[1]
    return {
        "equal_tokens": (one == other).double().mean().item(),
        "before_difference": sum(length if place is None else place for place in differences) / one.numel(),
        "equal_answers": sum(place is None for place in differences),
        "answers": len(differences),
        "first_differences": differences,
    }
