"""The router of one FFN: a score per expert and token, in fp32 whatever the model's dtype."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lte.nn.router_context import RANK
from lte.nn.shards import assign_

# sigmoid(INITIAL_LOGIT) = 0.95: every expert starts on, far from the pole of the separability loss at
# tau = 0.5.
INITIAL_LOGIT = 3.0

ALWAYS_ON_LOGIT = 1000.0
"""The bias of experts that are always on, whose weights are 0: far above any shift of thresholds, and the score is 1 to
the last bit in every dtype, so that no loss has a gradient there."""


ROUTER_PARTS = ("weight", "bias", "down", "context_down", "context_weight")
"""All parameters that a router may have."""


class Fp32Linear(torch.autograd.Function):
    """x @ w.T + b in fp32 that keeps the input in its own dtype for the backward pass.

    A plain `x.float() @ w.T` stores an fp32 copy of the hidden state per layer: 8% more activation memory in
    bf16.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        out_dtype = torch.promote_types(torch.float32, weight.dtype)
        with torch.autocast(x.device.type, enabled=False):
            bias = None if bias is None else bias.to(out_dtype)
            return nn.functional.linear(x.to(out_dtype), weight.to(out_dtype), bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, bias = inputs
        ctx.save_for_backward(x, weight)
        ctx.has_bias = bias is not None

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grad_outputs
        x, weight = ctx.saved_tensors
        with torch.autocast(x.device.type, enabled=False):
            grad_x = (grad @ weight.to(grad.dtype)).to(x.dtype)
            flat = grad.flatten(0, -2)
            grad_weight = (flat.T @ x.flatten(0, -2).to(grad.dtype)).to(weight.dtype)
        grad_bias = flat.sum(0).to(weight.dtype) if ctx.has_bias else None
        return grad_x, grad_weight, grad_bias


class Router(nn.Module):
    """Router logits s = W x + b; the score of expert e is G_e = sigmoid(s_e) (paper, Eq. 1-2).

    Initialisation: W = 0 and b = 3, so that every score is 0.95. The converted model then computes exactly
    the dense function in hard mode, 0.95 of each FFN in soft mode, and no score sits on the pole of the
    separability loss; `lte.train.router_init` replaces W by a fit to the experts' norms before training where
    the recipe asks for it. The low-rank router x -> U (V x) + b starts with U = 0 and a random V for the same
    reason.

    Args:
        hidden_size: D, width of the FFN's input.
        num_experts: E.
        rank: rank of the low-rank form, `None` for the full D -> E layer.
        always_on: how many experts, the first ones, are always on.
        context: of how many tokens before a router also reads the mean, see `lte.nn.router_context`: s then has C m
            added, for the mean m of the summaries P x of those tokens. It starts with C = 0 and a random P.
    """

    # Those of routers that earlier versions pickled.
    always_on = 0
    context = 0

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        rank: int | None = None,
        always_on: int = 0,
        context: int = 0,
        **factory: Any,
    ):
        super().__init__()
        self.always_on, self.context = always_on, context
        width = min(RANK, hidden_size)
        self.context_down = nn.Parameter(torch.empty(width, hidden_size, **factory)) if context else None
        self.context_weight = nn.Parameter(torch.empty(num_experts, width, **factory)) if context else None
        self.down = nn.Parameter(torch.empty(rank, hidden_size, **factory)) if rank else None
        self.weight = nn.Parameter(torch.empty(num_experts, rank or hidden_size, **factory))
        self.bias = nn.Parameter(torch.empty(num_experts, **factory))
        self.reset_parameters()

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Sets the documented start values in place."""
        nn.init.zeros_(self.weight)
        nn.init.constant_(self.bias, INITIAL_LOGIT)
        if self.down is not None:
            nn.init.normal_(self.down, std=math.sqrt(1 / self.down.shape[-1]), generator=generator)
        if self.context_down is not None:
            assert self.context_weight is not None
            nn.init.normal_(self.context_down, std=math.sqrt(1 / self.context_down.shape[-1]), generator=generator)
            nn.init.zeros_(self.context_weight)
        self.pin_()

    @torch.no_grad()
    def pin_(self) -> None:
        """Makes the experts that are always on so, whatever was written into their rows."""
        if self.always_on:
            self.weight[: self.always_on] = 0
            if self.context:
                assert self.context_weight is not None
                self.context_weight[: self.always_on] = 0
            self.bias[: self.always_on] = ALWAYS_ON_LOGIT

    @torch.no_grad()
    def assign_(self, weight: Tensor, bias: Tensor) -> None:
        """Sets weight [E, D or R] and bias [E] but for the experts that are always on, also where they lie in parts."""
        weight, bias = weight.clone(), bias.clone()
        weight[: self.always_on] = 0
        bias[: self.always_on] = ALWAYS_ON_LOGIT
        assign_(self.weight, weight)
        assign_(self.bias, bias)

    def forward(self, x: Tensor, before: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """Maps hidden states [..., D] to fp32 logits [..., E].

        Args:
            x: of tokens.
            before: gives for their summaries [..., R] the means of those before each; for routers with a context.

        Raises:
            ValueError: if it is missing there.
        """
        added = None
        if self.context:
            if before is None:
                raise ValueError(
                    f"router_context must be 0 where a router is asked about hidden states alone, got "
                    f"router_context={self.context}"
                )
            added = Fp32Linear.apply(before(Fp32Linear.apply(x, self.context_down, None)), self.context_weight, None)
        if self.down is not None:
            x = Fp32Linear.apply(x, self.down, None)
        logits = Fp32Linear.apply(x, self.weight, self.bias)
        return logits if added is None else logits + added
