"""What a training process sets for itself alone."""

from __future__ import annotations

import pytest
import torch

from lte.train.config import TrainConfig
from lte.train.processes import float32_products


def test_tf32_ends_with_the_training() -> None:
    before = torch.get_float32_matmul_precision()
    seen = []

    def diverges() -> None:
        with float32_products(TrainConfig(tf32=True)):
            seen.append(torch.get_float32_matmul_precision())
            raise KeyError

    with pytest.raises(KeyError):
        diverges()
    assert seen == ["high"]
    assert torch.get_float32_matmul_precision() == before == "highest"
    with float32_products(TrainConfig()):
        assert torch.get_float32_matmul_precision() == before
