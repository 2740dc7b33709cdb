"""The sparse FFN inside vLLM: one custom operation over `lte.ops.dispatch`, in place of a stock MLP.

Its parameters keep vLLM's names and loaders, so that gate and up are stacked and sharded as in a dense model. After
loading they are laid out as the kernels read them, in the same parameters. With tensor parallelism a rank has whole
experts: its rows of gate and up, its columns of down, and its rows of the router.

Shapes: T tokens, D hidden size, F neurons and E experts of S = F / E neurons each, all of them of one rank.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from vllm.distributed import tensor_model_parallel_all_reduce
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.utils.torch_utils import direct_register_custom_op

from lte.ops.arguments import FfnWeights, Routing
from lte.ops.dispatch import FfnRunner, prepare, warm_up_tokens
from lte.ops.layout import by_neuron, stack_inputs
from lte.ops.quantize import quantize_rows
from lte.ops.reference import active_experts
from lte.vllm.architectures import ServedFfn
from lte.vllm.meter import MOST_TOKENS, Meter
from lte.vllm.settings import ServeSettings

# By the address of the router's bias, which the operation is called with: a name or a number there would make every
# layer a graph of its own for the compiler, while tensors are inputs of one graph.
_FFNS: weakref.WeakValueDictionary[int, SparseMlp] = weakref.WeakValueDictionary()


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where an FFN stands.

    Attributes:
        layer: its index in the whole model.
        name: its name in the model.
        activation: a key of `lte.ops.activations.ACTIVATIONS`.
    """

    layer: int
    name: str
    activation: str


