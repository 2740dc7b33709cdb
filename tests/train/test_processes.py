"""What a training process sets for itself alone."""

from __future__ import annotations

import pytest
import torch

from lte.train.config import TrainConfig
from lte.train.processes import float32_products, launched


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


@pytest.mark.parametrize(
    ("environment", "command"),
    [
        ({}, "lte train"),
        ({"WORLD_SIZE": "1", "ACCELERATE_MIXED_PRECISION": "no"}, "lte train"),
        (
            {"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "4", "GROUP_WORLD_SIZE": "1"},
            "torchrun --nproc-per-node 4 -m lte train",
        ),
        (
            {"WORLD_SIZE": "16", "LOCAL_WORLD_SIZE": "8", "GROUP_WORLD_SIZE": "2"},
            "torchrun --nnodes 2 --nproc-per-node 8 -m lte train",
        ),
        (
            {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "ACCELERATE_MIXED_PRECISION": "no"},
            "accelerate launch --config_file CONFIG --num_processes 2 -m lte train",
        ),
    ],
    ids=["none", "one process", "torchrun", "several nodes", "accelerate"],
)
def test_a_command_goes_on_behind_its_launcher(
    environment: dict[str, str], command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE", "ACCELERATE_MIXED_PRECISION"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert launched("train") == command
