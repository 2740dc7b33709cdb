"""Feedback that holds the target sparsity while training: on eta in stage 1, on the router biases in stage 2."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lte.nn.shards import scale_and_shift_
from lte.nn.sparse_ffn import SparseFfn


@dataclass
class EtaController:
    """Proportional-integral control of log eta by the sparsity error.

    With e = target - sparsity after every optimiser step:
        log eta_base += integral_gain * e,   eta = eta_base * exp(proportional_gain * e).
    The logarithm makes the gains independent of the size of the task loss: an error of 5 points makes eta 2.7 times as
    large at once and 1.5% larger with every step that it lasts. The gains come from trials with
    SmolLM2-135M (docs/experiments.md).

    Attributes:
        eta: weight of the efficiency loss for the next step.
        log_base: logarithm of the integral part.
    """

    integral_gain: float = 0.3
    proportional_gain: float = 20.0
    log_base: float = math.log(0.03)
    eta: float = 0.03
    log_range: tuple[float, float] = (math.log(1e-5), math.log(1e3))

    @classmethod
    def starting_at(cls, eta: float) -> EtaController:
        """A controller whose integral part starts at `eta`."""
        return cls(log_base=math.log(eta), eta=eta)

    @property
    def settled(self) -> float:
        """The integral part: eta without the answer to the latest error."""
        return math.exp(self.log_base)

    def update(self, target: float, sparsity: float) -> float:
        """Takes the step's target and measured sparsity (shares), returns eta for the next step."""
        error = target - sparsity
        low, high = self.log_range
        self.log_base = min(max(self.log_base + self.integral_gain * error, low), high)
        self.eta = math.exp(min(max(self.log_base + self.proportional_gain * error, low), high))
        return self.eta


# Share of the measured error that one step corrects: slow against the noise of a batch, fast against the drift of
# the routers' inputs.
BIAS_RATE = 0.2
QUANTILE_SAMPLES = 1 << 18


@torch.no_grad()
def target_logit(
    logits: Sequence[Tensor],
    token_masks: Sequence[Tensor | None],
    target: float,
    gather: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """The logit below which the share `target` of all experts lies, over layers and counted tokens.

    Args:
        logits: router logits [B, T, E] of each layer, which may lie on several devices.
        token_masks: [B, T] of each layer, true where a token counts; `None` counts all.
        target: target sparsity.
        gather: makes of the logits [N] of this process those of all processes that share a batch.

    Returns:
        A scalar on the first logits' device, found on at most `QUANTILE_SAMPLES` logits spread evenly over all.
    """
    masked = [
        # Some blocks flatten [B, T] before their FFN.
        layer if mask is None else layer.masked_fill(~mask.to(layer.device).reshape(*layer.shape[:-1], 1), float("nan"))
        for layer, mask in zip(logits, token_masks, strict=True)
    ]
    flat = torch.cat([layer.flatten().to(masked[0].device) for layer in masked])
    # An odd stride meets every expert and layer, whatever their number.
    stride = max(1, flat.numel() // QUANTILE_SAMPLES) | 1
    sample = flat[::stride][: 2 * QUANTILE_SAMPLES]
    if gather is not None:
        sample = gather(sample)
        sample = sample[:: max(1, sample.numel() // QUANTILE_SAMPLES) | 1]
    return torch.nanquantile(sample[: 2 * QUANTILE_SAMPLES], target)


@torch.no_grad()
def shift_router_biases_(ffns: Iterable[SparseFfn], shift: Tensor | float) -> None:
    """Adds `shift` to every router bias: a positive shift switches more experts on, in all layers alike."""
    for ffn in ffns:
        scale_and_shift_(ffn.router.bias, 1.0, shift)
