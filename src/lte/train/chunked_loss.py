"""Cross entropy and divergence from a teacher in which logits exist for a chunk of tokens at a time.

Over a vocabulary of 152k tokens the logits of 16 rows of 1024 tokens are 5 GB in bf16 and 10 GB in fp32, of the
student, of its teacher, and of each step from them to a gradient. Here a chunk's logits are made, its loss and the
gradient for its hidden states and for the head's weight, and then they go: nothing is computed twice, and the backward
pass only scales what is there.

What others have does not do: `torch.nn.functional.linear_cross_entropy` (from torch 2.13) knows no teacher, and
Liger-Kernel's chunked divergences take no cap, round log-probabilities and the sum over chunks to the weights' dtype,
and import triton.

Shapes: N tokens of all sequences, C tokens of a chunk, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lte.config import IGNORED
from lte.hf.language_head import LanguageHead, LastHiddenStates, language_head

CHUNK_LOGITS = 1 << 28
"""Logits of a chunk, in fp32 1 GiB: of a vocabulary of 152k tokens those of 1024."""

WITHOUT_LOGITS = {"logits_to_keep": 1}
"""What a model is called with besides, to make no logits but those of the last token of each row."""


def chunk_tokens(vocabulary: int) -> int:
    """How many tokens have their logits at once: a power of two, so that chunks of usual batches have one shape."""
    return 1 << max(0, (CHUNK_LOGITS // vocabulary).bit_length() - 1)


def chunk_terms(
    products: Tensor,
    targets: Tensor,
    teacher_products: Tensor | None,
    factor: Tensor,
    weight: float,
    head: tuple[float, float | None],
    teacher_head: tuple[float, float | None],
    wants_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The sums of both losses over a chunk, and the gradient for its products.

    With student's probabilities p, the teacher's q and the label's y, that of the losses for logits z is
    p - (1 - a) y - a q.

    Args:
        products: h W^T + b [C, V] of the student.
        targets: [C], -100 where no label is.
        teacher_products: [C, V] or `None`.
        factor: of both losses in the gradient, a scalar: one over the number of labels.
        weight: a, of the divergence.
        head: the student's scale and cap.
        teacher_head: the teacher's.
        wants_gradient: whether to compute it.

    Returns:
        Sum of the cross entropy, sum of KL(teacher || student), and the gradient [C, V] in the dtype of `products`.
    """
    logits = _wide_logits(products, *head)
    log_probs = F.log_softmax(logits, dim=-1)
    counted = (targets != IGNORED).to(log_probs.dtype)
    places = targets.clamp_min(0).unsqueeze(-1)
    cross_entropy = -(log_probs.gather(-1, places).squeeze(-1) * counted).sum()
    divergence, teacher = cross_entropy.new_zeros(()), None
    if teacher_products is not None:
        log_teacher = F.log_softmax(_wide_logits(teacher_products, *teacher_head), dim=-1)
        teacher = log_teacher.exp()
        divergence = ((teacher * (log_teacher - log_probs)).sum(-1) * counted).sum()
    if not wants_gradient:
        return cross_entropy, divergence, None
    gradient = log_probs.exp()
    if teacher is not None:
        gradient = gradient - weight * teacher
    if weight != 1:
        gradient = gradient.scatter_add(-1, places, torch.full_like(places, weight - 1, dtype=gradient.dtype))
    scale, cap = head
    gradient = gradient * (counted * (factor * scale)).unsqueeze(-1)
    if cap is not None:
        gradient = gradient * (1 - (logits / cap).square())
    return cross_entropy, divergence, gradient.to(products.dtype)


def _wide_logits(products: Tensor, scale: float, cap: float | None) -> Tensor:
    logits = products.to(torch.promote_types(torch.float32, products.dtype))
    logits = logits if scale == 1 else logits * scale
    return logits if cap is None else cap * torch.tanh(logits / cap)


