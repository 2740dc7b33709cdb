"""Answers to prompts, in batches.

Shapes: B prompts, T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from lte.data.rows import PaddingCollator
from lte.eval.inference import hard_inference, model_device

# Greedy, whatever the checkpoint's generation config says.
GREEDY: dict[str, Any] = {
    "do_sample": False,
    "num_beams": 1,
    "repetition_penalty": 1.0,
    "temperature": None,
    "top_p": None,
    "top_k": None,
}


def generate_answers(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    batch_size: int = 8,
    progress: bool = True,
) -> list[list[int]]:
    """The likeliest next tokens after each prompt, up to the end of text, which is part of them.

    Prompts go in batches of about one length, padded on the left (on the right in an encoder); an LTE model runs in
    hard mode.

    Args:
        model: a causal language model, or an encoder-decoder.
        tokenizer: its end-of-text token ends an answer.
        prompts: token ids of each.
        max_new_tokens: of an answer.
        batch_size: prompts per batch.
        progress: whether to show a progress bar.

    Returns:
        Token ids of each answer, in the order of the prompts.
    """
    encoder_decoder = model.config.is_encoder_decoder
    collator = PaddingCollator(tokenizer, "right" if encoder_decoder else "left")
    order = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))
    answers: list[list[int]] = [[] for _ in prompts]
    starts = range(0, len(order), batch_size)
    with hard_inference(model):
        from rich.progress import track  # `import lte` does without

        for start in track(starts, "generating", disable=not progress, transient=True):
            picked = order[start : start + batch_size]
            batch = collator([{"input_ids": list(prompts[index])} for index in picked])
            inputs = {key: value.to(model_device(model)) for key, value in batch.items()}
            tokens: Tensor = model.generate(
                **inputs,
                max_new_tokens=max_new_tokens,
                pad_token_id=tokenizer.pad_token_id,
                eos_token_id=tokenizer.eos_token_id,
                **GREEDY,
            )
            # A decoder with an encoder starts with a token of its own.
            new = tokens[:, 1:] if encoder_decoder else tokens[:, batch["input_ids"].shape[1] :]
            for index, row in zip(picked, new.tolist(), strict=True):
                answers[index] = _until_end(row, tokenizer.eos_token_id)
    return answers


def _until_end(tokens: list[int], eos: int) -> list[int]:
    return tokens[: tokens.index(eos) + 1] if eos in tokens else tokens
