"""Thresholds that are set on what a model writes itself."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import lte
from lte.data.config import DataConfig
from lte.data.tasks import TaskConfig
from lte.hf.dense import load_tokenizer
from lte.runs.own_answers import calibrate_on_answers_
from lte.runs.workload import TaskWorkload
from lte.train.config import TrainConfig
from tests.cli.conftest import save_tiny_model
from tests.data.tasks.made_up import write_e2e, write_sst2
from tests.tiny_models import EXPERT_SIZE, randomise_routers_

TARGET = 0.3


def workload(folder: Path, task: str, model_type: str) -> TaskWorkload:
    save_tiny_model(folder / "model", model_type)
    config = TaskConfig(task=task, data_dir=str(folder), max_new_tokens=12 if task == "e2e" else None)
    tokenizer = load_tokenizer(folder / "model")
    return TaskWorkload(config, DataConfig(sequence_length=96), tokenizer, 3, ("train", None))


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "t5"])
def test_the_target_is_met_on_what_the_model_writes(tmp_path: Path, model_type: str) -> None:
    write_e2e(tmp_path / "e2e")
    work = workload(tmp_path, "e2e", model_type)
    model = work.load_model(str(tmp_path / "model"))
    work.load_data(model)
    torch.manual_seed(0)
    lte.sparsify_(model, lte.LteConfig(expert_size=EXPERT_SIZE, grouping="random", target_sparsity=TARGET))
    randomise_routers_(model)
    before = work.measure(model).measurement
    assert before is not None
    assert abs(before.sparsity - TARGET) > 0.1
    for config, stages in (
        (TrainConfig(calibration_answers=0), (1, 2)),
        (TrainConfig(calibration_tokens=0), (1, 2)),
        (TrainConfig(recipe="paper"), (1, 2)),
        (TrainConfig(), (1,)),
    ):
        calibrate_on_answers_(model, work, config, stages)
        unchanged = work.measure(model).measurement
        assert unchanged is not None
        assert unchanged.sparsity == before.sparsity
    # A model that is less sparse than wanted on what it writes is left alone.
    model.config.lte = {**model.config.lte, "target_sparsity": 0.95}
    biases = [ffn.router.bias.clone() for ffn in lte.sparse_ffns(model).values()]
    calibrate_on_answers_(model, work, TrainConfig(batch_size=3), (1, 2))
    for bias, ffn in zip(biases, lte.sparse_ffns(model).values(), strict=True):
        assert torch.equal(bias, ffn.router.bias)
    model.config.lte = {**model.config.lte, "target_sparsity": TARGET}
    # The meanings that are measured here are those of the training data.
    calibrate_on_answers_(model, work, TrainConfig(batch_size=3), (1, 2))
    after = work.measure(model).measurement
    assert after is not None
    assert after.sparsity == pytest.approx(TARGET, abs=0.04)


def test_a_task_without_answers_stays_as_it_is(tmp_path: Path) -> None:
    write_sst2(tmp_path / "SST-2")
    work = workload(tmp_path, "sst2", "bert")
    model = work.load_model(str(tmp_path / "model"))
    work.load_data(model)
    lte.sparsify_(model, lte.LteConfig(expert_size=EXPERT_SIZE, grouping="random", target_sparsity=TARGET))
    biases = [ffn.router.bias.clone() for ffn in lte.sparse_ffns(model).values()]
    calibrate_on_answers_(model, work, TrainConfig(), (1, 2))
    for before, ffn in zip(biases, lte.sparse_ffns(model).values(), strict=True):
        assert torch.equal(before, ffn.router.bias)
