"""SIGTERM, losses that are not finite, memory that is not enough, processes that die, and curves that go on."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import TrainerCallback

from lte.cli.command import explanation
from lte.train import interruption
from lte.train.checkpoints import newest_checkpoint
from lte.train.config import TrainConfig
from lte.train.curves import named_run, write_in_one_place
from lte.train.interruption import EXIT_TERMINATED, StopRequest, TrainingStopped, keep_workers, noted_sigterm
from lte.train.objective import NonFiniteLossError
from lte.train.two_stage import training_arguments
from tests.processes import launch
from tests.train.toy import STEPS, toy_rows, trainer_of


class At(TrainerCallback):
    """Does something at the end of some steps."""

    def __init__(self, action: Any, *steps: int):
        self.action, self.steps = action, steps

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step in self.steps:
            self.action()


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def weights_of(trainer: Any) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


def test_a_sigterm_leaves_a_checkpoint_from_which_the_run_goes_on_as_if_nothing_had_been(tmp_path: Path) -> None:
    whole = trainer_of(tmp_path / "whole")
    whole.train()
    first = trainer_of(tmp_path / "run", callbacks=[At(terminate, 2)], save_steps=100)
    with pytest.raises(TrainingStopped, match="143") as stopped:
        first.train()
    assert stopped.value.code == EXIT_TERMINATED == 143
    assert f"after step 2 of {STEPS} by SIGTERM; {tmp_path / 'run' / 'checkpoint-2'} holds" in stopped.value.message
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert newest_checkpoint(tmp_path / "run") == tmp_path / "run" / "checkpoint-2"
    again = trainer_of(tmp_path / "run", save_steps=100)
    again.train(resume_from_checkpoint=True)
    expected = weights_of(whole)
    assert all(torch.equal(value, expected[name]) for name, value in weights_of(again).items())


def test_a_handler_of_the_callers_own_stays(tmp_path: Path) -> None:
    seen: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: seen.append(number))
    try:
        trainer_of(tmp_path, callbacks=[At(terminate, 2)]).train()
    finally:
        signal.signal(signal.SIGTERM, before)
    assert seen == [signal.SIGTERM]


def test_a_run_without_checkpoints_ends_at_once(tmp_path: Path) -> None:
    handlers: list[Any] = []
    look = At(lambda: handlers.append(signal.getsignal(signal.SIGTERM)), 2)
    trainer_of(tmp_path, callbacks=[look], save_strategy="no").train()
    assert handlers == [signal.SIG_DFL]


def test_a_sigterm_that_a_launcher_passes_on_is_no_second_one(monkeypatch: pytest.MonkeyPatch) -> None:
    raised: list[int] = []
    monkeypatch.setattr(signal, "raise_signal", raised.append)
    request = StopRequest()
    with noted_sigterm(request, True):
        terminate()
        terminate()
        assert request.asked
        assert not raised
        monkeypatch.setattr(interruption, "REPEATED_S", 0.0)
        terminate()
        assert raised == [signal.SIGTERM]
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_handler_that_comes_in_the_block_stays() -> None:
    with noted_sigterm(StopRequest(), True):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    assert signal.signal(signal.SIGTERM, signal.SIG_DFL) is signal.SIG_IGN


class Watch(TrainerCallback):
    """Notes after which steps a checkpoint was written or the model evaluated."""

    def __init__(self, action: Any = None):
        self.events: list[tuple[str, int]] = []
        self.action = action

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.events.append(("save", state.global_step))
        if self.action is not None and state.global_step == state.max_steps:
            self.action()

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.events.append(("evaluation", state.global_step))


def test_a_sigterm_writes_one_checkpoint_and_evaluates_nothing(tmp_path: Path) -> None:
    watch = Watch()
    trainer = trainer_of(
        tmp_path,
        callbacks=[At(terminate, 2), watch],
        save_strategy="epoch",
        eval_strategy="epoch",
        max_steps=-1,
        eval_dataset=toy_rows(8, 16),
    )
    with pytest.raises(TrainingStopped):
        trainer.train()
    assert watch.events == [("save", 2)]


class InEvaluation(TrainerCallback):
    """Sends a SIGTERM with the first batch of an evaluation, and counts the batches of all of them."""

    def __init__(self) -> None:
        self.batches = 0

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.batches += 1
        if self.batches == 1:
            terminate()


@pytest.mark.parametrize("strategy", ["steps", "best"])
def test_a_sigterm_ends_an_evaluation_and_leaves_a_checkpoint(tmp_path: Path, strategy: str) -> None:
    seen, watch = InEvaluation(), Watch()
    settings = {"eval_strategy": "steps", "eval_steps": 5, "metric_for_best_model": "eval_loss", "stage1_ratio": 0.2}
    rows = {"eval_dataset": toy_rows(32, 16), "per_device_eval_batch_size": 8}
    saving = {"save_strategy": strategy, "save_steps": 100}
    trainer = trainer_of(tmp_path, callbacks=[seen, watch], **settings, **rows, **saving)
    with pytest.raises(TrainingStopped) as stopped:
        trainer.train()
    assert f"after step 5 of {STEPS} by SIGTERM; {tmp_path / 'checkpoint-5'} holds" in stopped.value.message
    assert seen.batches == 1
    assert watch.events == [("save", 5)]
    assert newest_checkpoint(tmp_path) == tmp_path / "checkpoint-5"
    assert trainer.state.best_model_checkpoint is None
    assert not any("eval_loss" in entry for entry in trainer.state.log_history)


def test_the_checkpoint_of_a_sigterm_stays_beside_the_best_one(tmp_path: Path) -> None:
    trainer = trainer_of(
        tmp_path, callbacks=[At(terminate, 5)], stage1_ratio=0.2, save_total_limit=1, eval_strategy="steps",
        eval_steps=2, load_best_model_at_end=True, metric_for_best_model="eval_loss", eval_dataset=toy_rows(8, 16),
    )  # fmt: skip
    with pytest.raises(TrainingStopped, match="143"):
        trainer.train()
    assert newest_checkpoint(tmp_path) == tmp_path / "checkpoint-5"


def test_a_sigterm_in_the_last_save_ends_the_run_too(tmp_path: Path) -> None:
    with pytest.raises(TrainingStopped) as stopped:
        trainer_of(tmp_path, callbacks=[Watch(terminate)]).train()
    assert (
        f"after step {STEPS} of {STEPS} by SIGTERM; {tmp_path / f'checkpoint-{STEPS}'} holds" in stopped.value.message
    )
    trainer_of(tmp_path).train(resume_from_checkpoint=True)
    # If one process has got it, the others do not go on to sums in which it takes no part.
    other = trainer_of(tmp_path / "other", save_strategy="no")
    other._asked_anywhere = lambda: True  # type: ignore[method-assign]
    with pytest.raises(TrainingStopped):
        other.train()


class WhoAmI(torch.utils.data.Dataset):
    """Says what a worker does at a SIGTERM."""

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> bool:
        return signal.getsignal(signal.SIGTERM) is signal.SIG_IGN


def test_workers_of_the_data_outlive_a_sigterm() -> None:
    started: list[int] = []
    loader = keep_workers(torch.utils.data.DataLoader(WhoAmI(), num_workers=1, worker_init_fn=started.append))
    assert [bool(each) for each in loader] == [True]


class Nan(TrainerCallback):
    """Makes the task's loss of some steps NaN, by a weight, and puts it back."""

    def __init__(self, *steps: int):
        self.steps = steps
        self.before: Tensor | None = None
        self.weights: list[dict[str, Tensor]] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step in self.steps:
            self.before = model.model.norm.weight.detach().clone()
            self.weights.append({name: value.clone() for name, value in model.state_dict().items()})
            model.model.norm.weight.data.fill_(float("nan"))

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if self.before is not None:
            model.model.norm.weight.data.copy_(self.before)
            self.before = None
            now = model.state_dict()
            assert all(torch.equal(value, now[name]) for name, value in self.weights[-1].items())


