"""Trainings whose tensors lie on several devices, which a CPU pretends to have."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor
from torch.utils._pytree import tree_leaves

import lte
from lte.data.rows import LmCollator
from lte.methods import METHODS
from lte.nn import global_sums
from lte.nn.router import Router
from lte.train import routing_loss
from lte.train import trainer as trainer_module
from lte.train.arguments import LteTrainingArguments
from lte.train.dropped_start import DroppedStart, mean_dropped_outputs
from lte.train.layer_budgets import loss_rises
from lte.train.router_init import calibrate_thresholds_, fit_routers_
from lte.train.trainer import LteTrainer
from tests.pretended_devices import (
    CPU,
    FIRST,
    offload_,
    place_of,
    pretend_,
    pretended_devices,
    spread_,
    tensors_of,
)
from tests.tiny_models import PAD, tiny_dense_model
from tests.train.toy import toy_rows, uneven_toy_rows

SETTINGS: dict[str, Any] = {
    "max_steps": 4, "per_device_train_batch_size": 4, "router_fit_tokens": 128, "calibration_tokens": 256,
    "logging_steps": 1, "save_strategy": "no", "report_to": "none", "use_cpu": True, "disable_tqdm": True,
}  # fmt: skip
ADDED = {"even_weight": 0.3, "predecessor_weight": 0.3, "union_weight": 0.3, "price_on": "union"}


class OnFirst(LteTrainingArguments):
    """Says that batches belong on the first GPU."""

    @property
    def device(self) -> torch.device:
        assert super().device == CPU
        return FIRST


def model_of(method: str = "lte", **config: Any) -> Any:
    settings = {"expert_size": 8, "target_sparsity": 0.5, "grouping": "random", **config}
    return lte.sparsify_(tiny_dense_model(), METHODS[method].config(**settings))


@pytest.mark.parametrize(
    ("model", "options"),
    [
        ({"dropped_bias": True}, {"match_weight": 0.5, "match_to": "own", "eval_strategy": "epoch", **ADDED}),
        ({}, {"layer_budgets": "sensitivity", "max_steps": 2}),
        ({}, {"recipe": "annealed", "regroup_count": 1, "max_steps": 12, "teacher": True, "match_weight": 0.5}),
        ({"method": "sigma_moe"}, {"recipe": "method"}),
        ({"method": "noisy_topk"}, {"recipe": "method"}),
    ],
    ids=["added", "budgets", "annealed", "sigma_moe", "noisy_topk"],
)
def test_a_model_over_two_gpus_trains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: dict[str, Any], options: dict[str, Any]
) -> None:
    monkeypatch.setattr(Accelerator, "device", FIRST)
    rows, options = uneven_toy_rows(16), dict(options)
    with pretended_devices():
        made, teacher = model_of(**model), tiny_dense_model() if options.pop("teacher", False) else None
        spread_(made)
        trainer = LteTrainer(
            made,
            OnFirst(output_dir=str(tmp_path), **{**SETTINGS, **options}),
            train_dataset=rows,
            eval_dataset=rows,
            data_collator=LmCollator(PAD),
            teacher=teacher,
        )
        trainer.train()
    assert trainer.state.global_step == trainer.args.max_steps


@pytest.mark.parametrize(
    ("model", "options"),
    [
        ({}, {"on_nonfinite": "skip", "eval_strategy": "epoch", **ADDED}),
        ({}, {"layer_budgets": "sensitivity", "max_steps": 2}),
        ({"method": "sigma_moe"}, {"recipe": "method"}),
    ],
    ids=["added", "budgets", "sigma_moe"],
)
def test_all_that_processes_sum_lies_on_their_gpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: dict[str, Any], options: dict[str, Any]
) -> None:
    """NCCL by itself knows no tensors of the CPU; the other process has the same here."""
    sums: list[torch.device] = []

    def note(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        sums.append(place_of(tensor))
        return tensor

    def reduce(self: Any, tensor: Tensor, reduction: str = "sum") -> Tensor:
        return note(tensor) * (2 if reduction == "sum" else 1)

    monkeypatch.setattr(dist, "all_reduce", lambda tensor: note(tensor).mul_(2))
    for module in (global_sums, routing_loss):
        monkeypatch.setattr(module, "num_sharing", lambda: 2)
    monkeypatch.setattr(Accelerator, "device", FIRST)
    monkeypatch.setattr(Accelerator, "num_processes", 2)
    monkeypatch.setattr(Accelerator, "reduce", reduce)
    monkeypatch.setattr(Accelerator, "gather", lambda self, tensor: torch.cat([note(tensor.reshape(-1))] * 2))
    monkeypatch.setattr(Accelerator, "pad_across_processes", lambda self, tensor, **kwargs: note(tensor))
    rows = uneven_toy_rows(16)
    with pretended_devices():
        made = model_of(**model)
        pretend_(tensors_of(made), FIRST)
        arguments = OnFirst(output_dir=str(tmp_path), **{**SETTINGS, **options})
        LteTrainer(made, arguments, train_dataset=rows, eval_dataset=rows, data_collator=LmCollator(PAD)).train()
    assert set(sums) == {FIRST}


@pytest.mark.parametrize("config", [{"dropped_bias": True}, {"router_rank": 4}], ids=["dropped_bias", "router_rank"])
def test_routers_start_where_weights_lie_on_the_cpu_beside_a_gpu(config: dict[str, Any]) -> None:
    model = model_of(**config)
    ffns = list(lte.sparse_ffns(model).values())
    rows = toy_rows(8, 16)
    with pretended_devices():
        offload_(model, [module for module in model.modules() if isinstance(module, Router)])
        batches = [{name: value.to(FIRST) for name, value in LmCollator(PAD)([*rows]).items()}]
        fit_routers_(model, batches)
        if "dropped_bias" in config:
            vectors = mean_dropped_outputs(model, batches, 0.5)
            start = DroppedStart(ffns, [vector.to(FIRST) for vector in vectors])
            start.follow_(0.5)
            DroppedStart.of_state(ffns, start.state()).follow_(1.0)
            assert {place_of(vector) for vector in (*start.vectors, *start.rests)} == {CPU}
            assert all(ffn.down_proj.bias.any() for ffn in ffns)
        loss_rises(model, batches, (0.5,))
        calibrate_thresholds_(model, batches, 0.5)


def test_what_the_first_process_sends_names_none_of_its_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors of its GPU would lie there in all processes."""
    sent: list[Any] = []
    monkeypatch.setattr(trainer_module, "broadcast_object_list", sent.extend)
    with pretended_devices():
        vector = torch.ones(2)
        pretend_(vector, FIRST)
        process = SimpleNamespace(args=SimpleNamespace(world_size=2))
        found = LteTrainer._of_first_process(process, {"vectors": [vector], "share": 0.5})
        assert {place_of(each) for each in tree_leaves((sent, found)) if isinstance(each, Tensor)} == {CPU}
    assert found["share"] == 0.5
