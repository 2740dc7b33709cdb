"""A sparse FFN that runs on the kernels in hard mode, and on plain PyTorch wherever they would compute something else.

Shapes: D hidden size, F neurons, E experts.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C import _get_tracing_state, _len_torch_dispatch_stack
from torch.autograd import forward_ad
from torch.distributed.tensor import DTensor

from lte.nn.expert_mesh import own_experts
from lte.nn.ffn_parts import ROLES, dequantize_projections_, quantize_projections_, weight_of
from lte.nn.laid_out import COPIES, DECELERATE, SCALES, Acceleration, LaidOutFfn, WeightFormat, refresh_loaded
from lte.nn.passing import install_passing_, remove_passing_
from lte.nn.shards import local, place_
from lte.nn.sparse_ffn import SparseFfn, is_transformed
from lte.ops.arguments import DTYPES, Routing
from lte.ops.reference import router_logits

__all__ = ["AcceleratedFfn", "Acceleration", "WeightFormat"]


def _is_followed() -> bool:
    """Whether transforms, traces, modes or tangents follow the operations of PyTorch, which the kernels pass by."""
    return (
        is_transformed()
        or _len_torch_dispatch_stack() > 0
        or _get_tracing_state() is not None
        or forward_ad._current_level >= 0
    )


class AcceleratedFfn(LaidOutFfn):
    """What a `SparseFfn` is while it is accelerated: `install_` and `remove_` change its class in place."""

    _trainable: list[str]

    @staticmethod
    def install_(ffn: SparseFfn, acceleration: Acceleration) -> None:
        """Makes a `SparseFfn` with plain projections, `nn.Linear` say, an `AcceleratedFfn`."""
        vars(ffn).update(dict.fromkeys(COPIES))
        for name in SCALES:
            ffn.register_buffer(name, None, persistent=False)
        trainable = [name for name in ffn.layout.projections if ffn.part(name).weight.requires_grad]
        dtype = weight_of(ffn, "up").dtype  # type: ignore[union-attr]
        ffn.__class__ = AcceleratedFfn
        assert isinstance(ffn, AcceleratedFfn)
        ffn.acceleration, ffn.dtype = acceleration, dtype
        ffn._trainable, ffn._activation = trainable, (ffn.activation_function,)
        if ffn.block:
            install_passing_(ffn)
        ffn._kinds = tuple(type(ffn.part(name)) for name in ffn.layout.projections)
        ffn._after_load = ffn.register_load_state_dict_post_hook(refresh_loaded)
        if ffn._is_int8:
            for role, scale in quantize_projections_(ffn).items():
                setattr(ffn, f"{role}_scale", scale)
        ffn._lay_out_()

    @torch.no_grad()
    def remove_(self) -> None:
        """Makes it a `SparseFfn` again, its parameters contiguous; int8 weights come back as they were rounded."""
        if self._is_int8:
            scales = {role: getattr(self, f"{role}_scale") for role in ROLES if weight_of(self, role) is not None}
            dequantize_projections_(self, scales, self.dtype)
            for name in self._trainable:
                self.part(name).weight.requires_grad_(True)
        else:
            for weight in (*(self.part(name).weight for name in self.layout.projections), self.router.weight):
                # What a quantiser made of a weight is its own.
                if type(weight) in (nn.Parameter, DTensor):
                    place_(weight, local(weight).detach().clone(memory_format=torch.contiguous_format))
        if self.block:
            remove_passing_(self)
        self._after_load.remove()
        for name in SCALES:
            delattr(self, name)
        for name in (*LaidOutFfn.__annotations__, *AcceleratedFfn.__annotations__):
            # A copy that has not run yet has no runner.
            vars(self).pop(name, None)
        self.__class__ = SparseFfn  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        """As `SparseFfn.forward`, by the kernels in hard mode where no gradient is wanted."""
        if self._mesh is not None and torch.compiler.is_compiling():
            return _between_graphs(self, x)
        if self.block:
            if x.shape[-1] != self.hidden_size:
                return super().forward(x)
        elif not self.takes(x):
            return super().forward(x)
        # Graphs must see the parameters, which stay where they are: CUDA graphs copy all other inputs.
        runner = self._bind() if torch.compiler.is_compiling() else self._runner
        flat = x.reshape(-1, x.shape[-1])
        logits = None
        if self.router.down is not None:
            logits = self.router(flat)
        elif self.record_logits:
            logits = router_logits(flat, runner.routing if self._mesh is None else self._whole_routing())
        if self.record_logits and logits is not None:
            self.logits = logits.view(*x.shape[:-1], -1)
        in_a_row = x.dim() == 3 and x.shape[0] == 1  # OPT's [T, D] does not say
        if self._mesh is None:
            return runner(flat, logits, in_a_row).view(x.shape)
        own = logits if logits is None else own_experts(logits, self._mesh, -1).contiguous()
        output = runner(flat, own, in_a_row)
        # As the plan's down projection does for its own products.
        dist.all_reduce(output, group=self._mesh.get_group())
        return output.view(x.shape)

    def _whole_routing(self) -> Routing:
        """The routing of all experts, as the kernels of all processes together decide."""
        router = self.router
        return Routing(weight=router.weight.to(self.dtype), bias=router.bias, threshold=self.threshold_logit)

    def takes(self, x: Tensor) -> bool:
        """Whether the kernels compute the FFN for hidden states x, in this mode and now.

        Raises:
            ValueError: if they do not, and nothing else can, as the weights are int8.
        """
        taken = self._kernels_take(x)
        if not taken and self._is_int8:
            self._refuse(x)
        return taken

    def _kernels_take(self, x: Tensor) -> bool:
        return (
            self.mode == "hard"
            # Dropout is random, and not what the kernels compute.
            and not (self.training and self._drops)
            and x.device.type in ("cpu", "cuda")
            and x.numel() > 0
            and not torch.is_autocast_enabled(x.device.type)
            # Tensors of other classes, and all of them under `torch.func`, hold no numbers that a kernel could read.
            and (torch.compiler.is_compiling() or (type(x) is Tensor and not _is_followed()))
            # Neither do copies for `nn.DataParallel`, whose weights are parameters no more.
            and "_is_replica" not in self.__dict__
            and not self._wants_gradient(x)
            and (self._is_plain() if torch.compiler.is_compiling() else self._is_settled() or self._settle_())
            and x.dtype == self.dtype
            and x.dtype in DTYPES
            and x.device == self._device
        )

    def _is_plain(self) -> bool:
        """As `_is_settled`, in what a graph is made for; it is made anew for modules of other classes."""
        down = weight_of(self, "down")
        return down is not None and down.is_contiguous() and self._attached() is None

    @property
    def _drops(self) -> bool:
        return any(getattr(self.part(name), "p", 0) > 0 for name in self.layout.dropouts)

    def _wants_gradient(self, x: Tensor) -> bool:
        return torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in self.own_parameters()))

    def _refuse(self, x: Tensor) -> None:
        attached = self._attached() or self._unfit()
        raise ValueError(
            "int8 weights must run in hard mode, in torch.no_grad(), without autocast, dropout, hooks and adapters, "
            f"on {self.dtype}, got mode={self.mode}, x={x.dtype}, grad_enabled={torch.is_grad_enabled()}"
            f"{'' if attached is None else f', and {attached}'}; otherwise {DECELERATE}"
        )

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, kernels={self.acceleration.weights}"


@torch.compiler.disable
def _between_graphs(ffn: AcceleratedFfn, x: Tensor) -> Tensor:
    """The FFN's output outside of graphs, which cannot hold `DTensor`s whose parts lie elsewhere (torch 2.13)."""
    return ffn.forward(x)