def test_a_step_that_is_not_finite_is_left_out_and_counted(tmp_path: Path) -> None:
    planted = Nan(1, 2, 4)
    trainer = trainer_of(tmp_path, callbacks=[planted], on_nonfinite="skip")
    trainer.train()
    assert len(planted.weights) == 3
    assert trainer.skipped_steps == 3
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry.get("skipped_steps", 0) for entry in logs] == [0, 1, 2, 2, 3, 3]
    assert all(torch.isfinite(torch.tensor([entry["loss"], entry.get("eta", 0.0)])).all() for entry in logs)
    assert all(bool(value.isfinite().all()) for value in trainer.model.state_dict().values())
    # Half of the steps trained on their tokens.
    whole = trainer_of(tmp_path / "whole", save_strategy="no")
    whole.train()
    assert trainer.tokens_trained * 2 == whole.tokens_trained
    again = trainer_of(tmp_path, on_nonfinite="skip")
    again.train(resume_from_checkpoint=True)
    assert again.skipped_steps == 3


def test_ten_of_them_in_a_row_end_the_run(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, callbacks=[Nan(*range(2, 30))], on_nonfinite="skip", max_steps=30, save_steps=100)
    with pytest.raises(
        NonFiniteLossError, match="the losses of 10 steps in a row are not finite, the last one at step 12"
    ):
        trainer.train()


