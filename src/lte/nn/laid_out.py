"""The parameters of a sparse FFN laid out as the kernels read them, and kept so.

Shapes: D hidden size, F neurons, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lte.config import FfnMode
from lte.nn.ffn_parts import ROLES, bias_of, weight_of
from lte.nn.sparse_ffn import SparseFfn
from lte.ops.arguments import FfnWeights, Routing
from lte.ops.dispatch import FfnRunner, prepare
from lte.ops.layout import by_neuron, stack_inputs

WeightFormat = Literal["native", "int8"]
SCALES = tuple(f"{role}_scale" for role in ROLES)
BUFFERS = ("stacked", "router_rows", *SCALES)
DECELERATE = "call lte.decelerate_(model) first, which rounds them back"


@dataclass(frozen=True)
class Acceleration:
    """How one FFN runs on the kernels.

    Attributes:
        activation: a key of `lte.ops.activations.ACTIVATIONS`.
        weights: `native` keeps the weights, `int8` rounds them to 8 bits with a scale per row.
        active_fraction: share of active experts that measurements let expect, `None` if unknown.
    """

    activation: str
    weights: WeightFormat = "native"
    active_fraction: float | None = None


class LaidOutFfn(SparseFfn):
    """A `SparseFfn` whose parameters lie where the kernels want them, whatever moves, replaces or trains them.

    Its parameters keep their names and shapes. With native weights gate and up are views of `stacked` and the down
    projection [D, F] has strides (1, D), so whatever works on a `SparseFfn` goes on working: other modes, gradients,
    saving. Int8 weights are parameters of int8, and hard mode without gradients is all that there is.

    Buffers, none of which is saved: `stacked` (see `lte.ops.layout.stack_inputs`); `router_rows`, the router's weight
    rounded to the dtype of the weights, `None` for a low-rank router; for int8 `gate_scale`, `up_scale`, `down_scale`.

    Attributes:
        acceleration: how it runs.
        dtype: of the hidden states that the kernels take.
    """

    acceleration: Acceleration
    dtype: torch.dtype
    stacked: Tensor | None
    router_rows: Tensor | None
    _after_load: RemovableHandle
    _runner: FfnRunner
    _seen: tuple[int, ...]
    _arch: int

    @property
    def hidden_size(self) -> int:
        """D, the width of the FFN's input and output."""
        rows = self.router.weight if self.router.down is None else self.router.down
        return rows.shape[1]

    @property
    def _is_int8(self) -> bool:
        return self.acceleration.weights == "int8"

    @torch.no_grad()
    def _lay_out_(self) -> None:
        """Copies the parameters to where the kernels want them."""
        layout, full_rank = self.layout, self.router.down is None
        if self._is_int8:
            self.router_rows = self.router.weight.to(self.dtype, copy=True) if full_rank else None
        else:
            up, gate = weight_of(self, "up"), weight_of(self, "gate")
            assert up is not None
            parts = stack_inputs(up, gate, self.router.weight if full_rank else None)
            self.dtype, self.stacked, self.router_rows = up.dtype, parts.stacked, parts.router
            self._place_(layout.up, parts.stacked[: 2 * len(up)] if layout.fused else parts.up)
            if layout.gate is not None:
                assert parts.gate is not None
                self._place_(layout.gate, parts.gate)
            down = layout.matrix(self.part(layout.down)).data
            if not down.T.is_contiguous():
                self._place_(layout.down, by_neuron(down))
        self._arch = prepare(self.router.weight.device)
        self._runner, self._seen = self._bind(), self._look()

    def _place_(self, name: str, matrix: Tensor) -> None:
        """Makes a parameter a view of its values [out, in] elsewhere."""
        self.part(name).weight.data = matrix.T if self.layout.transposed else matrix

    def _look(self) -> tuple[int, ...]:
        """Where the parameters lie, and last the version of the router: whether the layout still holds."""
        router = self.router.weight
        version = 0 if router.is_inference() else router._version
        return (
            *(self.part(name).weight.data_ptr() for name in self.layout.projections),
            router.data_ptr(),
            version,
        )

    def refresh_(self) -> None:
        """Lays out anew what somebody moved, replaced or trained since."""
        now = self._look()
        if now == self._seen:
            return
        if now[:-1] != self._seen[:-1]:
            self._lay_out_()
        else:
            if self.router_rows is not None:
                with torch.no_grad():
                    self.router_rows.copy_(self.router.weight)
            self._seen = now

    def _bind(self) -> FfnRunner:
        parts: dict[str, Any] = {name: getattr(self, name) for name in ("stacked", *SCALES)}
        for role in ROLES:
            parts[role], parts[f"{role}_bias"] = weight_of(self, role), bias_of(self, role)
        bias = None if self.router_rows is None else self.router.bias
        routing = Routing(weight=self.router_rows, bias=bias, threshold=self.threshold_logit)
        plan = self.acceleration
        return FfnRunner(FfnWeights(**parts), routing, plan.activation, plan.active_fraction, self._arch)

    # What follows keeps the layout true where compiled graphs, which cannot look, would not see that it is not.

    def set_mode(self, mode: FfnMode) -> None:
        """As `SparseFfn.set_mode`."""
        super().set_mode(mode)
        self.refresh_()

    def expect_(self, active_fraction: float | None) -> None:
        """Sets the share of active experts by which the path is chosen; graphs that were captured keep theirs."""
        self.acceleration = replace(self.acceleration, active_fraction=active_fraction)
        self._runner = self._bind()

    def train(self, mode: bool = True) -> LaidOutFfn:
        """As `nn.Module.train`."""
        self.refresh_()
        return super().train(mode)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LaidOutFfn:
        """Moves or casts the parameters one by one and lays them out anew; scales stay in fp32."""
        seen, kept = self._look(), {name: getattr(self, name) for name in BUFFERS}
        probe = torch.empty(0, dtype=self.dtype, device=self.router.weight.device)
        for name in BUFFERS:
            setattr(self, name, None)
        super()._apply(fn, recurse)
        if self.block:
            # The projections are moved on their own, before and after; the last one calls `refresh_`.
            for name in SCALES:
                setattr(self, name, None if kept[name] is None else kept[name].to(self.router.weight.device))
            self.dtype, self._seen = fn(probe).dtype, ()
            return self
        unmoved = self._look()[:-1] == seen[:-1]
        device = self.router.weight.device
        for name in BUFFERS if unmoved else SCALES:
            setattr(self, name, None if kept[name] is None else kept[name].to(device))
        if unmoved:
            self.refresh_()
        else:
            del kept
            self.dtype = fn(probe).dtype
            self._lay_out_()
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        if self._is_int8:
            raise ValueError(
                f"weights must be floating-point to be saved, got int8; save before accelerate_, or {DECELERATE}"
            )
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        if self._is_int8:
            raise ValueError(f"weights must be floating-point to load others into them, got int8; {DECELERATE}")
        super()._load_from_state_dict(state_dict, prefix, *args)

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles leave out what is made from the parameters."""
        state = {name: value for name, value in self.__dict__.items() if name not in ("_runner", "_seen")}
        state["_buffers"] = {**self._buffers, "stacked": None, "router_rows": None}
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._seen = ()
        if not self.block:
            self._lay_out_()


def refresh_loaded(ffn: nn.Module, incompatible_keys: Any) -> None:
    """What follows when weights were loaded into the FFN."""
    assert isinstance(ffn, LaidOutFfn)
    ffn.refresh_()
