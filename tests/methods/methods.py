"""What the tests of all methods share: calibration text, and settings that fit the tiny models."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

import lte
from lte.methods import METHODS, MethodConfig
from tests.tiny_models import EXPERT_SIZE, VOCAB, randomise_routers_, tiny_dense_model

# A method whose settings change what it computes is tested in each way. A new method is tested with its defaults.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "kla experts": ("kla", {"granularity": "expert"}),
    "moefication ground truth": ("moefication", {"selection": "ground_truth"}),
    "teal greedy": ("teal", {"allocation": "greedy", "greedy_step": 0.2}),
}
EVERY_METHOD = [*METHODS, *VARIANTS]


def config_for(method: str, **settings: Any) -> MethodConfig:
    """The config of a method, or a variant, for tiny models."""
    name, own = VARIANTS.get(method, (method, {}))
    config_class = METHODS[name].config
    known = {field.name for field in fields(config_class)}
    tiny = {"expert_size": EXPERT_SIZE, "grouping": "random"}
    return config_class(**{**{key: value for key, value in tiny.items() if key in known}, **own, **settings})


def made(method: str, model_type: str = "llama", **settings: Any) -> Any:
    """A tiny model of a method, or a variant; routers of LTE, which start with all experts active, are random."""
    config = config_for(method, **settings)
    model = lte.sparsify_(tiny_dense_model(model_type), config, calibration=calibration_batches())
    return randomise_routers_(model) if config.target_sparsity else model


def calibration_batches(rows: int = 4, length: int = 9) -> list[dict[str, Tensor]]:
    """Two batches of random tokens."""
    generator = torch.Generator().manual_seed(2)
    batches = [torch.randint(3, VOCAB, (rows, length), generator=generator) for _ in range(2)]
    return [{"input_ids": ids, "labels": ids} for ids in batches]
