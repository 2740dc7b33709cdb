"""The sparse FFN: a family's dense FFN, its neurons grouped into experts, and a router that switches them.

Shapes: D hidden size, F neurons, E experts of S = F / E neurons each.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import Tensor, nn

from lte.config import FfnMode, check_choice
from lte.nn.router import Router


@dataclass(frozen=True)
class FfnLayout:
    """Which submodules of a family's FFN do what, by their own names.

    Attributes:
        down: the projection F -> D.
        up: the projection D -> F; for `fused` the one D -> 2F that stacks gate over up.
        gate: the gate projection D -> F, `None` for a plain FFN or a fused one.
        fused: whether `up` stacks gate and up.
        activation: attribute that holds the activation function.
        inner_dropout: the dropout of the intermediate activations, if the FFN has one.
        outer_dropout: the dropout of the FFN's output, if it lies in the FFN.
        spread: whether the FFN has no module of its own but lies in its transformer block, together with other parts.
            All names are then paths in the block, and the sparse FFN takes the place of the activation function.
        transposed: whether weights are stored [in, out], as those of transformers' `Conv1D` are.
        casts_to_down: whether intermediate activations are cast to the dtype of `down`, which some families keep in
            fp32 in a model of half precision.
    """

    up: str = "up_proj"
    gate: str | None = "gate_proj"
    down: str = "down_proj"
    fused: bool = False
    activation: str = "act_fn"
    inner_dropout: str | None = None
    outer_dropout: str | None = None
    spread: bool = False
    transposed: bool = False
    casts_to_down: bool = False

    @property
    def projections(self) -> tuple[str, ...]:
        """Names of all projections, inputs first."""
        return tuple(name for name in (self.gate, self.up, self.down) if name is not None)

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of all submodules with weights or state: the projections, then the dropouts."""
        return (*self.projections, *(name for name in (self.inner_dropout, self.outer_dropout) if name is not None))

    def matrix(self, projection: Any) -> Tensor:
        """The weight of a projection as [out, in], a view if the family stores it the other way round."""
        return projection.weight.T if self.transposed else projection.weight


