"""What a trainer of routing does between its steps: stages, control of the sparsity, progress."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from transformers import ProgressCallback, TrainerCallback

if TYPE_CHECKING:
    from lte.train.trainer import RoutingMixin

# What the progress bar shows, and how.
LOG_NAMES = {
    "task_loss": "task",
    "distillation_loss": "kl",
    "efficiency_loss": "eff",
    "separability_loss": "sep",
    "eta": "eta",
    "active_fraction": "active",
    "near_threshold": "near_tau",
}


class RoutingCallback(TrainerCallback):
    """Switches stages before the steps, and controls the sparsity after them."""

    def __init__(self, trainer: RoutingMixin):
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.begin_stages()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.begin_step()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.drop_nonfinite_step()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        self.trainer.control_sparsity()
        if self.trainer.stops:
            # Until the process is killed there may be time for a checkpoint, not for an evaluation before it.
            control.should_save, control.should_evaluate = True, False
            control.should_training_stop = True
        if self.trainer.schedule.starts_stage2(state.global_step):
            # An entry of the log is of one stage.
            control.should_log = True
        return control

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        if self.trainer.stops:
            # The checkpoint is written. The trainer would write it again, or delete it for the best one.
            control.should_save = control.should_evaluate = False
            state.best_model_checkpoint = None
        return control


class StepTimes(TrainerCallback):
    """Tells once how long a step takes, when the first ones are measured.

    Args:
        tell: is called with the seconds of a step and how many are to come.
        after: steps of this training until then; in a shorter one nothing is told.
        begin: is called before the first one.
    """

    # The first steps compile, and fill caches.
    SKIPPED = 3

    def __init__(
        self, tell: Callable[[float, int], object], after: int = 10, begin: Callable[[], object] = lambda: None
    ):
        self.tell, self.after, self.begin = tell, after, begin
        self.times: list[float] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.times.clear()
        self.begin()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if len(self.times) > self.after:
            return
        self.times.append(time.monotonic())
        if len(self.times) > self.after:
            kept = self.times[self.SKIPPED :]
            steps = [after - before for before, after in itertools.pairwise(kept)]
            self.tell(statistics.median(steps), state.max_steps - state.global_step)


class LteProgress(ProgressCallback):
    """Progress bar that shows the losses, eta, and the active fraction instead of printing dicts."""

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if self.training_bar is not None and logs and "active_fraction" in logs:
            shown = {short: f"{logs[name]:.3g}" for name, short in LOG_NAMES.items() if name in logs}
            self.training_bar.set_postfix(shown)
