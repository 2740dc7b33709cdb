"""lm-eval's wrapper of a loaded model, with the sparsity counted in the forward passes that it makes.

Shapes: B sequences, T tokens. Importing this needs the package lm-eval.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from lte.eval.sparsity import SparsityCounter
from lte.hf.inputs import run_without_logits

TEXTS_AT_ONCE = 1024


class CountingLm(HFLM):
    """An `HFLM` that knows which tokens of its forward passes are text, and counts their routing.

    Log likelihoods are of rows that HFLM pads on the right without an attention mask; it tells the length of each row
    when it takes the logits of the row's answer. Generation pads prompts on the left, and goes on with rows that have
    ended while others of the batch have not: an end-of-text token and what follows it are not counted. What was written
    is counted afterwards, in a forward pass over the texts.

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
            # In the model's own bf16 a log-likelihood of -140 would be a whole number, and choices tie.
            super().__init__(
                pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=batch_size, softmax_dtype="float32"
            )
        finally:
            logger.setLevel(level)
        self.tokens = 0
        self.counter: SparsityCounter | None = None
        self._encoded: dict[str, np.ndarray] = {}
        self._lengths: list[int] = []
        self._num_rows = self._width = 0

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """As HFLM's, which tokenises one text after the other: here many at a time, and once what requests share."""
        self._encoded = self._encode([request.args for request in requests])
        try:
            return super().loglikelihood(requests, disable_tqdm)
        finally:
            self._encoded = {}

    def _encode(self, pairs: list[tuple[str, str]]) -> dict[str, np.ndarray]:
        """The tokens int32 [T] of all texts that HFLM makes of contexts and answers, but of those it treats apart."""
        if self.add_bos_token is not None:
            return {}
        # Spaces at a context's end count as its answer's.
        both = (text for context, answer in pairs if context for text in (context + answer, context.rstrip()))
        apart = self.tokenizer.decode(self.prefix_token_id)
        texts = list(dict.fromkeys(text for text in both if text and not (apart and text.startswith(apart))))
        found: dict[str, np.ndarray] = {}
        for start in range(0, len(texts), TEXTS_AT_ONCE):
            some = texts[start : start + TEXTS_AT_ONCE]
            rows = self.tokenizer(some, return_attention_mask=False)["input_ids"]
            found |= {text: np.array(row, dtype=np.int32) for text, row in zip(some, rows, strict=True)}
        return found

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, left_truncate_len: int | None = None, **kwargs: Any
    ) -> list[int]:
        """As HFLM's."""
        found = None if left_truncate_len or add_special_tokens is not None else self._encoded.get(string)
        if found is not None:
            return found.tolist()
        return super().tok_encode(string, add_special_tokens, left_truncate_len, **kwargs)

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
        """Counts nothing while the model writes: what watches it would keep it from whole decoding steps.

        Afterwards the text runs through the model once more, if there is anything to count.

        Raises:
            ValueError: if there is to be more than one sequence for each prompt.
        """
        self._check_sequences(len(context), kwargs)
        with nullcontext() if self.counter is None else self.counter.paused():
            output = super()._model_generate(context, max_length, stop, **kwargs)
        self._count_texts(self._texts(output, kwargs["attention_mask"].bool()))
        return output

    def _check_sequences(self, prompts: int, kwargs: Mapping[str, Any]) -> None:
        defaults = self.model.generation_config
        names = ("num_beams", "num_return_sequences")
        rows = prompts * max(kwargs.get(name, getattr(defaults, name, None)) or 1 for name in names)
        if rows != prompts:
            raise ValueError(
                f"generation must be of one sequence per prompt, got {rows} for {prompts}; take num_beams and "
                "num_return_sequences out of the task's generation_kwargs"
            )

    def _texts(self, output: Tensor, prompts: Tensor) -> list[Tensor]:
        """The tokens of each row that the model read: the prompt, and of the answer what comes before its last token.

        Args:
            output: prompts and answers [B, T].
            prompts: where the prompts are text, bool [B, shorter than T].
        """
        found = self.model.generation_config.eos_token_id
        ends = torch.tensor([] if found is None else found, dtype=torch.long, device=output.device).reshape(-1)
        answers = output[:, prompts.shape[1] : -1]
        running = ~torch.isin(answers, ends).cumsum(1).bool()
        keep = torch.cat([prompts.to(output.device), running], dim=1)
        return [row[kept] for row, kept in zip(output[:, :-1], keep, strict=True)]

    def _count_texts(self, texts: list[Tensor]) -> None:
        """Counts the tokens of some rows, and their routing in one forward pass, padded on the right."""
        if self.counter is None:
            self.tokens += sum(map(len, texts))
            return
        run_without_logits(self.model, {"input_ids": pad_sequence(texts, batch_first=True)})
        self._count(pad_sequence([torch.ones_like(text, dtype=torch.bool) for text in texts], batch_first=True))
