"""Routers and predictors of the baselines, in fp32, and fitting them to what a dense model does.

Shapes: D hidden size, R width of the layer between, O outputs (experts or neurons), N tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lte.hf.install import StockFfn
from lte.methods.calibration import observe_
from lte.methods.method import Batches
from lte.nn.metering import metered_modules
from lte.nn.router import Fp32Linear

# Rows of one optimiser step, as in MoEfication's and Deja Vu's released code.
FIT_ROWS = 512


class LinearSelector(nn.Module):
    """A linear layer D -> O without bias, normal with a standard deviation of `std`, or 0.

    Args:
        stock: the FFN that it selects in; on the meta device nothing is drawn.
        outputs: O.
        std: of the weights at the start.
        seed: of the draw, with the FFN's index added.
    """

    def __init__(self, stock: StockFfn, outputs: int, std: float = 0.0, seed: int = 0):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(outputs, stock.hidden_size, device=stock.device, dtype=torch.float32))
        _draw_(self.weight, std, seed + stock.index)

    def forward(self, x: Tensor) -> Tensor:
        """Hidden states [..., D] to fp32 logits [..., O]."""
        return Fp32Linear.apply(x, self.weight, None)


class TwoLayerSelector(nn.Module):
    """Two linear layers D -> R -> O without biases, with a tanh between them or nothing.

    Args:
        stock: as for `LinearSelector`.
        width: R.
        outputs: O.
        tanh: whether there is one.
        seed: as for `LinearSelector`.
    """

    def __init__(self, stock: StockFfn, width: int, outputs: int, *, tanh: bool, seed: int = 0):
        super().__init__()
        self.tanh = tanh
        self.down = nn.Parameter(torch.zeros(width, stock.hidden_size, device=stock.device, dtype=torch.float32))
        self.weight = nn.Parameter(torch.zeros(outputs, width, device=stock.device, dtype=torch.float32))
        _draw_(self.down, stock.hidden_size**-0.5, 2 * (seed + stock.index))
        _draw_(self.weight, width**-0.5, 2 * (seed + stock.index) + 1)

    def forward(self, x: Tensor) -> Tensor:
        """Hidden states [..., D] to fp32 logits [..., O]."""
        inner = Fp32Linear.apply(x, self.down, None)
        return Fp32Linear.apply(inner.tanh() if self.tanh else inner, self.weight, None)


@torch.no_grad()
def _draw_(weight: Tensor, std: float, seed: int) -> None:
    if not weight.is_meta:
        # On the CPU, so that the device does not matter.
        weight.copy_(std * torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed)))


def count_weights(selector: nn.Module) -> int:
    """How many weights a selector reads for a token."""
    return sum(parameter.numel() for parameter in selector.parameters())


def fit_selectors_(
    model: Any,
    batches: Batches,
    selector: str,
    loss: Callable[[Any, Tensor, Tensor, Tensor], Tensor],
    *,
    epochs: int,
    learning_rate: float,
) -> None:
    """Trains one selector per FFN with Adam, all at once, on what the dense model computes; nothing else changes.

    Each epoch is one pass of the dense model over the batches, so no activations are stored.

    Args:
        model: a model of a method, freshly installed.
        batches: calibration text.
        selector: name of the selector in each FFN.
        loss: of the FFN, x [N, D], act(x W_gate) [N, F] and h [N, F].
        epochs: passes over the batches.
        learning_rate: of Adam.
    """
    ffns: dict[str, Any] = dict(metered_modules(model))
    optimizers = {
        name: torch.optim.Adam(getattr(ffn, selector).parameters(), learning_rate) for name, ffn in ffns.items()
    }

    def see(name: str, ffn: Any, values: tuple[Tensor, ...]) -> None:
        for rows in zip(*(value.split(FIT_ROWS) for value in values), strict=True):
            with torch.enable_grad():
                value = loss(ffn, *rows)
                if not math.isfinite(value.item()):
                    raise ValueError(f"the loss of {name}.{selector} must be finite, got {value.item()}")
                optimizers[name].zero_grad()
                value.backward()
            optimizers[name].step()

    # Training may have left them frozen.
    parameters = [parameter for ffn in ffns.values() for parameter in getattr(ffn, selector).parameters()]
    trainable = [parameter.requires_grad for parameter in parameters]
    for parameter in parameters:
        parameter.requires_grad_(True)
    try:
        for _ in range(epochs):
            observe_(model, batches, see, ffns)
    finally:
        for parameter, flag in zip(parameters, trainable, strict=True):
            parameter.grad = None
            parameter.requires_grad_(flag)