class _ChunkedTerms(torch.autograd.Function):
    """The weighted sum of both losses, which has a gradient, and each by itself, which has none."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        rest: tuple[LanguageHead, Tensor, Tensor | None, LanguageHead | None, Tensor, float, int, Callable[..., Any]],
    ) -> tuple[Tensor, Tensor, Tensor]:
        head, targets, teacher_hidden, teacher, factor, share, rows, terms = rest
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
        sums = _Sums(hidden, weight, bias, dtype, ctx.needs_input_grad)
        # One copy of the weight for all chunks: autocast would make one for each.
        narrow, narrow_bias = weight.to(dtype), None if bias is None else bias.to(dtype)
        own = (head.scale, head.cap)
        others = own if teacher is None else (teacher.scale, teacher.cap)
        cross_entropy, divergence = [], []
        with torch.autocast(device, enabled=False):
            for start in range(0, len(hidden), rows):
                chunk = slice(start, start + rows)
                states = hidden[chunk].to(dtype)
                products = F.linear(states, narrow, narrow_bias)
                teacher_products = None
                if teacher is not None and teacher_hidden is not None:
                    teacher_states = teacher_hidden[chunk].to(teacher.weight.dtype)
                    teacher_products = F.linear(teacher_states, teacher.weight, teacher.bias)
                found = terms(products, targets[chunk], teacher_products, factor, share, own, others, sums.wanted)
                cross_entropy.append(found[0])
                divergence.append(found[1])
                if found[2] is not None:
                    sums.add(chunk, found[2], states, narrow)
        ctx.save_for_backward(sums.hidden, *sums.of_parameters())
        task, kl = (torch.stack(each).sum() * factor for each in (cross_entropy, divergence))
        ctx.mark_non_differentiable(task, kl)
        return (1 - share) * task + share * kl, task, kl

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return *(None if each is None else each * gradients[0].to(each.dtype) for each in ctx.saved_tensors), None


class _Sums:
    """The gradients of a loss over chunks, those of the head in fp32 until all chunks are through."""

    def __init__(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype, needs: tuple[bool, ...]
    ):
        wide = torch.promote_types(torch.float32, dtype)
        self.wanted = any(needs)
        self.parameters = weight, bias
        self.hidden = torch.empty_like(hidden) if needs[0] else None
        self.weight = torch.zeros_like(weight, dtype=wide) if needs[1] else None
        self.bias = torch.zeros_like(bias, dtype=wide) if bias is not None and needs[2] else None

    def add(self, chunk: slice, gradient: Tensor, states: Tensor, weight: Tensor) -> None:
        """Adds what the gradient [C, V] of a chunk's products gives."""
        if self.hidden is not None:
            self.hidden[chunk] = gradient @ weight
        if self.weight is not None:
            self.weight += gradient.T @ states
        if self.bias is not None:
            self.bias += gradient.sum(0, dtype=self.bias.dtype)

    def of_parameters(self) -> list[Tensor | None]:
        """Those of weight and bias in their own dtype."""
        pairs = zip((self.weight, self.bias), self.parameters, strict=True)
        return [None if sums is None or own is None else sums.to(own.dtype) for sums, own in pairs]


def chunked_language_terms(
    hidden: Tensor,
    labels: Tensor,
    head: LanguageHead,
    teacher: tuple[Tensor, LanguageHead] | None = None,
    weight: float = 0.0,
    num_items: Tensor | int | None = None,
    *,
    tokens: int | None = None,
    terms: Callable[..., Any] = chunk_terms,
) -> tuple[Tensor, Tensor, Tensor]:
    """What `lte.train.objective.language_terms` gives for the logits of a head, without the logits.

    Args:
        hidden: last hidden states [B, T, D]; position t predicts label t + 1.
        labels: [B, T], -100 where no label is.
        head: the student's. In autocast its products are in autocast's dtype, the teacher's in that of its own weights.
        teacher: last hidden states [B, T, D'] of a teacher, and its head.
        weight: a, of the divergence; without a teacher 0.
        num_items: what the sums are divided by; `None` takes the labelled positions of this batch.
        tokens: how many have their logits at once; `None` as `chunk_tokens`.
        terms: `chunk_terms`, compiled say.

    Returns:
        (1 - a) times the cross entropy plus a times the divergence, then each of them, which have no gradient; in nats.
    """
    targets = F.pad(labels[:, 1:], (0, 1), value=IGNORED).flatten().to(hidden.device)
    count = (targets != IGNORED).sum().clamp_min(1) if num_items is None else num_items
    factor = 1 / torch.as_tensor(count, device=hidden.device).to(torch.promote_types(torch.float32, hidden.dtype))
    states = (None, None) if teacher is None else (teacher[0].flatten(0, 1), teacher[1])
    rows = tokens or chunk_tokens(head.weight.shape[0])
    rest = (head, targets, *states, factor, weight, rows, terms)
    return _ChunkedTerms.apply(hidden.flatten(0, 1), head.weight, head.bias, rest)


class ChunkedLoss:
    """The loss over chunks of a model and its teacher, whose last hidden states it keeps from their calls.

    Args:
        model: of which `lte.hf.language_head.splits_head` is true.
        teacher: another one, or `None`.
        tokens: how many have their logits at once; `None` as `chunk_tokens`.
        compiled: whether what is computed of a chunk's logits is compiled.
    """

    def __init__(self, model: Any, teacher: Any = None, tokens: int | None = None, compiled: bool = False):
        self.model, self.teacher, self.tokens = model, teacher, tokens
        self._states = LastHiddenStates(model)
        self._teacher_states = None if teacher is None else LastHiddenStates(teacher)
        self._terms = torch.compile(chunk_terms) if compiled else chunk_terms

    def __call__(
        self, labels: Tensor, weight: float, num_items: Tensor | int | None, inputs: Mapping[str, Any] | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As `chunked_language_terms`, of the model's last call.

        Args:
            labels: [B, T].
            weight: of the divergence.
            num_items: what the sums are divided by.
            inputs: of the model, on which the teacher is called; `None` leaves the divergence out.
        """
        head, hidden, teacher = language_head(self.model), self._states.take(), None
        assert head is not None
        assert hidden is not None
        if inputs is not None and self._teacher_states is not None:
            # In the teacher's own dtype: autocast would only add casts.
            with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
                self.teacher(**{**inputs, **WITHOUT_LOGITS})
            teacher_head, teacher_hidden = language_head(self.teacher), self._teacher_states.take()
            assert teacher_head is not None
            assert teacher_hidden is not None
            teacher = teacher_hidden, teacher_head
        return chunked_language_terms(
            hidden, labels, head, teacher, weight, num_items, tokens=self.tokens, terms=self._terms
        )

    def remove(self) -> None:
        """Leaves both models as they were."""
        for states in (self._states, self._teacher_states):
            if states is not None:
                states.remove()