def test_without_the_setting_the_first_one_ends_it(tmp_path: Path) -> None:
    with pytest.raises(
        NonFiniteLossError, match=r"the loss became nan at step 2 .* on_nonfinite=skip leaves such steps"
    ):
        trainer_of(tmp_path, callbacks=[Nan(2)]).train()
    with pytest.raises(ValueError, match=r"on_nonfinite must be one of .*stop.*skip.*got on_nonfinite='?never"):
        TrainConfig(on_nonfinite="never")  # type: ignore[arg-type]


def test_a_gradient_that_is_not_finite_is_left_out(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, on_nonfinite="skip", save_strategy="no")
    step = type(trainer).training_step

    def overflowing(*args: Any, **kwargs: Any) -> Tensor:
        loss = step(trainer, *args, **kwargs)
        if trainer.state.global_step == 3:
            trainer.model.model.norm.weight.grad.fill_(float("inf"))
        return loss

    trainer.training_step = overflowing
    trainer.train()
    assert trainer.skipped_steps == 1


def test_gradients_without_a_norm_cannot_be_left_out(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"max_grad_norm must be positive with on_nonfinite=skip.* max_grad_norm=0.0;"):
        trainer_of(tmp_path, on_nonfinite="skip", max_grad_norm=0.0)


def test_memory_that_is_not_enough_names_what_to_lower(tmp_path: Path) -> None:
    def full() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")

    trainer = trainer_of(tmp_path, callbacks=[At(full, 2)], gradient_accumulation_steps=2)
    rule = r"lower the batch size \(per_device_train_batch_size=4\) to 2 and raise gradient_accumulation_steps=2 to 4; "
    with pytest.raises(
        torch.OutOfMemoryError, match=rf"{rule}set gradient_checkpointing.*Tried to allocate 20.00 MiB"
    ) as caught:
        trainer.train()
    # The command adds nothing of its own.
    assert explanation(caught.value) == str(caught.value)
    assert str(explanation(torch.OutOfMemoryError("full"))).startswith(
        "the GPU is out of memory; lower --batch-size or"
    )


