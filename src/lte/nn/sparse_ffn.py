"""The sparse FFN: a family's dense FFN, its neurons grouped into experts, and a router that switches them.

Shapes: D hidden size, F neurons, E experts of S = F / E neurons each.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lte.config import FfnMode, check_choice
from lte.nn.metering import Reading
from lte.nn.router import ROUTER_PARTS, Router
from lte.nn.router_context import ContextReader
from lte.nn.shards import whole_shape
from lte.nn.wrapped_ffn import FfnLayout, WrappedFfn


def check_expert_shares(num_experts: int, processes: int) -> None:
    """Refuses tensor parallelism in which processes would have to share an expert.

    Raises:
        ValueError: says how many experts there are.
    """
    if num_experts % processes:
        raise ValueError(
            f"num_experts must be a multiple of the processes that share a model, got num_experts={num_experts} for "
            f"{processes} processes; take a number of processes that divides it"
        )


class SparseFfn(WrappedFfn):
    """An FFN whose experts are switched per token by a router.

    With intermediate activations h = act(x W_gate) * (x W_up) and the gate value m of each expert, every mode
    computes (m * h) W_down, so it costs one elementwise product more than the dense FFN:

    - `dense`: m = 1; the router is not run.
    - `soft`: m = G, the scores (stage 1 of the paper, Eq. 3).
    - `straight_through`: m = 1[G > tau] with the gradient of G.
    - `hard`: m = 1[G > tau] (stage 2 and inference, Eq. 7).

    The projections keep the names that the family gives them, so a checkpoint has its own parameter names
    plus `router.weight` and `router.bias`. Expert e owns the neurons [e S, (e + 1) S).

    Args:
        parts: as for `WrappedFfn`.
        activation: activation function of the FFN.
        layout: what each projection does.
        router: the router D -> E.
        threshold: tau.

    Attributes:
        record_logits: whether the forward pass keeps `logits`.
        record_output: whether it keeps `output` where gradients are wanted, without the family's dropouts. An FFN that
            is spread over its block does not compute it.
        record_own: whether it keeps `own_output`, too, which costs one more product with the down projection.
        context_reader: what a router with a context reads the tokens before with.
    """

    # Those of models that earlier versions pickled.
    record_output = False
    record_own = False
    context_reader: ContextReader | None = None

    def __init__(
        self,
        parts: Mapping[str, nn.Module] | nn.Module,
        activation: Callable[[Tensor], Tensor],
        layout: FfnLayout,
        router: Router,
        threshold: float = 0.5,
    ):
        super().__init__(parts, activation, layout)
        self.router = router
        self.set_threshold(threshold)
        self.mode: FfnMode = "hard"
        self.record_logits = False

    @property
    def output(self) -> Tensor | None:
        """The output [..., D] of the last forward pass in this thread, if `record_output`."""
        return self._of_thread.left["output"]

    @property
    def own_output(self) -> Tensor | None:
        """What the output would have been with all experts on, [..., D], without a gradient, if `record_own`."""
        return self._of_thread.left["own"]

    def forget_outputs(self) -> None:
        """Lets `output` and `own_output` go."""
        self._of_thread.left.update(output=None, own=None)

    @property
    def logits(self) -> Tensor | None:
        """The router logits [..., E] of the last forward pass in this thread, if `record_logits`."""
        return self._of_thread.left["logits"]

    @logits.setter
    def logits(self, logits: Tensor | None) -> None:
        self._of_thread.left["logits"] = logits

    @property
    def num_experts(self) -> int:
        """E."""
        return whole_shape(self.router.bias)[0]

    @property
    def metering(self) -> bool:
        """See `MeteredModule`: the router logits are kept, of which `reading` is made."""
        return self.record_logits

    @metering.setter
    def metering(self, metering: bool) -> None:
        self.record_logits = metering

    @property
    def reading(self) -> Reading | None:
        """What hard mode reads for the logits that were kept last: the weights of the active experts."""
        if self.logits is None:
            return None
        neurons = (self.logits > self.threshold_logit).sum(-1) * (self.num_neurons // self.num_experts)
        # By name: adapters keep other routers beside the active one.
        matrices = [getattr(self.router, name, None) for name in ROUTER_PARTS if name != "bias"]
        selector = sum(matrix.numel() for matrix in matrices if matrix is not None)
        weights = neurons * (self.num_inputs + 1) * self.hidden_size
        return Reading(weights, selector, neurons, self.logits, self.threshold_logit)

    @reading.setter
    def reading(self, reading: Reading | None) -> None:
        self.logits = None if reading is None else reading.logits

    def set_threshold(self, threshold: float) -> None:
        """Moves tau, which lies in (0, 1)."""
        self.threshold_logit = math.log(threshold / (1 - threshold))

    def set_mode(self, mode: FfnMode) -> None:
        """Switches between dense, soft, straight_through and hard."""
        check_choice("mode", mode, get_args(FfnMode))
        self.mode = mode

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
        logits = self._route(x)
        gate = self._own_experts(self.gate_values(logits), activated.shape[-1])
        output = self._project_down(scale_experts(activated, gate, up))
        if self.record_own and self._counts:
            # After the product with gradients: autocast would keep a copy of the weight without.
            with torch.no_grad():
                self._of_thread.left["own"] = self._down_product(activated if up is None else activated * up)
        return output

    def check_shares(self) -> None:
        """Raises a `ValueError` where processes would have to share an expert, under tensor parallelism.

        And where they would take the wrong ones: before 5.16 transformers splits modules without saying so.
        """
        down = self.part(self.layout.down)
        # Some quantised projections have none.
        weight = getattr(down, "weight", None)
        if isinstance(weight, DTensor):
            check_expert_shares(self.num_experts, weight.device_mesh.size())
        elif hasattr(down, "_hf_tp_plan"):
            raise ValueError(
                "transformers must be 5.16 or newer for tensor parallelism, got an older one; load the model without "
                "tp_plan"
            )

    def _own_experts(self, gate: Tensor, neurons: int) -> Tensor:
        """Of m [..., E] that of the experts whose neurons lie in this process, under tensor parallelism.

        Raises:
            ValueError: for a plan that leaves the down projection whole.
        """
        if neurons == self.num_neurons:
            return gate
        weight = self.part(self.layout.down).weight
        if not isinstance(weight, DTensor):
            raise ValueError(
                f"projections must all be sharded by one tp_plan, got {self.layout.up} in parts and {self.layout.down} "
                "whole; take the tp_plan of the family"
            )
        return gate.chunk(weight.device_mesh.size(), -1)[weight.device_mesh.get_local_rank()]

    def _down_product(self, hidden: Tensor) -> Tensor:
        output = super()._down_product(hidden)
        if self.record_output and self._counts and torch.is_grad_enabled():
            self._of_thread.left["output"] = output
        return output

    @property
    def _counts(self) -> bool:
        """Whether a pass is one that the loss is about.

        In training a pass without gradients, for metrics say, is none, and that of a reference model, adapters switched
        off, never is.
        """
        counts = torch.is_grad_enabled() or not self.training
        return counts and not getattr(self.router, "disable_adapters", False)

    def _switch(self, projected: Tensor) -> Tensor:
        hidden = self.activation_function(projected)
        if self.mode == "dense":
            return hidden
        x = self.take_input()
        return scale_experts(hidden, self._own_experts(self.gate_values(self._route(x)), hidden.shape[-1]))

    def _route(self, x: Tensor) -> Tensor:
        # A router with adapters around it, which some are, has the attributes of the one inside.
        logits = self.router(x, self._context) if self.router.context else self.router(x)
        if self.record_logits and self._counts:
            self.logits = logits
        return logits

    def _context(self, summaries: Tensor) -> Tensor:
        """The means before each of the summaries [..., R] that the router has made of the tokens of this call."""
        assert self.context_reader is not None
        return self.context_reader.means(summaries, self.router.context)

    def extra_repr(self) -> str:
        size = self.num_neurons // self.num_experts
        return f"experts={self.num_experts}, expert_size={size}, mode={self.mode}"


class _ScaleExperts(torch.autograd.Function):
    """Gate times hidden (times factor) that keeps the factors, never their product, for the backward pass.

    Plain multiplications keep one more [..., F] tensor per layer: 12% more activation memory in bf16 at the
    widths of SmolLM2-135M, eager. The backward pass forms the product anew.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(hidden: Tensor, gate: Tensor, factor: Tensor | None) -> Tensor:
        wanted = any(tensor is not None and tensor.requires_grad for tensor in (hidden, gate, factor))
        run = _fused_on_gpu(_scale_forward, hidden) if wanted else _scale_forward
        return run(hidden, gate, factor)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

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


def is_transformed() -> bool:
    """Whether a transform of `torch.func`, `vmap` or `grad` say, is at work: tensors are then wrappers."""
    return torch._C._functorch.peek_interpreter_stack() is not None


_compiled = functools.cache(functools.partial(torch.compile, dynamic=None))


def _fused_on_gpu(function: Callable[..., Any], x: Tensor) -> Callable[..., Any]:
    """The function compiled to one kernel on a GPU, where its passes over memory are what soft mode costs.

    Elsewhere, in a layer that is compiled as a whole, under the transforms of `torch.func`, and for second derivatives
    it is the function itself.
    """
    plain = not x.is_cuda or torch.compiler.is_compiling() or torch.is_grad_enabled() or is_transformed()
    return function if plain else _compiled(function)


def scale_experts(hidden: Tensor, gate: Tensor, factor: Tensor | None = None) -> Tensor:
    """Multiplies the neurons [..., F] of each expert by its gate value [..., E], and by `factor` [..., F]."""
    return _ScaleExperts.apply(hidden, gate, factor)
