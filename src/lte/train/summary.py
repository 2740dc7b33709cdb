"""What a training did, as result records and reports take it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lte.train.routing_loss import LAYER_PREFIX


@dataclass(frozen=True)
class TrainingSummary:
    """What training did.

    Attributes:
        tokens_trained: tokens in all forward passes with a backward pass, without padding, both stages.
        wall_time_s: seconds of both stages, without what an interrupted run spent.
        log_history: Trainer's log entries, each with its `stage`; steps are counted over both stages.
        eta: weight of the efficiency loss that its controller had settled on, in the last stage that had one; `None` if
            none had.
    """

    tokens_trained: int
    wall_time_s: float
    log_history: list[dict[str, Any]]
    eta: float | None = None

    def layer_history(self, most: int = 64) -> dict[str, list[Any]] | None:
        """The share of active experts of each layer over training, at `most` logged steps at most.

        Returns:
            `step` [S], stage 2 going on from stage 1, `stage` [S], and `active_fraction` [S, L]; `None` if no routed
            step was logged.
        """
        entries = [entry for entry in self.log_history if f"{LAYER_PREFIX}00" in entry]
        if not entries:
            return None
        count = min(most, len(entries))
        picked = [entries[index * (len(entries) - 1) // max(1, count - 1)] for index in range(count)]
        return {
            "step": [entry["step"] for entry in picked],
            "stage": [entry["stage"] for entry in picked],
            "active_fraction": [
                [round(share, 4) for name, share in entry.items() if name.startswith(LAYER_PREFIX)] for entry in picked
            ],
        }
