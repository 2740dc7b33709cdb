"""How long a whole run will take, told once its first steps are measured: training and all that follows it."""

from __future__ import annotations

from dataclasses import dataclass

from lte.progress import duration
from lte.train.config import TrainConfig

# Passes over the calibration text until thresholds meet the target, at most.
_ROUNDS = 4
# Of a written file with its checksum, in bytes per second: what ordinary disks of cloud machines do.
_WRITTEN_PER_S = 5e8


@dataclass(frozen=True, kw_only=True)
class RunShape:
    """What decides how long a run takes, beside its steps.

    Attributes:
        config: of the training.
        stages: which run.
        tokens_per_step: of one optimiser step, in all processes.
        tokens_measured: held-out tokens.
        teaches: whether a teacher runs in each step.
        checkpoint_bytes: of one checkpoint.
        model_bytes: of the saved model.
        measured_s: seconds that measuring the model took before training; `None` if it was not measured.
    """

    config: TrainConfig
    stages: tuple[int, ...]
    tokens_per_step: int
    tokens_measured: int
    teaches: bool
    checkpoint_bytes: int
    model_bytes: int
    measured_s: float | None = None

    def parts(self, step_s: float, steps: int) -> dict[str, float]:
        """Seconds of each part that is to come, by name.

        A forward pass is taken for a third of a training pass, which has one more for a teacher and one for activations
        that are computed again.

        Args:
            step_s: of one optimiser step.
            steps: that are to come.
        """
        passes = 3 + self.teaches + self.config.gradient_checkpointing
        token_s = step_s / self.tokens_per_step / passes
        thresholds = _ROUNDS * self.config.calibration_tokens if self.config.sets_thresholds(self.stages) else 0
        saves = steps // self.config.save_steps + 1
        return {
            "training": step_s * steps,
            "checkpoints": saves * self.checkpoint_bytes / _WRITTEN_PER_S,
            "thresholds": thresholds * token_s,
            "saving": self.model_bytes / _WRITTEN_PER_S,
            "measuring": self.tokens_measured * token_s if self.measured_s is None else self.measured_s,
        }

    def sentence(self, elapsed_s: float, step_s: float, steps: int, writes_answers: bool = False) -> str:
        """How long the run will take, for whom it runs.

        Args:
            elapsed_s: seconds since it began.
            step_s: of one optimiser step.
            steps: that are to come.
            writes_answers: whether the model writes answers after training, whose lengths nobody knows.
        """
        parts = self.parts(step_s, steps)
        total = elapsed_s + sum(parts.values())
        rest = ", ".join(f"{duration(seconds)} {name}" for name, seconds in parts.items() if seconds >= 0.05)
        answers = ", without the answers that it will write" if writes_answers else ""
        return f"About {duration(total)} in all{answers}: {duration(elapsed_s)} until now, {rest}."