class ServedRouter(nn.Module):
    """The parameters of a router in fp32: `weight` and `bias` of this rank's experts, and `down` of a low-rank one."""

    def __init__(self, hidden_size: int, settings: ServeSettings, rank: int, ranks: int):
        super().__init__()
        experts, low = settings.num_experts, settings.config.router_rank
        width = low or hidden_size
        self.down = _parameter([low, hidden_size], [low, hidden_size], 0) if low else None
        first = rank * (experts // ranks)
        self.weight = _parameter([experts // ranks, width], [experts, width], first)
        self.bias = _parameter([experts // ranks], [experts], first)


def _parameter(shape: list[int], whole: list[int], first: int) -> nn.Parameter:
    """A parameter of NaN that loads the rows from `first` on of a tensor of shape `whole`."""
    parameter = nn.Parameter(torch.full(shape, math.nan, dtype=torch.float32), requires_grad=False)

    def load(parameter: nn.Parameter, loaded: Tensor, *_: Any) -> None:
        if list(loaded.shape) != whole:
            raise ValueError(f"router must have parameters of shape {whole} here, got {list(loaded.shape)}")
        parameter.data.copy_(loaded.narrow(0, first, shape[0]))

    parameter.weight_loader = load  # type: ignore[attr-defined]
    return parameter


class _LeftToKernels(UnquantizedLinearMethod):
    """Method of a projection whose weight the sparse FFN reads: vLLM does not pack it away, nor compute with it."""

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Leaves the weight as it is."""

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Refuses: a product of all neurons would be the dense model's."""
        raise RuntimeError("projections of a sparse FFN must run by its kernels, got a call of their own")


class _LayOut(QuantizeMethodBase):
    """Has vLLM lay out the FFN when its weights are loaded."""

    def create_weights(self, layer: nn.Module, *args: Any, **kwargs: Any) -> None:
        """There is nothing to create: the projections have theirs."""

    def apply(self, layer: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        """Refuses: the FFN is called itself."""
        raise RuntimeError("a sparse FFN must be called as a module, got a call of its method")

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Lays out the FFN."""
        assert isinstance(layer, SparseMlp)
        layer.lay_out_()


class SparseMlp(nn.Module):
    """A sparse FFN around the projections of a stock MLP.

    Args:
        stock: vLLM's module; its projections are taken over.
        names: what it calls them.
        settings: of the deployment.
        place: where it stands.
        meter: gets samples of the routing.

    Attributes:
        runner: what computes it, once the weights are loaded.
        most_tokens: of a step. When the weights are loaded, the kernels of 1 to so many tokens are compiled, so that no
            request waits for it; 0 for none.
        warmed_up: the kernels that are compiled already; one set for all FFNs of a model.
    """

    def __init__(self, stock: nn.Module, names: ServedFfn, settings: ServeSettings, place: Place, meter: Meter):
        super().__init__()
        up, down = getattr(stock, names.up), getattr(stock, names.down)
        self.names, self.settings, self.place, self.meter = names, settings, place, meter
        for name, linear in ((names.up, up), (names.down, down)):
            if type(linear.quant_method) is not UnquantizedLinearMethod:
                raise ValueError(
                    f"{place.name}.{name} must be unquantised, got {type(linear.quant_method).__name__}; leave the "
                    "quantisation out"
                )
            linear.quant_method = _LeftToKernels()
            linear.weight.data.fill_(math.nan)  # so that what was not loaded is seen
            setattr(self, name, linear)
        if settings.config.dropped_bias and down.bias is None:
            down.bias = nn.Parameter(torch.full((down.output_size,), math.nan, dtype=down.weight.dtype), False)
        self.dtype = down.weight.dtype
        self.tp_rank, self.tp_size = down.tp_rank, down.tp_size
        self.reduces = self.tp_size > 1 and down.reduce_results
        self.low_rank = bool(settings.config.router_rank)
        self.router = ServedRouter(down.output_size, settings, self.tp_rank, self.tp_size)
        self.quant_method = _LayOut()
        self.runner: FfnRunner | None = None
        self.most_tokens = 0
        self.warmed_up = set[Hashable]()

    @torch.inference_mode(False)
    @torch.no_grad()
    def lay_out_(self) -> None:
        """Puts the weights where the kernels want them; a second call takes in what was loaded since.

        Raises:
            ValueError: if a parameter was not loaded or is not finite.
        """
        for name, parameter in self.named_parameters():
            if parameter.is_floating_point() and not torch.isfinite(parameter).all():
                raise ValueError(
                    f"{self.place.name}.{name} must be loaded and finite, got NaN or infinity in it; "
                    "`lte inspect --verify FOLDER` says what the folder lacks"
                )
        weights = self._int8_weights() if self.settings.weights == "int8" else self._native_weights()
        router = self.router
        full_rank = router.down is None
        # As the kernels' routers in 16 bits: rounded once.
        rows = router.weight.data.to(self.dtype).contiguous() if full_rank else None
        if weights.stacked is not None and rows is not None:
            first = len(weights.up) * (2 if self.names.gated else 1)
            rows = weights.stacked[first : first + len(rows)]
        routing = Routing(
            weight=rows,
            bias=router.bias.data if full_rank else None,
            threshold=self.settings.threshold_logit,
            # Where ranks share the experts, the core is that of some of them.
            core=self.settings.config.num_always_on(len(router.bias)) if full_rank and self.tp_size == 1 else 0,
        )
        self.runner = FfnRunner(
            weights,
            routing,
            self.place.activation,
            self.settings.use_of(self.place.layer),
            prepare(router.bias.device),
        )
        if self.tp_rank == 0:
            width = weights.down.shape[1]
            kept = torch.zeros(MOST_TOKENS, width, dtype=self.dtype, device=router.bias.device)
            self.meter.add(self.place.layer, kept, self.active)
        _FFNS[router.bias.data_ptr()] = self
        if self.most_tokens:
            x = torch.zeros(
                warm_up_tokens(self.most_tokens)[-1], weights.down.shape[1], dtype=self.dtype, device=router.bias.device
            )
            self.runner.warm_up(x, self.logits(x), self.warmed_up)

    def _biases(self) -> dict[str, Tensor | None]:
        up, down = getattr(self, self.names.up).bias, getattr(self, self.names.down).bias
        halves = (None, None) if up is None else up.data.chunk(2) if self.names.gated else (None, up.data)
        # Of the sum over ranks it must be there once.
        return {
            "gate_bias": halves[0],
            "up_bias": halves[1],
            "down_bias": None if down is None or self.tp_rank else down.data,
        }

    def _native_weights(self) -> FfnWeights:
        up, down = getattr(self, self.names.up).weight, getattr(self, self.names.down).weight
        halves = up.data.chunk(2) if self.names.gated else (None, up.data)
        parts = stack_inputs(halves[1], halves[0], self.router.weight if self.router.down is None else None)
        up.data = parts.stacked[: len(up)]
        if not down.data.T.is_contiguous():
            down.data = by_neuron(down.data)
        return FfnWeights(up=parts.up, gate=parts.gate, down=down.data.T, stacked=parts.stacked, **self._biases())

    def _int8_weights(self) -> FfnWeights:
        up, down = getattr(self, self.names.up), getattr(self, self.names.down)
        if up.weight is None:
            raise ValueError("lte_weights must be native to load weights again, got lte_weights=int8; start anew")
        values, scales = quantize_rows(up.weight.data)
        down_values, down_scale = quantize_rows(down.weight.data)
        up.weight = down.weight = None
        gate, value = values.chunk(2) if self.names.gated else (None, values)
        gate_scale, scale = scales.chunk(2) if self.names.gated else (None, scales)
        return FfnWeights(
            up=value, gate=gate, down=by_neuron(down_values).T,
            up_scale=scale, gate_scale=gate_scale, down_scale=down_scale, **self._biases(),
        )  # fmt: skip

    def logits(self, x: Tensor) -> Tensor | None:
        """The logits [T, E] of a low-rank router for x [T, D]; `None` where the kernels compute them."""
        if not self.low_rank:
            return None
        assert self.router.down is not None
        low = nn.functional.linear(x.float(), self.router.down)
        return nn.functional.linear(low, self.router.weight, self.router.bias)

    def active(self, x: Tensor) -> Tensor:
        """Which experts are on for x [T, D], bool [T, E]."""
        assert self.runner is not None
        logits = self.logits(x)
        routing = self.runner.routing
        return active_experts(x, routing) if logits is None else logits > routing.threshold

    def path_of(self, tokens: int, dtype: torch.dtype) -> str:
        """Which path computes T tokens, one of `lte.vllm.meter.PATHS`."""
        assert self.runner is not None
        return self.runner.path_of(tokens, dtype)

    def run(self, x: Tensor) -> Tensor:
        """The operation itself: the output [T, D] of this rank's experts for x [T, D]."""
        runner = self.runner
        assert runner is not None
        if self.tp_rank == 0:
            self.meter.keep(self.place.layer, x)
        return runner(x, self.logits(x))

    def forward(self, x: Tensor) -> Tensor:
        """The output [T, D] for x [T, D], of all ranks together."""
        out = torch.ops.vllm.lte_sparse_ffn(x, self.router.bias)
        return tensor_model_parallel_all_reduce(out) if self.reduces else out


def _sparse_ffn(x: Tensor, bias: Tensor) -> Tensor:
    ffn = _FFNS.get(bias.data_ptr())
    if ffn is None:
        raise RuntimeError("a sparse FFN must be where it was when its weights were loaded, got a router elsewhere")
    return ffn.run(x)


def _like_x(x: Tensor, bias: Tensor) -> Tensor:
    return torch.empty_like(x)


direct_register_custom_op("lte_sparse_ffn", _sparse_ffn, fake_impl=_like_x)
