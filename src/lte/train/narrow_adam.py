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

from lte.nn.shards import local

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

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._compiled = torch.compile(self._function, fullgraph=True, dynamic=False)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """As torchao's. Of tensors in shards each process steps its own part, which needs nothing of the others."""
        alone = all(_steps_alone(p) for _, p in self._with_gradient())
        if not alone or any(group["amsgrad"] for group in self.param_groups):
            return super().step(closure)  # type: ignore[misc]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        together: dict[Any, list[tuple[Tensor, ...]]] = {}
        # The number of shapes is fixed.
        with torch._dynamo.utils.disable_cache_limit():
            for number, p in self._with_gradient():
                state = self._state_of(p)
                state["step"] += 1
                own = tuple(local(tensor) for tensor in (p.detach(), p.grad, *(state[name] for name in _MOMENTS)))
                if any(type(moment) is not Tensor for moment in own[2:]):
                    self._update(self.param_groups[number], state["step"], *own)
                elif own[0].numel():
                    key = (number, p.dtype, p.device, own[2].dtype, state["step"].item())
                    together.setdefault(key, []).append(own)
            for (number, *_, step), tensors in together.items():
                self._update_together(self.param_groups[number], torch.tensor(step), tensors)
        return loss

    def _new_buffer(self, p: Tensor, signed: bool) -> Tensor:
        moment = super()._new_buffer(p, signed)  # type: ignore[misc]
        own: Any = local(moment)
        if own is moment or type(own) is Tensor:
            return moment
        # It is a view of one that says it has p's dtype, which torchao's views forget, and `torch.compile` refuses a
        # view in another dtype. What is kept is the same in each.
        names, settings = own.__tensor_flatten__()
        parts = {name: getattr(own, name) for name in names}
        plain = type(own).__tensor_unflatten__(parts, settings, own.shape, own.stride())
        assert isinstance(p, DTensor)
        places: Any = {"shape": p.shape, "stride": p.stride(), "run_check": False}
        return DTensor.from_local(plain, p.device_mesh, p.placements, **places).to(p.device)

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

    def _update(self, group: dict[str, Any], step: Tensor, p: Tensor, grad: Tensor, *moments: Tensor) -> None:
        if not isinstance(group["lr"], Tensor):
            raise RuntimeError("lr was changed to a non-Tensor object; set it with param_groups[0]['lr'].fill_(new_lr)")
        settings = (*group["betas"], group["weight_decay"], group["eps"], self.is_adamw)
        rounds = self.bf16_stochastic_round and p.dtype is torch.bfloat16
        self._compiled(p, grad, step, *moments, None, group["lr"], *settings, rounds)

    def _update_together(self, group: dict[str, Any], step: Tensor, tensors: list[tuple[Tensor, ...]]) -> None:
        p, grad, *moments = (torch.cat([each.flatten() for each in kind]) for kind in zip(*tensors, strict=True))
        self._update(group, step, p, grad, *moments)
        kept = zip(*((p, *moments) for p, _, *moments in tensors), strict=True)
        for each, flat in zip(kept, (p, *moments), strict=True):
            parts = flat.split([tensor.numel() for tensor in each])
            torch._foreach_copy_(list(each), [part.view_as(tensor) for part, tensor in zip(parts, each, strict=True)])


def _steps_alone(p: Tensor) -> bool:
    """Whether a process can step its part of a parameter by its part of the gradient."""
    grad = p.grad
    assert grad is not None
    if isinstance(p, DTensor):
        return isinstance(grad, DTensor) and (grad.device_mesh, grad.placements) == (p.device_mesh, p.placements)
    return not isinstance(grad, DTensor) and not grad.is_sparse
