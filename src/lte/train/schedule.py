"""Which stage of training a step belongs to, and what holds there: learning rate and target sparsity."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from lte.train.config import Stage


@dataclass(frozen=True)
class Schedule:
    """Two stages over the optimiser steps of one training, numbered from 0.

    Attributes:
        stages: what each stage does.
        max_steps: steps of both.
        stage1_steps: how many of them are stage 1; 0 and `max_steps` leave one stage.
        target_sparsity: where the ramp of stage 1 leads.
        ramp_ratio: share of stage 1 over which the target rises from 0.
        warmup: steps with a rising learning rate in a stage of so many steps.
        stage2_rate: peak learning rate of stage 2 over that of stage 1.
        regroup_count: how often neurons move to other experts.

    Raises:
        ValueError: if the ramp has too few steps for that.
    """

    stages: tuple[Stage, Stage]
    max_steps: int
    stage1_steps: int
    target_sparsity: float
    ramp_ratio: float
    warmup: Callable[[int], int]
    stage2_rate: float = 1.0
    regroup_count: int = 0

    def __post_init__(self) -> None:
        if self.regroup_count and self.regroup_count >= self.ramp_steps:
            raise ValueError(
                f"regroup_count must be below the {self.ramp_steps} steps over which the target rises, got "
                f"regroup_count={self.regroup_count}; lower it, or make stage 1 longer"
            )

    @property
    def ramp_steps(self) -> int:
        """Steps of stage 1 over which the target rises."""
        return int(self.ramp_ratio * self.stage1_steps)

    @property
    def regroup_steps(self) -> tuple[int, ...]:
        """The steps before which neurons move: they part the ramp evenly."""
        parts = self.regroup_count + 1
        return tuple(self.ramp_steps * part // parts for part in range(1, parts))

    def stage_at(self, step: int) -> Stage:
        """The stage that does the step; after the last step, the last stage."""
        return self.stages[int(self.stage1_steps <= min(step, self.max_steps - 1))]

    def starts_stage2(self, step: int) -> bool:
        """Whether stage 2 follows on stage 1 with this step."""
        return 0 < step == self.stage1_steps < self.max_steps

    def target_at(self, step: int) -> float:
        """The target sparsity that holds after so many steps."""
        # At a switch that of the stage that ends.
        if self.stage_at(max(0, step - 1)).number == 2:
            return self.target_sparsity
        return self.target_sparsity * min(1.0, step / max(1, self.ramp_steps))

    def share_of_stage2(self, step: int) -> float:
        """Which share of stage 2 is over before the step; below 0 in stage 1."""
        return (step - self.stage1_steps) / max(1, self.max_steps - self.stage1_steps)

    def learning_rate(self, step: int, *, routers: bool = False) -> float:
        """The learning rate of a step over its peak in stage 1: 0 for `routers` where they are frozen."""
        stage = self.stage_at(step)
        if routers and not stage.train_routers:
            return 0.0
        second = stage.number == 2
        steps = self.max_steps - self.stage1_steps if second else self.stage1_steps
        place, warmup = step - self.stage1_steps * second, self.warmup(steps)
        peak = self.stage2_rate if second else 1.0
        if place < warmup:
            return peak * place / max(1, warmup)
        if stage.scheduler == "constant_with_warmup":
            return peak
        return peak * max(0.0, (steps - place) / max(1, steps - warmup))
