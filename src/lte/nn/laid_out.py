"""The parameters of a sparse FFN laid out as the kernels read them, and kept so.

Shapes: D hidden size, F neurons, E experts.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.nn.modules.module import _global_forward_hooks, _global_forward_pre_hooks
from torch.utils.hooks import RemovableHandle

from lte.config import FfnMode
from lte.nn.expert_mesh import expert_mesh, forward_of_plan, own_experts
from lte.nn.ffn_parts import ROLES, bias_of, weight_of
from lte.nn.hooks import Look
from lte.nn.router import Router
from lte.nn.shards import local, place_
from lte.nn.sparse_ffn import SparseFfn
from lte.ops.arguments import EXPERT_SIZES, FfnWeights, Routing
from lte.ops.dispatch import FfnRunner, prepare
from lte.ops.layout import by_neuron, stack_inputs
from lte.ops.paths import ExpectedUse, Path

WeightFormat = Literal["native", "int8"]
SCALES = tuple(f"{role}_scale" for role in ROLES)
COPIES = ("stacked", "router_rows")
BUFFERS = (*COPIES, *SCALES)
DECELERATE = "call lte.decelerate_(model) first, which rounds them back"
# What plain PyTorch would call on an FFN, and the kernels compute in its place.
_METHODS = ("factors", "intermediate", "gate_values", "activation_function")
# Before the parameters have been looked at: no FFN has a parameter of no name.
_UNSEEN: tuple[Any, ...] = (({}, "", ..., 0, None, None),)
# Threads that share a model may find at once that its parameters were replaced.
_LAYING_OUT = threading.RLock()


@dataclass(frozen=True)
class Acceleration:
    """How one FFN runs on the kernels.

    Attributes:
        activation: a key of `lte.ops.activations.ACTIVATIONS`.
        weights: `native` keeps the weights, `int8` rounds them to 8 bits with a scale per row.
        use: what measurements let expect of the experts, `None` if nothing.
        name: of the FFN in its model.
        told: what was said of the model's FFNs that the kernels leave to PyTorch; all FFNs of a model have one list.
    """

    activation: str
    weights: WeightFormat = "native"
    use: ExpectedUse | None = None
    name: str = "an FFN"
    told: list[str] = field(default_factory=list, compare=False)


class LaidOutFfn(SparseFfn):
    """A `SparseFfn` whose parameters lie where the kernels want them, whatever moves, replaces or trains them.

    Its parameters keep their names and shapes. With native weights gate and up are views of `stacked` and the down
    projection [D, F] has strides (1, D), so whatever works on a `SparseFfn` goes on working: other modes, gradients,
    saving. Int8 weights are parameters of int8, and hard mode without gradients is all that there is.

    The kernels read the parameters' own memory, so that they see what is written into it by whatever means. Before
    each call it is looked whether a parameter lies elsewhere, and whether a module was replaced or has hooks.

    Made from the parameters, and not saved: `stacked` (see `lte.ops.layout.stack_inputs`); `router_rows`, `None` for a
    low-rank router, else the router's weight: its own memory if it has the dtype of the weights, or memory to round it
    into (see `lte.ops.arguments.Routing.rounded`); for int8 the buffers `gate_scale`, `up_scale`, `down_scale`. The
    first two are no buffers: they are the memory of parameters, and what copies the buffers of a model, an EMA say,
    would write into these again.

    Under tensor parallelism all of this is of the experts of this process, and its parameters stay `DTensor`s whose
    local parts are the views. The router stays whole; its rows are rounded into memory, whatever their dtype.

    Attributes:
        acceleration: how it runs.
        dtype: of the hidden states that the kernels take.
    """

    acceleration: Acceleration
    dtype: torch.dtype
    stacked: Tensor | None
    router_rows: Tensor | None
    _after_load: RemovableHandle
    _runner: Any
    _seen: tuple[Any, ...]
    _watched: tuple[Any, ...]
    _activation: tuple[Any]
    _kinds: tuple[type[nn.Module], ...]
    _width: int
    _device: torch.device
    _rounds_router: bool
    _arch: int
    _mesh: DeviceMesh | None

    @property
    def hidden_size(self) -> int:
        """D, the width of the FFN's input and output."""
        return self._width

    @property
    def routing(self) -> Routing:
        """The router as the kernels read it, once `takes` has said that they do."""
        return self._runner.routing

    @property
    def _is_int8(self) -> bool:
        return self.acceleration.weights == "int8"

    # Tensors made in inference mode could not be trained afterwards, nor written to.
    @torch.inference_mode(False)
    @torch.no_grad()
    def _lay_out_(self) -> None:
        """Copies the parameters to where the kernels want them."""
        layout, router, full_rank = self.layout, self.router, self.router.down is None
        self._mesh = expert_mesh(self)
        weight = own_experts(router.weight, self._mesh)
        shared = router.weight.dtype == self.dtype and self._mesh is None
        if self._is_int8:
            shared = shared and router.weight.is_contiguous()
            rows = router.weight.data if shared else weight.to(self.dtype, copy=True)
            self.router_rows = rows if full_rank else None
        else:
            up, gate = weight_of(self, "up"), weight_of(self, "gate")
            assert up is not None
            parts = stack_inputs(up, gate, weight if full_rank else None)
            if up.is_cpu and up.is_shared():  # with other processes, by `share_memory`
                parts.stacked.share_memory_()
            self.dtype, self.stacked, self.router_rows = up.dtype, parts.stacked, parts.router
            # Transformers cannot save a transposed weight that shares its memory with another.
            shared = router.weight.dtype == up.dtype and self._mesh is None and not layout.transposed
            if shared and parts.router is not None:
                router.weight.data = parts.router
            self._place_(layout.up, parts.stacked[: 2 * len(up)] if layout.fused else parts.up)
            if layout.gate is not None:
                assert parts.gate is not None
                self._place_(layout.gate, parts.gate)
            down = weight_of(self, "down")
            assert down is not None
            if not down.is_contiguous():
                self._place_(layout.down, by_neuron(down.T))
        self._rounds_router = full_rank and not shared
        self._width, self._device = layout.matrix(self.part(layout.down)).shape[0], router.weight.device
        self._arch = prepare(self._device)
        for name in COPIES:
            if (copied := getattr(self, name)) is not None and copied.is_cuda:
                # As for parameters and buffers: CUDA graphs copy all other inputs at each call.
                torch._dynamo.mark_static_address(copied, guard=False)
        self._runner, self._watched, self._seen = self._bind(), tuple(self._watch()), tuple(self._look())

    def _place_(self, name: str, matrix: Tensor) -> None:
        """Makes a parameter a view of its values [out, in] elsewhere."""
        place_(self.part(name).weight, matrix.T if self.layout.transposed else matrix)

    def _look(self) -> Iterator[tuple[Any, ...]]:
        """All parameters that the kernels read, and how they lie."""
        named = [(self.part(part), name) for part in self.layout.projections for name in ("weight", "bias")]
        for module, name in (*named, *((self.router, name) for name in ("weight", "bias", "down"))):
            tensor = module._parameters.get(name)
            where: tuple[Any, ...] = (0, None, None)
            if type(tensor) in (nn.Parameter, DTensor):
                memory = local(tensor)
                where = memory.data_ptr(), memory.shape, memory.stride()
            yield module._parameters, name, tensor, *where

    def _watch(self) -> Iterator[tuple[Any, ...]]:
        """All modules that PyTorch would call: where they are registered, their class, and what of theirs is known.

        That is the number of hooks of ours, and the forward method that tensor parallelism gave them, if any.
        """
        paths: list[tuple[nn.Module, str]] = [(self, name) for name in ("router", self._activation_name)]
        layout = self.layout
        paths += [(self.block[0] if self.block else self, name) for name in (*layout.parts, layout.activation)]
        for root, path in paths:
            owner: Any = root
            for name in path.split("."):
                module = owner._modules.get(name)
                if module is None:  # an activation that is a function
                    break
                # Hooks before the up projection of a spread FFN get its hidden states from the block in any case.
                before = list(module._forward_pre_hooks.values()) if self.block and path == layout.up else []
                hooks = sum(hook == self._keep_input or isinstance(hook, Look) for hook in before)
                if module is not self or self.block:
                    yield owner._modules, name, module, type(module), hooks, forward_of_plan(module)
                owner = module

    def _is_settled(self) -> bool:
        """Whether all modules and parameters are and lie as the kernels know them; a few microseconds."""
        for modules, name, module, kind, hooks, forward in self._watched:
            own = module.__dict__
            if (
                modules.get(name) is not module
                or type(module) is not kind
                or own["_forward_hooks"]
                or len(own["_forward_pre_hooks"]) != hooks
                or own.get("forward") is not forward
            ):
                return False
        return (
            self._lies_as_seen()
            and not _global_forward_hooks
            and not _global_forward_pre_hooks
            and not any(name in self.__dict__ for name in _METHODS)
            and self.activation_function is self._activation[0]
            and self.threshold_logit == self._runner.routing.threshold
        )

    def _lies_as_seen(self) -> bool:
        for parameters, name, tensor, pointer, shape, stride in self._seen:
            now = parameters.get(name)
            if now is not tensor:
                return False
            # Looked at for each token: no call of `local`.
            if type(now) is DTensor:
                now = now._local_tensor
            if now is not None and (now.data_ptr() != pointer or now.shape != shape or now.stride() != stride):
                return False
        return True

    def _settle_(self) -> bool:
        """Looks anew at what was attached, replaced or moved; whether the kernels can go on. If not it says so."""
        obstacle = self._attached() or self._unfit()
        if obstacle is None:
            with _LAYING_OUT:
                self._watched = tuple(self._watch())
                # The parameters of a module that was replaced lie as before, but are no longer those of the FFN.
                same = all(new[0] is old[0] for new, old in zip(self._look(), self._seen, strict=False))
                if not (same and self._is_settled()):
                    self._lay_out_()
            return True
        plan = self.acceleration
        if not plan.told:
            plan.told.append(obstacle)
            warnings.warn(
                f"{plan.name} is computed by plain PyTorch and not by the kernels, as {obstacle}; the same holds for "
                "other FFNs of the model of which this is true",
                RuntimeWarning,
                stacklevel=2,
            )
        return False

    def _attached(self) -> str | None:
        """What PyTorch would call and the kernels do not, in words; `None` if there is nothing.

        A graph is made by what was seen at the last call without one: dynamo cannot tell hooks apart (torch 2.11).
        """
        if _global_forward_hooks or _global_forward_pre_hooks:
            return "there are hooks on all modules"
        replaced = [name for name in _METHODS if name in self.__dict__]
        if replaced:
            return f"its {replaced[0]} was replaced"
        if self.activation_function is not self._activation[0]:
            return "its activation function was replaced"
        kinds = dict(zip(self.layout.projections, self._kinds, strict=True))
        for name, kind in (*kinds.items(), ("router", Router)):
            module = self.router if name == "router" else self.part(name)
            if type(module) is not kind:
                return f"its {name} is a {type(module).__module__}.{type(module).__qualname__}"
        for name in self.layout.dropouts:
            if type(self.part(name)) not in (nn.Dropout, nn.Identity):
                return f"its {name} is a {type(self.part(name)).__qualname__}"
        watched = self._watched if torch.compiler.is_compiling() else self._watch()
        for modules, name, module, _, hooks, forward in watched:
            if modules.get(name) is not module:
                return f"its {name} was replaced"
            if module._forward_hooks or len(module._forward_pre_hooks) != hooks:
                return f"its {name} has hooks"
            if module.__dict__.get("forward") is not forward:
                return f"the forward method of its {name} was replaced"
        return None

    def _unfit(self) -> str | None:
        """Which weights the kernels cannot take, in words; `None` if they can take all."""
        layout, router = self.layout, self.router
        try:
            mesh = expert_mesh(self)
        except ValueError as error:
            return f"it does not lie as it must: {error}"
        weights = {name: self.part(name)._parameters.get("weight") for name in layout.projections}
        for name, weight in {**weights, "router": router._parameters.get("weight")}.items():
            if type(weight) is not (nn.Parameter if mesh is None or name == "router" else DTensor):
                return f"the weight of its {name} is a {type(weight).__name__}"
        tensors: list[Any] = [local(weight) for weight in weights.values() if weight is not None]
        if len({weight.dtype for weight in tensors}) > 1:
            return "its weights are of several dtypes"
        if len({tensor.device for tensor in (*tensors, *router.parameters())}) > 1:
            return "its weights and router lie on several devices"
        if tensors[0].dtype != torch.int8 if self._is_int8 else not tensors[0].is_floating_point():
            return f"its weights are {tensors[0].dtype}"
        width = router.weight if router.down is None else router.down
        up, gate, down = (weight_of(self, role) for role in ("up", "gate", "down"))
        assert down is not None
        shapes = {part.shape for part in (up, gate, down) if part is not None}
        size = len(down) / len(own_experts(router.weight, mesh))
        if len(shapes) > 1 or width.shape[1] != down.shape[1] or size not in EXPERT_SIZES:
            return "the shapes of its weights and router do not fit together"
        return None

    def release_(self) -> None:
        """Forgets all copies, and how the parameters lay: the next call lays them out anew."""
        self.stacked, self.router_rows, self._runner, self._seen = None, None, None, _UNSEEN

    def refresh_(self) -> None:
        """Lays out anew what somebody moved or replaced since."""
        if not self._is_settled() and self._unfit() is None:
            with _LAYING_OUT:
                self._lay_out_()

    def _bind(self) -> FfnRunner:
        parts: dict[str, Any] = {name: getattr(self, name) for name in ("stacked", *SCALES)}
        for role in ROLES:
            parts[role], parts[f"{role}_bias"] = weight_of(self, role), bias_of(self, role)
        router, rounded = self.router, self.router_rows if self._rounds_router else None
        given: tuple[Tensor | None, Tensor | None] = (None, None)
        if router.down is None:
            given = own_experts(router.weight, self._mesh), own_experts(router.bias, self._mesh)
        if self._mesh is not None and self._mesh.get_local_rank():
            parts["down_bias"] = None  # of the sum over processes it must be there once
        # Where processes share the experts, the core is that of some of them.
        core = router.always_on if router.down is None and self._mesh is None else 0
        routing = Routing(weight=given[0], bias=given[1], threshold=self.threshold_logit, rounded=rounded, core=core)
        plan = self.acceleration
        return FfnRunner(FfnWeights(**parts), routing, plan.activation, plan.use, self._arch)

    def expected_path(self, tokens: int, use: ExpectedUse | None, in_a_row: bool = False) -> Path:
        """How the kernels would compute T tokens, of as many texts or in a row, if such a use is expected."""
        return replace(self._bind(), use=use).path_of(tokens, self.dtype, in_a_row)

    # What follows keeps the layout true where compiled graphs, which cannot look, would not see that it is not.

    def set_mode(self, mode: FfnMode) -> None:
        """As `SparseFfn.set_mode`."""
        super().set_mode(mode)
        self.refresh_()

    def set_threshold(self, threshold: float) -> None:
        """As `SparseFfn.set_threshold`; the weights stay where they are, and graphs that were captured keep theirs.

        What several tokens need together was measured at the threshold before, and is forgotten.
        """
        before, use = self.threshold_logit, self.acceleration.use
        super().set_threshold(threshold)
        if use is not None and self.threshold_logit != before:
            self.acceleration = replace(self.acceleration, use=ExpectedUse(use.active))
        if self._runner is not None:
            self._runner = self._bind()

    def expect_(self, use: ExpectedUse | None) -> None:
        """Sets the use of experts by which the path is chosen; graphs that were captured keep theirs."""
        self.acceleration = replace(self.acceleration, use=use)
        if self._runner is not None:
            self._runner = self._bind()

    def train(self, mode: bool = True) -> LaidOutFfn:
        """As `nn.Module.train`."""
        self.refresh_()
        return super().train(mode)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LaidOutFfn:
        """Moves or casts the parameters one by one and lays them out anew; scales stay in fp32."""
        kept, was_settled = {name: getattr(self, name) for name in BUFFERS}, bool(self._seen) and self._lies_as_seen()
        probe = torch.empty(0, dtype=self.dtype, device=self.router.weight.device)
        for name in BUFFERS:
            setattr(self, name, None)
        super()._apply(fn, recurse)
        device = self.router.weight.device
        # The projections of a spread FFN are moved on their own, before and after; the last one calls `refresh_`.
        unmoved = was_settled and self._lies_as_seen() and not self.block
        for name in BUFFERS if unmoved else SCALES:
            setattr(self, name, None if kept[name] is None else kept[name].to(device))
        if unmoved:
            return self
        del kept
        self.dtype, self._seen = fn(probe).dtype, _UNSEEN
        if not self.block and self._unfit() is None:
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
        made = ("_runner", "_seen", "_watched", "_mesh")
        state = {name: value for name, value in self.__dict__.items() if name not in made}
        return {**state, **dict.fromkeys(COPIES)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._watched, self._seen, self._runner, self._mesh = (), _UNSEEN, None, None
        if not self.block and self._unfit() is None:
            self._lay_out_()


def refresh_loaded(ffn: nn.Module, incompatible_keys: Any) -> None:
    """What follows when weights were loaded into the FFN."""
    assert isinstance(ffn, LaidOutFfn)
    ffn.refresh_()
