"""Methods train through the same trainer as LTE: what changes, and what each adds to the loss."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import lte
from lte.hf.install import wrapped_ffns
from lte.methods import METHODS
from lte.train.config import TrainConfig
from lte.train.two_stage import train_two_stage
from tests.methods.methods import made
from tests.tiny_models import tiny_dense_model
from tests.train.toy import toy_rows

# LTE trains by recipes of its own, and a pruned model is a stock one.
TRAINED = [
    name for name, method in METHODS.items() if method.trained and not (method.leaves_stock or method.sparse_ffns)
]
# Methods that train a model on request, around their own fixed selection.
TRAINABLE = [*TRAINED, "kla", "cats", "deja_vu", "moefication"]


def recipe(**settings: Any) -> TrainConfig:
    fast = {"recipe": "method", "batch_size": 8, "learning_rate": 3e-3, "logging_steps": 1}
    return TrainConfig(**{**fast, "stage1_steps": 2, "stage2_steps": 1, **settings})


def model_of(method: str, model_type: str = "llama") -> Any:
    return made(method, model_type)


def frozen_names(model: Any) -> set[str]:
    ffns = wrapped_ffns(model).items()
    prefixes = [f"{name}.{part}." for name, ffn in ffns for part in ffn.frozen]
    return {name for name, _ in model.named_parameters() if any(name.startswith(prefix) for prefix in prefixes)}


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "opt"])
@pytest.mark.parametrize("method", TRAINABLE)
def test_three_steps_change_all_but_what_is_frozen(method: str, model_type: str, tmp_path: Path) -> None:
    model = model_of(method, model_type)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    summary = train_two_stage(model, toy_rows(), recipe(), tmp_path)
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert changed == set(before) - frozen_names(model)
    assert summary.tokens_trained == 3 * 8 * 32
    adds = any("auxiliary_loss" in entry for entry in summary.log_history)
    assert adds == (method in ("noisy_topk", "sigma_moe"))
    model.save_pretrained(tmp_path / "saved")
    again = type(model).from_pretrained(tmp_path / "saved")
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in again.state_dict().items())


def test_the_frozen_ones_are_the_random_and_the_fitted_selectors() -> None:
    assert {method for method in TRAINABLE if frozen_names(model_of(method))} == {
        "random_router",
        "deja_vu",
        "moefication",
    }


@pytest.mark.parametrize("method", TRAINED)
def test_training_lowers_the_loss(method: str, tmp_path: Path) -> None:
    summary = train_two_stage(model_of(method), toy_rows(256), recipe(stage1_steps=30, stage2_steps=20), tmp_path)
    losses = [entry["task_loss"] for entry in summary.log_history if "task_loss" in entry]
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])


def checkpoints_in(folder: Path) -> list[Path]:
    return sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[-1]))


def test_an_interrupted_run_goes_on(tmp_path: Path) -> None:
    straight = model_of("sigma_moe")
    train_two_stage(straight, toy_rows(), recipe(stage1_steps=4), tmp_path / "straight")
    train_two_stage(model_of("sigma_moe"), toy_rows(), recipe(stage1_steps=4, save_steps=2), tmp_path / "parts")
    steps = int(checkpoints_in(tmp_path / "parts")[-1].name.split("-")[-1])
    shutil.rmtree(checkpoints_in(tmp_path / "parts")[-1])
    second = model_of("sigma_moe")
    summary = train_two_stage(second, toy_rows(), recipe(stage1_steps=4), tmp_path / "parts", resume=True)
    assert summary.tokens_trained == steps * 8 * 32
    for name, value in second.state_dict().items():
        assert torch.equal(value, straight.state_dict()[name]), name


def test_the_recipe_must_fit_the_model(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="recipe must be 'method' for a model of another method than LTE"):
        train_two_stage(model_of("cats"), toy_rows(), recipe(recipe="straight_through"), tmp_path)
    sparse = lte.sparsify_(tiny_dense_model(), lte.LteConfig(expert_size=8, grouping="random"))
    with pytest.raises(ValueError, match="recipe must be another one for an LTE model, got recipe='method'"):
        train_two_stage(sparse, toy_rows(), recipe(), tmp_path)
    with pytest.raises(ValueError, match="model must be an LTE model or have FFNs of another method, got neither"):
        train_two_stage(model_of("teal"), toy_rows(), recipe(), tmp_path)
