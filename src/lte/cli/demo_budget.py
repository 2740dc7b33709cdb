"""Fitting the demo into its minutes: the number of training steps from the measured time of one."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lte.train.objective import language_terms

# More steps are not taken however fast the machine is, so that fast machines all report the same run.
MAX_STEPS = 96
# Fewer would teach the routers nothing; a machine this slow overruns its minutes, and is told so.
MIN_STEPS = 10
# Trainer, optimiser, and the sparse FFNs' router losses on top of what `time_step` times.
OVERHEAD = 1.1
STAGE1_SHARE = 0.5


@dataclass(frozen=True)
class Budget:
    """A number of minutes from the start of the demo.

    Attributes:
        minutes: in all.
        start: `time.monotonic()` when the demo began.
        imports_s: seconds that the imports took before that.
    """

    minutes: float
    start: float
    imports_s: float = 6.0

    def elapsed_s(self) -> float:
        """Seconds since the command was entered."""
        return time.monotonic() - self.start + self.imports_s

    def steps(self, step_s: float, rest_s: float, max_steps: int) -> tuple[int, int]:
        """Optimiser steps of stage 1 and 2 that fit, when `rest_s` seconds are needed after them.

        Args:
            step_s: seconds of one forward and backward pass.
            rest_s: seconds of everything after training.
            max_steps: of both stages together.
        """
        left = 60 * self.minutes - self.elapsed_s() - rest_s
        total = min(max_steps, max(MIN_STEPS, int(left / (OVERHEAD * step_s))))
        first = max(1, round(STAGE1_SHARE * total))
        return first, max(1, total - first)


def time_step(model: Any, teacher: Any, batch: dict[str, Tensor]) -> float:
    """Seconds of one forward and backward pass with its teacher; nothing is changed."""

    def step() -> None:
        with torch.autocast(model.device.type, torch.bfloat16):
            with torch.no_grad():
                target = teacher(input_ids=batch["input_ids"], use_cache=False).logits
            logits = model(input_ids=batch["input_ids"], use_cache=False).logits
            loss = language_terms(logits, batch["labels"], target)[1]
        loss.backward()

    step()  # the first one sets up threads and memory
    seconds = timed(step)
    model.zero_grad(set_to_none=True)
    return seconds


def timed(call: Callable[[], object]) -> float:
    """Seconds that a call takes."""
    start = time.monotonic()
    call()
    return time.monotonic() - start