def test_a_resumed_run_writes_its_curves_where_it_began(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_RUN_ID", "WANDB_RESUME", "RANK"):
        monkeypatch.delenv(name, raising=False)
    output = tmp_path / "my-run" / "checkpoints"
    names = [named_run(output, ["wandb"]) for _ in range(2)]
    assert names[0] == names[1] == f"my-run-{os.environ['WANDB_RUN_ID']}"
    assert os.environ["WANDB_RESUME"] == "allow"
    # Another run of the same process does not go on with the curves of this one; what the user set stays.
    assert named_run(tmp_path / "next" / "checkpoints", ["wandb"]) == f"next-{os.environ['WANDB_RUN_ID']}"
    monkeypatch.setenv("WANDB_RUN_ID", "mine")
    named_run(output, ["wandb"])
    assert os.environ["WANDB_RUN_ID"] == "mine"
    monkeypatch.delenv("WANDB_RUN_ID")
    monkeypatch.delenv("WANDB_RESUME")
    assert named_run(tmp_path / "other" / "checkpoints", ["tensorboard"]) not in names
    assert "WANDB_RUN_ID" not in os.environ
    assert named_run(tmp_path / "none", []) is None
    assert not (tmp_path / "none").exists()
    assert training_arguments(TrainConfig(report_to="tensorboard"), output, 10).run_name == names[0]


def test_the_events_of_both_lie_in_one_folder(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for stop, resume in ((2, False), (None, True)):
        callbacks = [At(terminate, stop)] if stop else []
        trainer = trainer_of(tmp_path, callbacks=callbacks, report_to="tensorboard", save_steps=100)
        write_in_one_place(trainer.callback_handler.callbacks, tmp_path)
        try:
            trainer.train(resume_from_checkpoint=resume)
        except TrainingStopped:
            assert stop
    assert [path.name for path in tmp_path.glob("runs/*")]
    assert not list(tmp_path.glob("runs/*/*"))
    found = EventAccumulator(str(tmp_path / "runs"))
    found.Reload()
    assert [event.step for event in found.Scalars("train/task_loss")] == list(range(1, STEPS + 1))


CRASHING = """
import sys
import torch
from lte.train import processes
from tests.train.toy import trainer_of
from tests.train.test_interruption import At
import os
torch.set_num_threads(1)
processes.END_S = 1
def fail():
    raise torch.OutOfMemoryError("a planted lack of memory")
try:
    trainer_of(sys.argv[1], callbacks=[At(fail, 3)] if os.environ["RANK"] == "1" else []).train()
finally:
    # What waits for the other process, which waits for this one.
    torch.distributed.barrier()
print("the end")
"""


NAN_IN_ONE = """
import os
import sys
import torch
from tests.train.toy import trainer_of
torch.set_num_threads(1)
trainer = trainer_of(sys.argv[1], on_nonfinite="skip", save_strategy="no")
with_routing = trainer._with_routing
def planted(task, *rest):
    broken = os.environ["RANK"] == "0" and trainer.state.global_step in (1, 3)
    return with_routing(task * float("nan") if broken else task, *rest)
trainer._with_routing = planted
trainer.train()
assert trainer.skipped_steps == 2, trainer.skipped_steps
logged = [entry for entry in trainer.state.log_history if "loss" in entry]
assert all(0 < entry["task_loss"] < 10 for entry in logged) and len(logged) == 6, logged
"""


@pytest.mark.slow
def test_a_step_is_left_out_and_logged_where_one_process_alone_is_not_finite(tmp_path: Path) -> None:
    (tmp_path / "nan_in_one.py").write_text(NAN_IN_ONE)
    done = launch(2, tmp_path / "nan_in_one.py", tmp_path / "run", timeout_s=120)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_a_process_that_dies_takes_the_others_down_and_its_reason_is_on_the_screen(tmp_path: Path) -> None:
    (tmp_path / "crashing.py").write_text(CRASHING)
    done = launch(2, tmp_path / "crashing.py", tmp_path / "run", timeout_s=120)
    assert done.returncode != 0
    # Once as soon as it happens, and in what torchrun says at the end.
    reason = "process 1 failed: the training needs more memory than there is: lower the batch size"
    assert done.stderr.count(reason) == 2
    assert "a planted lack of memory" in done.stderr
    assert "the end" not in done.stdout
