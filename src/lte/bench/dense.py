"""Dense FFNs to compare with: several layers with the stock weights, one function per way to run them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from lte.nn.sparse_ffn import FfnLayout

Activation = Callable[[Tensor], Tensor]
EAGER, COMPILED = "dense eager", "dense compiled"
STACKED, AUTOTUNED = "dense compiled, gate and up stacked", "dense compiled, max-autotune"
INDEXING = "PyTorch indexing"


class Projections(NamedTuple):
    """Weights and biases of a stock FFN: gate and up [F, D], down [D, F]; `gate` is `None` for a plain one."""

    gate: Tensor | None
    up: Tensor
    down: Tensor
    gate_bias: Tensor | None
    up_bias: Tensor | None
    down_bias: Tensor | None

    @staticmethod
    def of(ffn: nn.Module, layout: FfnLayout) -> Projections:
        """The parameters of an FFN, not copied."""
        up: Any = ffn.get_submodule(layout.up)
        down: Any = ffn.get_submodule(layout.down)
        gate: Any = None if layout.gate is None else ffn.get_submodule(layout.gate)
        gate_rows, gate_bias = (None, None) if gate is None else (layout.matrix(gate), gate.bias)
        up_rows, up_bias = layout.matrix(up), up.bias
        if layout.fused:
            gate_rows, up_rows = up_rows.chunk(2)
            gate_bias, up_bias = (None, None) if up_bias is None else up_bias.chunk(2)

        def plain(tensor: Tensor | None) -> Any:
            return None if tensor is None else tensor.detach()

        found = (gate_rows, up_rows, layout.matrix(down), gate_bias, up_bias, down.bias)
        return Projections(*[plain(tensor) for tensor in found])

    @property
    def neuron_bytes(self) -> int:
        """Bytes of the weights of one neuron."""
        return (2 if self.gate is None else 3) * self.up.shape[1] * self.up.element_size()


def compiled_runs(
    layers: Sequence[Projections], inputs: Sequence[Tensor], activation: Activation, autotune: bool
) -> dict[str, Callable[[], object]]:
    """All layers under `torch.compile`: as they are, with gate and up in one product, and with max-autotune."""

    def ffn(
        x: Tensor,
        gate: Tensor | None,
        up: Tensor,
        down: Tensor,
        gate_bias: Tensor | None,
        up_bias: Tensor | None,
        bias: Tensor | None,
    ) -> Tensor:
        hidden = functional.linear(x, up, up_bias)
        hidden = activation(hidden) if gate is None else activation(functional.linear(x, gate, gate_bias)) * hidden
        return functional.linear(hidden, down, bias)

    def stacked_ffn(x: Tensor, both: Tensor, bias: Tensor | None, down: Tensor, down_bias: Tensor | None) -> Tensor:
        gate, up = functional.linear(x, both, bias).chunk(2, dim=-1)
        return functional.linear(activation(gate) * up, down, down_bias)

    plain = torch.compile(ffn, dynamic=False)
    runs: dict[str, Callable[[], object]] = {
        COMPILED: lambda: [plain(x, *p) for x, p in zip(inputs, layers, strict=True)]
    }
    if layers[0].gate is not None:
        fused = torch.compile(stacked_ffn, dynamic=False)
        stacks = [_stack(p) for p in layers]
        runs[STACKED] = lambda: [
            fused(x, *both, p.down, p.down_bias) for x, both, p in zip(inputs, stacks, layers, strict=True)
        ]
    if autotune:
        tuned = torch.compile(ffn, dynamic=False, mode="max-autotune-no-cudagraphs")
        runs[AUTOTUNED] = lambda: [tuned(x, *p) for x, p in zip(inputs, layers, strict=True)]
    return runs


def _stack(p: Projections) -> tuple[Tensor, Tensor | None]:
    assert p.gate is not None
    bias = None if p.gate_bias is None or p.up_bias is None else torch.cat([p.gate_bias, p.up_bias])
    return torch.cat([p.gate, p.up]), bias


class IndexedFfns:
    """The router, then the active neurons' rows gathered by `index_select`, then dense products with them.

    The down projection is given by neuron, the better layout for it. Tokens that need different experts share their
    union, and a mask switches off what a token does not use. On a GPU which rows to take is known beforehand, since
    nobody can capture the wait for the list of them; what that costs is then not part of the time.

    Args:
        layers: the weights of each.
        routers: functions from hidden states to the mask [T, E] of each layer.
        activation: the activation function.
    """

    def __init__(
        self, layers: Sequence[Projections], routers: Sequence[Callable[[Tensor], Tensor]], activation: Activation
    ):
        self.layers, self.routers, self.activation = layers, routers, activation
        self.downs = [p.down.T.contiguous() for p in layers]

    def run(self, inputs: Sequence[Tensor]) -> Callable[[], object]:
        """All layers, with the routing that they have now."""
        parts = list(zip(inputs, self.layers, self.downs, self.routers, strict=True))
        known = [self._rows(route(x), p) if x.is_cuda else None for x, p, _, route in parts]

        def run_all() -> list[Tensor]:
            outputs = []
            for (x, p, down, route), found in zip(parts, known, strict=True):
                mask = route(x)
                rows, keep = self._rows(mask, p) if found is None else found
                outputs.append(self._ffn(x, p, down, rows, keep))
            return outputs

        return run_all

    @staticmethod
    def _rows(mask: Tensor, p: Projections) -> tuple[Tensor, Tensor | None]:
        size = p.up.shape[0] // mask.shape[1]
        union = mask.any(0)
        rows = union.repeat_interleave(size).nonzero().flatten()
        if bool((mask == union).all()):
            return rows, None
        return rows, mask[:, union].repeat_interleave(size, dim=1).to(p.up.dtype)

    def _ffn(self, x: Tensor, p: Projections, down: Tensor, rows: Tensor, keep: Tensor | None) -> Tensor:
        def product(weight: Tensor, bias: Tensor | None) -> Tensor:
            taken = None if bias is None else bias.index_select(0, rows)
            return functional.linear(x, weight.index_select(0, rows), taken)

        first, bias = (p.up, p.up_bias) if p.gate is None else (p.gate, p.gate_bias)
        hidden = self.activation(product(first, bias))
        if p.gate is not None:
            hidden = hidden * product(p.up, p.up_bias)
        if keep is not None:
            hidden = hidden * keep.view(hidden.shape)
        out = hidden @ down.index_select(0, rows)
        return out if p.down_bias is None else out + p.down_bias
