"""What a training process sets for itself alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import lte
from lte.train import processes
from lte.train.config import TrainConfig
from lte.train.processes import float32_products, launched
from tests.cli.conftest import run
from tests.tiny_models import tiny_dense_model

__all__ = ["run"]


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


def test_angles_of_rotary_embeddings_stay_exact_beside_tf32() -> None:
    """In TF32 there are no whole numbers above 2048 but even ones, which positions are."""
    model = lte.sparsify_(tiny_dense_model(), lte.LteConfig(expert_size=8))
    seen: dict[str, str] = {}
    for name, module in model.named_modules():
        if name.endswith(("rotary_emb", "router")):
            forward = module.forward

            def noting(*args: Any, name: str = name, forward: Any = forward, **kwargs: Any) -> Any:
                seen[name.rpartition(".")[2]] = torch.get_float32_matmul_precision()
                return forward(*args, **kwargs)

            module.forward = noting  # type: ignore[method-assign]
    for tf32, found in ((True, "high"), (False, "highest")):
        with float32_products(TrainConfig(tf32=tf32), model, None):
            model(torch.ones(1, 4, dtype=torch.long))
        assert seen == {"rotary_emb": "highest", "router": found}
    model(torch.ones(1, 4, dtype=torch.long))
    assert torch.get_float32_matmul_precision() == "highest"


@pytest.mark.parametrize(
    ("settings", "taken"),
    [
        ({}, False),
        ({"bf16": True}, True),
        ({"weights_dtype": "bfloat16"}, True),
        ({"bf16": True, "tf32": False}, False),
    ],
)
def test_tf32_unless_said_is_for_routers_beside_bf16(settings: dict[str, Any], taken: bool) -> None:
    assert TrainConfig(**settings).trains_in_tf32 == taken


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


def test_a_command_that_fails_in_one_of_several_processes_ends_the_launch(
    run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    timers: list[list[Any]] = []

    class Timer:
        daemon = False

        def __init__(self, *args: Any):
            timers.append([self, *args])

        def start(self) -> None:
            timers[-1].append("started")

    monkeypatch.setattr(processes.threading, "Timer", Timer)
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    for size, expected in (("1", 0), ("2", 1)):
        monkeypatch.setenv("WORLD_SIZE", size)
        monkeypatch.setenv("RANK", "1")
        assert run("train", "--model", "/no/such", "--train", "x", "--output", tmp_path / "out").exit_code == 1
        assert len(timers) == expected
    assert timers[0][1] == processes.END_S < 30
    assert timers[0][0].daemon
    assert timers[0][-1] == "started"
    found = json.loads((tmp_path / "error.json").read_text())["message"]
    assert found["message"].startswith("process 1 failed: ")
    assert "/no/such" in found["message"]
    assert int(found["extraInfo"]["timestamp"]) > 0
