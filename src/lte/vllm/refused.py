"""What stands in vLLM's registry for an architecture that is not served, so that vLLM gets as far as our refusal."""

from __future__ import annotations

from typing import Any

from torch import nn


class RefusedModel(nn.Module):
    """A text model by its methods' names; `lte.vllm.checks` refuses it before one is made."""

    def __init__(self, *, vllm_config: Any, prefix: str = ""):
        from lte.vllm.checks import refuse_architecture

        super().__init__()
        refuse_architecture(vllm_config.model_config)

    def embed_input_ids(self, input_ids: Any) -> Any:
        """Part of vLLM's interface of text models."""
        raise NotImplementedError

    def forward(self, input_ids: Any, positions: Any) -> Any:
        """Part of vLLM's interface of text models."""
        raise NotImplementedError

    def compute_logits(self, hidden_states: Any) -> Any:
        """Part of vLLM's interface of text models."""
        raise NotImplementedError
