"""A price of sparsity for each layer, which holds that layer's own target.

Shapes: L layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from lte.train.late_values import on_device
from lte.train.sparsity_controller import EtaController


class LayerPrices:
    """One `EtaController` per layer.

    Args:
        targets: sparsity of each layer where the ramp ends.
    """

    def __init__(self, targets: Sequence[float]):
        self.targets = list(targets)
        self.controllers = [EtaController() for _ in self.targets]

    def update(self, share: float, sparsities: Sequence[float]) -> float:
        """Takes the share of the targets that holds now and the measured sparsities; returns the mean of the prices."""
        for controller, target, sparsity in zip(self.controllers, self.targets, sparsities, strict=True):
            controller.update(share * target, sparsity)
        return self.mean

    def restart(self) -> None:
        """Lets each price start where it has settled, without the answer to its latest error."""
        self.controllers = [EtaController.starting_at(each.settled) for each in self.controllers]

    @property
    def mean(self) -> float:
        """Of the prices."""
        return sum(each.eta for each in self.controllers) / len(self.controllers)

    def etas(self, device: torch.device) -> Tensor:
        """The weights of the layers' efficiency losses, [L]."""
        return on_device([each.eta for each in self.controllers], device)

    def logged(self) -> dict[str, float]:
        """Price and target of each layer, by the names of the log."""
        etas = {f"layers/eta_{layer:02d}": each.eta for layer, each in enumerate(self.controllers)}
        return etas | {f"layers/target_{layer:02d}": target for layer, target in enumerate(self.targets)}

    def state(self) -> dict[str, Any]:
        """What a checkpoint must hold, JSON-ready."""
        return {"targets": self.targets, "controllers": [asdict(each) for each in self.controllers]}

    @classmethod
    def of_state(cls, state: dict[str, Any]) -> LayerPrices:
        """The inverse of `state`."""
        made = cls(state["targets"])
        made.controllers = [
            EtaController(**{**each, "log_range": tuple(each["log_range"])}) for each in state["controllers"]
        ]
        return made
