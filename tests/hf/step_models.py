"""Models of all families with whole decoding steps, each with what its family has of its own."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import lte
from lte.ops.step import engines
from lte.ops.step.plan import DecoderPlan
from lte.ops.step.reference import ReferenceEngine
from tests.tiny_models import tiny_dense_model, tiny_sparse_model

WINDOW = 7
PARTIAL = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
LLAMA3 = {
    **{"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "original_max_position_embeddings": 16},
    **{"low_freq_factor": 1.0, "high_freq_factor": 4.0},
}
WINDOWED: dict[str, Any] = {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1}
SETTINGS: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True, "mlp_bias": True, "rope_parameters": LLAMA3},
    "mistral": {"sliding_window": WINDOW, "num_key_value_heads": 4},
    "qwen2": WINDOWED,
    "qwen3": {**WINDOWED, "rope_parameters": YARN},
    "gemma2": {"sliding_window": WINDOW, "query_pre_attn_scalar": 5, "attn_logit_softcapping": 1.5},
    "gemma3_text": {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]},
    "phi3": {"sliding_window": WINDOW, "rope_parameters": PARTIAL},
}
STEP_TYPES = list(SETTINGS)


def take_reference_engines(monkeypatch: pytest.MonkeyPatch) -> list[DecoderPlan]:
    """Has the reference compute whole steps of everything; the plans of all engines, as they are made."""
    plans: list[DecoderPlan] = []

    def make(plan: DecoderPlan) -> ReferenceEngine:
        plans.append(plan)
        return ReferenceEngine(plan)

    monkeypatch.setattr(engines, "unfit", lambda plan, caches: None)
    monkeypatch.setattr(engines, "make_engine", make)
    return plans


def step_model(model_type: str = "llama", *, dense: bool = False, **overrides: Any) -> Any:
    """A tiny model with 128 positions whose norms are no identities, in eager attention."""
    make = tiny_dense_model if dense else tiny_sparse_model
    model = make(model_type, **{**SETTINGS[model_type], "max_position_embeddings": 128, **overrides})
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight") or name.endswith("_norm.weight") or "layernorm" in name:
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
    model.set_attn_implementation("eager")
    return model


def accelerated(model_type: str = "llama", **overrides: Any) -> Any:
    """As `step_model`, accelerated."""
    return lte.accelerate_(step_model(model_type, **overrides))
