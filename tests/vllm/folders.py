"""Tiny LTE folders that vLLM's kernels can run: its attention wants heads of 32 or more."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

import lte
from tests.tiny_models import EXPERT_SIZE, VOCAB, randomise_routers_, tiny_dense_model

NEURONS = 128
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "gpt2")
_NEURONS_FIELD = {"gpt2": "n_inner", "opt": "ffn_dim"}
_OWN: dict[str, dict[str, Any]] = {"opt": {"word_embed_proj_dim": 64}}
_GEOMETRY = {
    "hidden_size": 64,
    "head_dim": 32,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}


def served_model(model_type: str = "llama", *, layers: int = 2, mlp_bias: bool = False, **settings: Any) -> Any:
    """An LTE model with random routers, in hard mode and fp32; `settings` are those of `LteConfig`."""
    overrides = {
        **_GEOMETRY,
        "num_hidden_layers": layers,
        _NEURONS_FIELD.get(model_type, "intermediate_size"): NEURONS,
        **({"mlp_bias": True} if mlp_bias else {}),
        **_OWN.get(model_type, {}),
    }
    model = tiny_dense_model(model_type, **overrides)
    lte.sparsify_(model, lte.LteConfig(**{"expert_size": EXPERT_SIZE, "grouping": "random", **settings}))
    return randomise_routers_(model)


def save(model: Any, folder: Path) -> str:
    """Saves a model; returns the folder as vLLM takes it."""
    model.save_pretrained(folder)
    return str(folder)


def prompts(lengths: tuple[int, ...] = (1, 4, 17, 40, 9, 16)) -> list[list[int]]:
    """Random prompts, shorter and longer than what the decode path takes."""
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(3, VOCAB, (length,), generator=generator).tolist() for length in lengths]