class SparseFfn(nn.Module):
    """An FFN whose experts are switched per token by a router.

    With intermediate activations h = act(x W_gate) * (x W_up) and the gate value m of each expert, every mode
    computes (m * h) W_down, so it costs one elementwise product more than the dense FFN:

    - `dense`: m = 1; the router is not run.
    - `soft`: m = G, the scores (stage 1 of the paper, Eq. 3).
    - `straight_through`: m = 1[G > tau] with the gradient of G.
    - `hard`: m = 1[G > tau] (stage 2 and inference, Eq. 7).

    The projections keep the names that the family gives them, so a checkpoint has its own parameter names
    plus `router.weight` and `router.bias`. Expert e owns the neurons [e S, (e + 1) S).

    An FFN that is spread over its block (`FfnLayout.spread`) takes the activation function's place there: the block
    calls its up projection, this module, and its down projection one after the other. A hook keeps the up
    projection's input for the router, and `forward` maps x W_up to m * h, so that all else of the block, dropouts and
    adapters on the projections included, stays as it is.

    Args:
        parts: the family's projections and dropouts by their own names (`FfnLayout.parts`), or the block that holds
            them if the FFN is spread over one.
        activation: activation function of the FFN.
        layout: what each projection does.
        router: the router D -> E.
        threshold: tau.
    """

    def __init__(
        self,
        parts: Mapping[str, nn.Module] | nn.Module,
        activation: Callable[[Tensor], Tensor],
        layout: FfnLayout,
        router: Router,
        threshold: float = 0.5,
    ):
        super().__init__()
        self.layout = layout
        # In a tuple, or it would become a submodule of its own submodule.
        self.block = (parts,) if isinstance(parts, nn.Module) else ()
        self._up_input: Tensor | None = None
        if isinstance(parts, nn.Module):
            self._hook = parts.get_submodule(layout.up).register_forward_pre_hook(self._keep_input)
        else:
            for name in layout.parts:
                self.add_module(name, parts[name])
        setattr(self, self._activation_name, activation)
        self.router = router
        self.threshold_logit = math.log(threshold / (1 - threshold))
        self.mode: FfnMode = "hard"
        self.record_logits = False
        self.logits: Tensor | None = None

    def part(self, name: str) -> Any:
        """A projection or dropout by the name that the layout gives it."""
        return self.block[0].get_submodule(name) if self.block else self._modules[name]

    @property
    def activation_function(self) -> Callable[[Tensor], Tensor]:
        """The activation function."""
        return getattr(self, self._activation_name)

    @property
    def _activation_name(self) -> str:
        return "activation_fn" if self.layout.spread else self.layout.activation

    def own_parameters(self) -> Iterator[nn.Parameter]:
        """All parameters of the FFN, those that lie elsewhere in its block included."""
        yield from self.parameters()
        if self.block:
            for name in self.layout.projections:
                yield from self.part(name).parameters()

    def leave_(self) -> None:
        """Takes the hook off the block, before something else takes the FFN's place in it."""
        if self.block:
            self._hook.remove()

    def _keep_input(self, up: nn.Module, args: tuple[Tensor, ...]) -> None:
        self._up_input = args[0]

    @property
    def num_experts(self) -> int:
        """E."""
        return self.router.bias.shape[0]

    @property
    def num_neurons(self) -> int:
        """F."""
        return self.layout.matrix(self.part(self.layout.down)).shape[1]

    def set_mode(self, mode: FfnMode) -> None:
        """Switches between dense, soft, straight_through and hard."""
        check_choice("mode", mode, get_args(FfnMode))
        self.mode = mode

    def factors(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """The two factors act(x W_gate) and x W_up of the intermediate activations, [..., F] each.

        A plain FFN has one factor, act(x W_up), and `None`.
        """
        activation = self.activation_function
        up = self.part(self.layout.up)(x)
        if self.layout.fused:
            gate, up = up.chunk(2, dim=-1)
        elif self.layout.gate is None:
            return activation(up), None
        else:
            gate = self.part(self.layout.gate)(x)
        return activation(gate), up

    def intermediate(self, x: Tensor) -> Tensor:
        """The FFN's intermediate activations [..., F] for hidden states [..., D], before any switching."""
        activated, up = self.factors(x)
        return activated if up is None else activated * up

    def gate_values(self, logits: Tensor) -> Tensor:
        """m for router logits [..., E] in the current mode."""
        if self.mode == "soft":
            return torch.sigmoid(logits)
        active = (logits > self.threshold_logit).to(logits.dtype)
        if self.mode == "straight_through":
            scores = torch.sigmoid(logits)
            return active + (scores - scores.detach())
        return active

    def forward(self, x: Tensor) -> Tensor:
        """Maps hidden states [..., D] to [..., D]; keeps the router logits in `logits` if `record_logits`.

        A spread FFN maps the up projection's output [..., F] to switched intermediate activations [..., F].
        """
        if self.block:
            return self._switch(x)
        if self.mode == "dense":
            return self._project_down(self.intermediate(x))
        activated, up = self.factors(x)
        logits = self.router(x)
        if self.record_logits:
            self.logits = logits
        return self._project_down(scale_experts(activated, self.gate_values(logits), up))

    def _switch(self, projected: Tensor) -> Tensor:
        hidden, x, self._up_input = self.activation_function(projected), self._up_input, None
        if self.mode == "dense":
            return hidden
        if x is None:
            raise ValueError(
                f"{self.layout.up} must be the up projection that the FFN was built around, got another; take adapters "
                "and quantisation off, or convert the model anew"
            )
        logits = self.router(x)
        if self.record_logits:
            self.logits = logits
        return scale_experts(hidden, self.gate_values(logits))

    def _project_down(self, hidden: Tensor) -> Tensor:
        """The FFN's output for switched intermediate activations, with the family's dropouts."""
        layout, down = self.layout, self.part(self.layout.down)
        if layout.inner_dropout is not None:
            hidden = self.part(layout.inner_dropout)(hidden)
        if layout.casts_to_down:
            hidden = hidden.to(down.weight.dtype)
        out = down(hidden)
        return out if layout.outer_dropout is None else self.part(layout.outer_dropout)(out)

    def extra_repr(self) -> str:
        size = self.num_neurons // self.num_experts
        return f"experts={self.num_experts}, expert_size={size}, mode={self.mode}"


class _ScaleExperts(torch.autograd.Function):
    """Gate times hidden (times factor) that keeps the factors, never their product, for the backward pass.

    Plain multiplications keep one more [..., F] tensor per layer: 12% more activation memory in bf16 at the
    widths of SmolLM2-135M, eager. The backward pass forms the product anew.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, gate: Tensor, factor: Tensor | None) -> Tensor:
        ctx.save_for_backward(hidden, gate, factor)
        run = _fused_on_gpu(_scale_forward, hidden) if any(ctx.needs_input_grad) else _scale_forward
        return run(hidden, gate, factor)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grad_outputs
        return _fused_on_gpu(_scale_backward, grad)(grad, *ctx.saved_tensors, ctx.needs_input_grad)


def _scale(hidden: Tensor, gate: Tensor) -> Tensor:
    grouped = hidden.unflatten(-1, (gate.shape[-1], -1))
    return (grouped * gate.unsqueeze(-1).to(hidden.dtype)).flatten(-2)


def _scale_forward(hidden: Tensor, gate: Tensor, factor: Tensor | None) -> Tensor:
    return _scale(hidden if factor is None else hidden * factor, gate)


def _scale_backward(
    grad: Tensor, hidden: Tensor, gate: Tensor, factor: Tensor | None, needs: tuple[bool, bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    grad_hidden = grad_gate = grad_factor = None
    if needs[1]:
        product = hidden if factor is None else hidden * factor
        grad_gate = (grad * product).unflatten(-1, (gate.shape[-1], -1)).sum(-1, dtype=gate.dtype)
    if needs[0] or needs[2]:
        scaled = _scale(grad, gate)
        grad_hidden = scaled if factor is None else scaled * factor
        grad_factor = scaled * hidden if needs[2] else None
    return grad_hidden, grad_gate, grad_factor


_compiled = functools.cache(functools.partial(torch.compile, dynamic=None))


def _fused_on_gpu(function: Callable[..., Any], x: Tensor) -> Callable[..., Any]:
    """The function compiled to one kernel on a GPU, where its passes over memory are what soft mode costs.

    Elsewhere, in a layer that is compiled as a whole, and for second derivatives it is the function itself.
    """
    plain = not x.is_cuda or torch.compiler.is_compiling() or torch.is_grad_enabled()
    return function if plain else _compiled(function)


def scale_experts(hidden: Tensor, gate: Tensor, factor: Tensor | None = None) -> Tensor:
    """Multiplies the neurons [..., F] of each expert by its gate value [..., E], and by `factor` [..., F]."""
    return _ScaleExperts.apply(hidden, gate, factor)
