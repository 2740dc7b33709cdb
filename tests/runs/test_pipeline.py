"""Making and measuring a model from Python, as the commands do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import lte
from lte.config import LteConfig
from lte.data.config import DataConfig
from lte.eval.models import save_folder
from lte.hf.dense import load_tokenizer
from lte.methods.sigma_moe import SigmaMoeConfig
from lte.runs import pipeline
from lte.runs.measure import measure_folder
from lte.runs.pipeline import ModelSettings, Watcher, make_model
from lte.runs.workload import TextWorkload
from lte.train.config import TrainConfig
from tests.cli.conftest import SHORT, run
from tests.tiny_models import EXPERT_SIZE

__all__ = ["run"]

CONFIG = LteConfig(target_sparsity=0.5, expert_size=EXPERT_SIZE)
TRAIN = TrainConfig(
    stage1_steps=2, stage2_steps=2, router_fit_tokens=256, calibration_tokens=512, batch_size=4, report_to="none"
)


def workload(folder: Path, **settings: Any) -> TextWorkload:
    data = DataConfig(sequence_length=32, max_train_tokens=1024, max_validation_tokens=256, **settings)
    return TextWorkload(data, load_tokenizer(str(folder)), batch_size=4)


def test_from_settings_to_a_measured_folder(llama: Path, tmp_path: Path) -> None:
    told: list[str] = []

    class Teller(Watcher):
        def loaded(self, model: Any) -> None:
            told.append(f"{len(lte.sparse_ffns(model))} sparse")

        def before_training(self, model: Any, teacher: Any, train: TrainConfig) -> TrainConfig:
            told.append(f"{len(lte.sparse_ffns(model))} sparse, taught by {type(teacher).__name__}")
            return train

    work = workload(llama)
    train = TrainConfig(**{**TRAIN.to_dict(), "distillation_weight": 1.0})
    settings = ModelSettings(start=str(llama), config=CONFIG, train=train, teacher=str(llama))
    model, summary = make_model(settings, work, tmp_path / "checkpoints", watcher=Teller())
    assert told == ["0 sparse", "2 sparse, taught by LlamaForCausalLM"]
    save_folder(model, work.tokenizer, tmp_path / "out")
    tokens = summary.tokens_trained
    found = measure_folder(
        tmp_path / "out", work, model="tiny", seed=0, tokens_trained=tokens, wall_time_s=1.0, config={}
    )
    assert found.record["sparsity"] == pytest.approx(0.5, abs=0.1)
    assert found.record["tokens_trained"] == 4 * 4 * 32
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.config.lte_measurement["sparsity"] == found.record["sparsity"]


@pytest.mark.parametrize(
    ("config", "recipe", "kind"),
    [
        (None, "dense", "LlamaForCausalLM"),
        (CONFIG, "dense", "LlamaForCausalLM"),
        (SigmaMoeConfig(expert_size=EXPERT_SIZE), "method", "Lte"),
    ],
)
def test_every_kind_of_model_trains(llama: Path, tmp_path: Path, config: Any, recipe: str, kind: str) -> None:
    train = TrainConfig(**{**TRAIN.to_dict(), "recipe": recipe})
    before = AutoModelForCausalLM.from_pretrained(llama).state_dict()
    settings = ModelSettings(start=str(llama), config=config, train=train)
    model = make_model(settings, workload(llama), tmp_path)[0]
    assert type(model).__name__.startswith(kind)
    name = "model.layers.0.self_attn.q_proj.weight"
    assert not torch.equal(model.state_dict()[name].cpu(), before[name])


def test_thresholds_are_set_on_the_calibration_text(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "like_in_use.txt").write_text("a b c d e f g " * 200)
    work = workload(llama, calibration=str(tmp_path / "like_in_use.txt"))
    given: list[Any] = []
    real = pipeline.train_two_stage

    def train(*arguments: Any, calibration_dataset: Any, **more: Any) -> Any:
        given.append(calibration_dataset)
        return real(*arguments, calibration_dataset=calibration_dataset, **more)

    monkeypatch.setattr(pipeline, "train_two_stage", train)
    make_model(ModelSettings(start=str(llama), config=CONFIG, train=TRAIN), work, tmp_path / "checkpoints")
    assert given == [work.calibration]
    assert "a b c" in work.tokenizer.decode(work.calibration[0]["input_ids"])
    assert work.info["calibration"]["documents"] == 1


def test_an_lte_folder_keeps_its_settings_but_the_target(llama: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(llama)
    lte.sparsify_(model, LteConfig(target_sparsity=0.3, expert_size=EXPERT_SIZE))
    save_folder(model, load_tokenizer(str(llama)), tmp_path / "sparse")
    settings = ModelSettings(
        start=str(tmp_path / "sparse"), config=CONFIG, train=TRAIN, changed=frozenset({"target_sparsity"})
    )
    assert make_model(settings, workload(llama), tmp_path / "one")[0].target_sparsity == 0.5
    refused = ModelSettings(start=settings.start, config=CONFIG, train=TRAIN)
    with pytest.raises(ValueError, match="model must be dense"):
        make_model(refused, workload(llama), tmp_path / "two")


def test_a_run_whose_pictures_fail_has_saved_its_model(
    run: Callable[..., Any], llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*arguments: Any) -> None:
        raise RuntimeError("no fonts")

    monkeypatch.setattr("lte.report.figures.save_figure", broken)
    result = run("train", "--model", llama, "--output", tmp_path / "out", *SHORT)
    assert "no fonts" in " ".join(result.output.split())
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.lte_measurement is not None
    assert (tmp_path / "out" / "result.json").exists()


def test_weights_that_stay_on_the_cpu_are_read_there(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = lte.sparsify_(AutoModelForCausalLM.from_pretrained(llama), LteConfig(expert_size=EXPERT_SIZE))
    model.save_pretrained(tmp_path / "lte")
    places = []
    monkeypatch.setattr(TextWorkload, "load_model", lambda self, *args, to="device": places.append(to))
    work = object.__new__(TextWorkload)
    for name, value in (("ACCELERATE_USE_FSDP", "true"), ("FSDP_OFFLOAD_PARAMS", "false")):
        monkeypatch.setenv(name, value)
    for start, offload in (("lte", "false"), ("lte", "true"), (llama, "true")):
        monkeypatch.setenv("FSDP_OFFLOAD_PARAMS", offload)
        settings = ModelSettings(start=str(tmp_path / start), config=CONFIG, train=TRAIN, changed=frozenset())
        pipeline._loaded(settings, work)
    # The neurons of a dense start are grouped on the GPU.
    assert places == ["device", "cpu", "device"]
