"""The head of a language model apart from its body: the hidden states that it reads, and its product.

Shapes: B sequences, T tokens, N tokens of all sequences, D hidden size, V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lte.hf.inputs import unwrapped

# Of a short row the logits of head and model are compared, in how many tokens.
COMPARED_TOKENS = 16
# Relative RMS difference up to which they count as the same: both are one product, of other shapes at most.
SAME = {torch.float64: 1e-5, torch.float32: 1e-5, torch.float16: 2e-2, torch.bfloat16: 2e-2}


@dataclass(frozen=True)
class LanguageHead:
    """What makes logits of the last hidden states h: c tanh(s (h W^T + b) / c), without a cap c just s (h W^T + b).

    Attributes:
        weight: W, [V, D]; it may be that of the embeddings.
        bias: b, [V], or `None`.
        scale: s.
        cap: c, as in Gemma 2; `None` for none.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    cap: float | None = None

    def logits(self, hidden: Tensor) -> Tensor:
        """Maps last hidden states [..., D] to logits [..., V]."""
        logits = F.linear(hidden, self.weight, self.bias) * self.scale
        return logits if self.cap is None else self.cap * torch.tanh(logits / self.cap)


def language_head(model: Any) -> LanguageHead | None:
    """The head of a model that predicts the next token, as its config says.

    Returns:
        Its parameters, no copies; `None` where the head is more than one plain product, as in BERT, belongs to an
        adapter, or lies on another device or in shards.
    """
    inner = unwrapped(model)
    head = inner.get_output_embeddings()
    takes = inspect.signature(inner.forward).parameters
    if type(head) is not nn.Linear or "logits_to_keep" not in takes:
        return None
    if type(head.weight) is not nn.Parameter or not head.weight.is_floating_point():
        return None
    config = inner.config
    # Gemma caps, Granite divides, Cohere multiplies.
    scale = getattr(config, "logit_scale", None) or 1 / (getattr(config, "logits_scaling", None) or 1)
    return LanguageHead(head.weight, head.bias, float(scale), getattr(config, "final_logit_softcapping", None))


def _bodies(inner: Any) -> list[nn.Module]:
    """The modules of which one gives the hidden states that the head reads; OPT's head reads those of its decoder."""
    body = getattr(inner, "base_model", None)
    found = (body, getattr(body, "decoder", None))
    return [each for each in found if isinstance(each, nn.Module) and each is not inner]


class LastHiddenStates:
    """Keeps the last hidden states [B, T, D] of each call of a model until they are taken.

    Called with `logits_to_keep=1`, the model makes no others than these and the logits of one token of each row.
    """

    def __init__(self, model: Any):
        self._kept: Tensor | None = None
        self._handles = [body.register_forward_hook(self._keep) for body in _bodies(unwrapped(model))]

    def _keep(self, module: nn.Module, args: Any, output: Any) -> None:
        self._kept = output[0]

    def take(self) -> Tensor | None:
        """Those of the last call, which are then no longer kept; `None` if there was none."""
        kept, self._kept = self._kept, None
        return kept

    def remove(self) -> None:
        """Leaves the model as it was."""
        for handle in self._handles:
            handle.remove()
        self._kept = None


@torch.no_grad()
def splits_head(model: Any, batch: Mapping[str, Tensor]) -> bool:
    """Whether `language_head` and `LastHiddenStates` together give the logits of a model, tried on a short row.

    Args:
        model: that predicts the next token; it is called in the mode that it is in, without dropout if that is eval.
        batch: `input_ids` [B, T], where the model is.
    """
    head = language_head(model)
    ids = batch.get("input_ids")
    if head is None or ids is None or ids.device != head.weight.device:
        return False
    # Which would change the logits, and are not called for those of a chunk.
    module = unwrapped(model).get_output_embeddings()
    if module._forward_hooks or module._forward_pre_hooks or hasattr(module, "_hf_hook"):
        return False
    states = LastHiddenStates(model)
    try:
        logits = model(input_ids=ids[:1, :COMPARED_TOKENS], use_cache=False, logits_to_keep=1).logits
        hidden = states.take()
    finally:
        states.remove()
    if hidden is None or logits.shape[1] != 1 or hidden.ndim != 3 or hidden.shape[-1] != head.weight.shape[1]:
        return False
    own = head.logits(hidden[:, -1:]).to(logits.dtype)
    difference = (own.double() - logits.double()).norm() / logits.double().norm().clamp_min(1e-12)
    return bool(difference <= SAME.get(logits.dtype, 0.0))
