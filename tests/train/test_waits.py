"""Where a step of training makes the host wait for the device, counted on a CPU by what is asked of tensors."""

from __future__ import annotations

import traceback
from collections import Counter
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import TrainerCallback

from tests.tiny_models import tiny_dense_model
from tests.train.toy import trainer_of

needs_torchao = pytest.mark.skipif(find_spec("torchao") is None, reason="needs torchao (pip install torchao)")

# On a GPU each of these waits until it has done all that was queued, as a tensor of numbers of the host does, too.
WAITS = {"_local_scalar_dense", "nonzero", "equal", "is_nonzero", "lift_fresh"}
# What is on the CPU whatever the model is on: the collator's tensors, the rate's, and numbers that are on their way.
# The numbers of steps that optimisers count are there, too; torchao's rate is not.
ON_HOST = ("data/rows.py", "torch/optim/", "torch/utils/data", "late_values.py", "_layer_sparsities", "random.py")


class Waits(TorchDispatchMode, TrainerCallback):
    """Counts them in each step from one on, by the place in a file that asked."""

    def __init__(self, first: int):
        super().__init__()
        self.first, self.steps = first, list[Counter[str]]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.name.partition("::")[2] in WAITS:
            self.note()
        return func(*args, **(kwargs or {}))

    def note(self) -> None:
        """Counts what is asked of a tensor now, by who asks."""
        if not self.steps:
            return
        stack = [f"{frame.filename} {frame.name}" for frame in traceback.extract_stack(limit=60)]
        if not any(place in frame for frame in stack for place in ON_HOST):
            asked = next(frame for frame in stack[-2::-1] if "/torch/" not in frame and "test_waits" not in frame)
            self.steps[-1][asked.rpartition("/")[2]] += 1

    def watch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Has what a CPU does without an operator counted, too."""
        for name in ("tolist", "cpu", "numpy"):
            call = getattr(torch.Tensor, name)
            monkeypatch.setattr(torch.Tensor, name, lambda *args, call=call: [self.note(), call(*args)][1])

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step >= self.first:
            self.steps.append(Counter())


# Transformers asks of each batch whether it holds packed documents: the model's pass and the teacher's.
OF_PASSES = Counter({"masking_utils.py find_packed_sequence_indices": 2})
SKIPS = Counter({"routing_control.py _clip_grad_norm": 1})


@pytest.mark.parametrize(
    ("options", "more"),
    [
        ({}, Counter()),
        ({"layer_budgets": "sensitivity"}, Counter()),
        ({"on_nonfinite": "skip"}, SKIPS),
        ({"gradient_accumulation_steps": 2}, OF_PASSES),
        pytest.param({"optim": "adamw_torch_8bit"}, Counter(), marks=needs_torchao),
    ],
)
def test_a_step_waits_for_the_device_where_it_is_known_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], more: Counter[str]
) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **kwargs: function)
    waits = Waits(1)
    waits.watch(monkeypatch)
    settings = {"max_steps": 6, "save_strategy": "no", "logging_steps": 100, "disable_tqdm": True, **options}
    trainer = trainer_of(tmp_path, callbacks=[waits], teacher=tiny_dense_model(), **settings)
    with waits:
        trainer.train()
    # Only copies to GPUs of CUDA keep what they read until they are done.
    assert not trainer.accelerator.non_blocking
    first, end_of_stage1, *stage2 = waits.steps
    stage2.pop()  # with what comes after training
    assert first == OF_PASSES + more
    assert stage2 == [OF_PASSES + more] * 2
    # The log's entry of a stage: the loss, the norm of the gradients, all means in one, and a rate on the device.
    rate = Counter({"routing_loss.py log": 1} if "optim" in options else {})
    means = Counter({"trainer.py _maybe_log_save_evaluate": 2, "routing_loss.py _means": 2})
    assert end_of_stage1 - first == means + rate


def test_a_rate_that_deepspeed_does_not_know_yet_is_0(tmp_path: Path) -> None:
    def unknown() -> None:
        raise AssertionError("need to call step() first")

    trainer = trainer_of(tmp_path)
    trainer.is_deepspeed_enabled, trainer.lr_scheduler = True, SimpleNamespace(get_last_lr=unknown)
    assert trainer._get_learning_rate() == 0
