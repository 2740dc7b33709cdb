"""lm-eval's wrapper of a loaded model, with the sparsity counted in the forward passes that it makes.

Shapes: B sequences, T tokens. Importing this needs the package lm-eval.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from torch import Tensor

from lte.eval.sparsity import SparsityCounter
from lte.hf.inputs import unwrapped


class CountingLm(HFLM):
    """An `HFLM` that knows which tokens of its forward passes are text, and counts their routing.

    Log likelihoods are of rows that HFLM pads on the right without an attention mask; it tells the length of each row
    when it takes the logits of the row's answer. Generation pads prompts on the left, and goes on with rows that have
    ended while others of the batch have not: an end-of-text token and what follows it are not counted.

    Args:
        model: a causal LM, dense or LTE, in hard mode while requests run.
        tokenizer: the model's.
        batch_size: rows per forward pass.

    Attributes:
        tokens: text tokens of the forward passes since it was last set to 0.
        counter: what counts their routing, entered and set by whoever makes requests.
    """

    def __init__(self, model: Any, tokenizer: Any, batch_size: int):
        logger = logging.getLogger(HFLM.__module__)
        level = logger.level
        logger.setLevel(logging.ERROR)  # it warns that the model is loaded already
        try:
            super().__init__(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=batch_size)
        finally:
            logger.setLevel(level)
        self.tokens = 0
        self.counter: SparsityCounter | None = None
        self._lengths: list[int] = []
        self._num_rows = self._width = 0

    def _count(self, text: Tensor) -> None:
        """Counts the forward pass that just ended, where `text` (bool, [B, T]) is true."""
        self.tokens += int(text.sum())
        if self.counter is not None:
            self.counter.update(text)

    def _model_call(self, inps: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self._lengths = []
        self._num_rows, self._width = inps.shape
        return super()._model_call(inps, *args, **kwargs)

    def _select_cont_toks(self, logits: Tensor, contlen: int | None = None, inplen: int | None = None) -> Tensor:
        """HFLM calls it once for each row of a forward pass, with the row's length."""
        assert inplen is not None
        self._lengths.append(inplen)
        if len(self._lengths) == self._num_rows:
            lengths = torch.tensor(self._lengths, device=self.device)
            self._count(torch.arange(self._width, device=self.device) < lengths.unsqueeze(1))
        return super()._select_cont_toks(logits, contlen=contlen, inplen=inplen)

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **kwargs: Any) -> Tensor:
        text = _GeneratedText(kwargs["attention_mask"].bool(), self._end_tokens())

        def count_step(module: Any, args: Any, inputs: dict[str, Any], output: Any) -> None:
            self._count(text.mask_of(inputs["input_ids"]))

        hook = unwrapped(self.model).register_forward_hook(count_step, with_kwargs=True)
        try:
            return super()._model_generate(context, max_length, stop, **kwargs)
        finally:
            hook.remove()

    def _end_tokens(self) -> Tensor:
        ends = self.model.generation_config.eos_token_id
        return torch.tensor([] if ends is None else ends, dtype=torch.long, device=self.device).reshape(-1)


class _GeneratedText:
    """Which tokens of the steps of one call of `generate` are text.

    Args:
        prompts: where the prompts are text, bool [B, T].
        ends: tokens that end a row.
    """

    def __init__(self, prompts: Tensor, ends: Tensor):
        self.prompts, self.ends = prompts, ends
        self.running = torch.ones_like(prompts[:, 0])
        self.seen = 0

    def mask_of(self, input_ids: Tensor) -> Tensor:
        """The mask [B, T] of the next step's tokens.

        Raises:
            ValueError: if there is more than one sequence for each prompt.
        """
        rows, width = input_ids.shape
        if rows != len(self.prompts):
            raise ValueError(
                f"generation must be of one sequence per prompt, got {rows} for {len(self.prompts)}; take num_beams "
                "and num_return_sequences out of the task's generation_kwargs"
            )
        start, self.seen = self.seen, self.seen + width
        if start < self.prompts.shape[1]:
            return self.prompts[:, start : self.seen]
        self.running = self.running & ~torch.isin(input_ids[:, -1], self.ends)
        return self.running.unsqueeze(1)
