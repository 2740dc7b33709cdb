"""In what numbers a training's model is measured."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lte.runs.precision import Precision
from lte.train.config import TrainConfig

NARROW = {"weights_dtype": "bfloat16"}


@pytest.mark.parametrize(
    ("settings", "save_dtype", "expected"),
    [
        ({}, None, Precision()),
        (NARROW, None, Precision("bfloat16")),
        (NARROW, "float32", Precision()),
        ({"bf16": True}, None, Precision()),
        ({"bf16": True}, "bfloat16", Precision("bfloat16")),
        ({"bf16": True, "tf32": True}, "float32", Precision(tf32=True)),
        ({}, "bfloat16", Precision()),
        # Adapters are merged in fp32.
        ({**NARROW, "lora_rank": 8}, None, Precision()),
    ],
)
def test_a_gpu_measures_in_what_it_trains_and_saves(
    monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], save_dtype: str | None, expected: Precision
) -> None:
    assert Precision.of_training(TrainConfig(**settings), save_dtype) == Precision()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert Precision.of_training(TrainConfig(**settings), save_dtype) == expected


def test_products_are_in_tf32_where_it_says_so_and_as_before_after_it() -> None:
    before = torch.get_float32_matmul_precision()
    with Precision(tf32=True).products_of(nn.Linear(2, 2)):
        assert torch.get_float32_matmul_precision() == "high"
    assert torch.get_float32_matmul_precision() == before
    assert Precision(tf32=True).name == "float32 with TF32 products"
