"""torchao's Adam of narrow moments with less work for the host in each step.

torchao (0.18) calls `torch.compile` anew for each parameter in each step. With the 400 parameters of a model of 1.5B
that keeps the host busy for longer than an H200 needs for the step's forward and backward passes.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

# What this file calls and how: where torchao changes it, its own step is taken.
_ARGUMENTS = (
    *("p", "grad", "step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "lr", "beta1", "beta2", "weight_decay", "eps"),
    *("IS_ADAMW", "BF16_STOCHASTIC_ROUND"),
)
_MOMENTS = ("exp_avg", "exp_avg_sq")


@cache
def with_fast_steps(kind: type[Any]) -> type[Any]:
    """The class of an optimiser with faster steps, if it is one of torchao with narrow moments, else itself.

    The numbers are those of torchao's own step, but what it draws to round stochastically. Moments lie where they did,
    so checkpoints are those of torchao's optimiser.
    """
    if kind.__module__.partition(".")[0] != "torchao" or not hasattr(kind, "_subclass_zeros"):
        return kind
    from torchao.optim import adam

    function = getattr(adam, "single_param_adam", None)
    if function is None or tuple(inspect.signature(function).parameters) != _ARGUMENTS:
        return kind
    methods = {"_function": staticmethod(function), "__module__": kind.__module__, "__doc__": kind.__doc__}
    return type(kind.__name__, (_FastSteps, kind), methods)


class _FastSteps:
    """Before an optimiser of torchao: one compiled function for all parameters, and one call for all small ones.

    A tensor whose moments are not narrow is small, or a router: those of a group go through the step as one.
    """

    _function: Callable[..., None]
    param_groups: list[dict[str, Any]]
    state: Any
    is_adamw: bool
    bf16_stochastic_round: bool
    _new_buffer: Callable[[Tensor, bool], Tensor]

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._compiled = torch.compile(self._function, fullgraph=True, dynamic=False)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """As torchao's."""
        if any(isinstance(p, DTensor) or p.grad.is_sparse for _, p in self._with_gradient()) or any(
            group["amsgrad"] for group in self.param_groups
        ):
            return super().step(closure)  # type: ignore[misc]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        together: dict[Any, list[Tensor]] = {}
        # The number of shapes is fixed.
        with torch._dynamo.utils.disable_cache_limit():
            for number, p in self._with_gradient():
                state = self._state_of(p)
                state["step"] += 1
                if any(type(state[name]) is not Tensor for name in _MOMENTS):
                    self._update(
                        self.param_groups[number],
                        p.detach(),
                        p.grad,
                        state["step"],
                        *(state[name] for name in _MOMENTS),
                    )
                else:
                    key = (number, p.dtype, p.device, state["exp_avg"].dtype, state["step"].item())
                    together.setdefault(key, []).append(p)
            for (number, *_), parameters in together.items():
                self._update_together(self.param_groups[number], parameters)
        return loss

    def _with_gradient(self) -> Iterator[tuple[int, Any]]:
        for number, group in enumerate(self.param_groups):
            yield from ((number, p) for p in group["params"] if p.grad is not None)

    def _state_of(self, p: Tensor) -> dict[str, Any]:
        state = self.state[p]
        if not state:
            state["step"] = torch.tensor(0.0)
            state["exp_avg"], state["exp_avg_sq"] = self._new_buffer(p, True), self._new_buffer(p, False)
        elif state["step"].device.type != "cpu":
            # Where a checkpoint was read to; there it would be waited for.
            state["step"] = state["step"].cpu()
        return state

    def _update(self, group: dict[str, Any], p: Tensor, grad: Tensor, step: Tensor, *moments: Tensor) -> None:
        if not isinstance(group["lr"], Tensor):
            raise RuntimeError("lr was changed to a non-Tensor object; set it with param_groups[0]['lr'].fill_(new_lr)")
        settings = (*group["betas"], group["weight_decay"], group["eps"], self.is_adamw)
        rounds = self.bf16_stochastic_round and p.dtype is torch.bfloat16
        self._compiled(p, grad, step, *moments, None, group["lr"], *settings, rounds)

    def _update_together(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        states = [self.state[p] for p in parameters]
        kept = [[p.detach() for p in parameters], *([state[name] for state in states] for name in _MOMENTS)]
        p, *moments = (torch.cat([each.flatten() for each in tensors]) for tensors in kept)
        grad = torch.cat([parameter.grad.flatten() for parameter in parameters])  # type: ignore[union-attr]
        self._update(group, p, grad, states[0]["step"], *moments)
        for tensors, flat in zip(kept, (p, *moments), strict=True):
            parts = flat.split([tensor.numel() for tensor in tensors])
            torch._foreach_copy_(tensors, [part.view_as(tensor) for part, tensor in zip(parts, tensors, strict=True)])
