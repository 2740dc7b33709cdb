"""What stands in the place of a family's dense FFN: its own projections, under their own names, and what a method adds.

Shapes: D hidden size, F neurons.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lte.nn.metering import MeteredModule
from lte.nn.shards import whole


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
        return (*self.projections, *self.dropouts)

    @property
    def dropouts(self) -> tuple[str, ...]:
        """Names of the dropouts."""
        return tuple(name for name in (self.inner_dropout, self.outer_dropout) if name is not None)

    def matrix(self, projection: Any) -> Tensor:
        """The weight of a projection as [out, in], a view if the family stores it the other way round."""
        return projection.weight.T if self.transposed else projection.weight

    def numbers(self, projection: Any) -> Tensor:
        """The weight of a projection as [out, in] in fp32; one in 4 bits (bitsandbytes) is de-quantised.

        One that lies in parts is put together, which all processes must do at the same time.
        """
        if getattr(projection.weight, "quant_state", None) is not None:
            return numbers_in_4_bits(projection).float()
        weight = whole(projection.weight).detach().float()
        return weight.T if self.transposed else weight


def numbers_in_4_bits(linear: Any) -> Tensor:
    """The weight [out, in] that a layer of bitsandbytes in 4 bits computes with."""
    from bitsandbytes.functional import dequantize_4bit

    # On a CPU the layer reorders what it has computed with; this puts it back.
    linear.state_dict()
    return dequantize_4bit(linear.weight.data, linear.weight.quant_state)


class WrappedFfn(MeteredModule):
    """The parts of a family's FFN under their own names, for a subclass that computes with few of the neurons.

    A checkpoint keeps the parameter names of the family, and has those that the subclass adds.

    An FFN that is spread over its block (`FfnLayout.spread`) takes the activation function's place there: the block
    calls its up projection, this module, and its down projection one after the other. A hook keeps the up
    projection's input, for the call and in its thread alone, for the subclass, whose `forward` maps x W_up to what the
    down projection shall read, so that all else of the block, dropouts and adapters on the projections included, stays
    as it is.

    Args:
        parts: the family's projections and dropouts by their own names (`FfnLayout.parts`), or the block that holds
            them if the FFN is spread over one.
        activation: activation function of the FFN.
        layout: what each projection does.

    Attributes:
        frozen: names of the subclass's own submodules that no training changes.
    """

    frozen: tuple[str, ...] = ()

    def __init__(
        self,
        parts: Mapping[str, nn.Module] | nn.Module,
        activation: Callable[[Tensor], Tensor],
        layout: FfnLayout,
    ):
        super().__init__()
        self.layout = layout
        # In a tuple, or it would become a submodule of its own submodule.
        self.block = (parts,) if isinstance(parts, nn.Module) else ()
        self._hooks: list[RemovableHandle] = []
        if isinstance(parts, nn.Module):
            self._hooks = [
                parts.register_forward_pre_hook(self._begin_call),
                # Also after an exception, so that nothing of a call is left.
                parts.register_forward_hook(self._end_call, always_call=True),
                parts.get_submodule(layout.up).register_forward_pre_hook(self._keep_input),
            ]
        else:
            for name in layout.parts:
                self.add_module(name, parts[name])
        setattr(self, self._activation_name, activation)

    def part(self, name: str) -> Any:
        """A projection or dropout by the name that the layout gives it."""
        return self.block[0].get_submodule(name) if self.block else self._modules[name]

    @property
    def reader(self) -> nn.Module:
        """The module whose input is the hidden states [..., D]: the up projection of a spread FFN, else this one."""
        return self.part(self.layout.up) if self.block else self

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
        """Takes the hooks off the block, before something else takes the FFN's place in it."""
        for hook in self._hooks:
            hook.remove()

    def _begin_call(self, block: nn.Module, args: Any) -> None:
        self._of_thread.inputs.append(None)
        if not torch.compiler.is_compiling():
            up = block.get_submodule(self.layout.up)
            # Adapters, quantisers and users put other modules there.
            if self._keep_input not in up._forward_pre_hooks.values():
                self._hooks.append(up.register_forward_pre_hook(self._keep_input))

    def _end_call(self, block: nn.Module, args: Any, output: Any) -> None:
        if self._of_thread.inputs:
            self._of_thread.inputs.pop()

    def _keep_input(self, up: nn.Module, args: tuple[Tensor, ...]) -> None:
        inputs = self._of_thread.inputs
        # Nobody has begun a call where the parts of a block are called without it.
        if not inputs:
            inputs.append(None)
        inputs[-1] = args[0]

    @property
    def num_neurons(self) -> int:
        """F."""
        down = self.part(self.layout.down)
        # Weights in 4 bits have a shape of their own.
        return getattr(down, "in_features", None) or self.layout.matrix(down).shape[1]

    @property
    def hidden_size(self) -> int:
        """D."""
        down = self.part(self.layout.down)
        return getattr(down, "out_features", None) or self.layout.matrix(down).shape[0]

    @property
    def num_inputs(self) -> int:
        """How many matrices [F, D] read the hidden states: gate and up, or up alone."""
        return 2 if self.layout.fused or self.layout.gate is not None else 1

    @property
    def dense_weights(self) -> int:
        """See `MeteredModule`."""
        return (self.num_inputs + 1) * self.hidden_size * self.num_neurons

    @property
    def dense_neurons(self) -> int:
        """F."""
        return self.num_neurons

    def take_input(self) -> Tensor:
        """The hidden states [..., D] that the up projection of a spread FFN has just read; they are then forgotten.

        Raises:
            ValueError: if it was another module that read them.
        """
        inputs = self._of_thread.inputs
        x = inputs[-1] if inputs else None
        if x is None:
            raise ValueError(
                f"{self.layout.up} must be the up projection that the FFN was built around, got another; take adapters "
                "and quantisation off, or convert the model anew"
            )
        inputs[-1] = None
        return x

    def auxiliary_loss(self, token_mask: Tensor) -> Tensor | None:
        """What the FFN adds to the training loss for its last forward pass, a scalar; `None` if nothing.

        Args:
            token_mask: which tokens count, bool [B, T].
        """
        return None

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

    def _project_down(self, hidden: Tensor) -> Tensor:
        """The FFN's output for switched intermediate activations, with the family's dropouts."""
        layout = self.layout
        if layout.inner_dropout is not None:
            hidden = self.part(layout.inner_dropout)(hidden)
        out = self._down_product(hidden)
        return out if layout.outer_dropout is None else self.part(layout.outer_dropout)(out)

    def _down_product(self, hidden: Tensor) -> Tensor:
        """The FFN's output [..., D] without dropouts."""
        down = self.part(self.layout.down)
        if self.layout.casts_to_down:
            # Quantisers of PyTorch make the weight a method; what they compute is fp32.
            hidden = hidden if callable(down.weight) else hidden.to(down.weight.dtype)
        return down(hidden)
