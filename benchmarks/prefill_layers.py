"""Random FFNs of a model's widths, in the layout of accelerated weights, with routing by sparsity or by masks."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lte.bench.shapes import SHAPES
from lte.config import check_choice
from lte.ops.arguments import FfnWeights, Routing
from lte.ops.layout import stack_inputs
from lte.ops.reference import active_experts

EXPERT_SIZE = 32
# Several times the L2 cache, so that it holds nothing when a layer's turn comes again.
ALL_BYTES = 3 << 29


@dataclass(frozen=True, kw_only=True)
class Widths:
    """D, F, and how many layers make up `ALL_BYTES`."""

    hidden: int
    neurons: int

    @staticmethod
    def of(shape: str) -> Widths:
        """Those of a shape of `lte bench`."""
        check_choice("shape", shape, SHAPES)
        return Widths(hidden=SHAPES[shape]["hidden_size"], neurons=SHAPES[shape]["intermediate_size"])

    @property
    def experts(self) -> int:
        """E."""
        return self.neurons // EXPERT_SIZE

    @property
    def weight_bytes(self) -> int:
        """Bytes of an FFN's weights in 16 bits."""
        return 6 * self.hidden * self.neurons

    @property
    def layers(self) -> int:
        """How many FFNs with weights of their own are run one after the other."""
        return min(64, max(8, ALL_BYTES // self.weight_bytes))


class Layers:
    """FFNs with weights of their own, hidden states [T, D], and one routing per layer.

    Attributes:
        widths: D, F and the number of FFNs.
        x: hidden states of all layers, by `take`.
        states: those of each layer: x, or by `follow` others for each.
        ffns: the weights.
        gate_up: gate over up of each layer, [2F, D], the same memory.
        stock_down: the down projections as a stock model stores them, [D, F].
        routings: by `route`.
    """

    def __init__(self, widths: Widths, device: str = "cuda", seed: int = 0):
        self.widths = widths
        hidden, neurons, experts = widths.hidden, widths.neurons, widths.experts
        self.generator = torch.Generator(device).manual_seed(seed)
        self.ffns: list[FfnWeights] = []
        self.gate_up: list[Tensor] = []
        self.stock_down: list[Tensor] = []
        self.routers: list[Tensor] = []
        for _ in range(widths.layers):
            gate, up = (self._random(neurons, hidden, hidden**-0.5) for _ in range(2))
            inputs = stack_inputs(up, gate, self._random(experts, hidden, hidden**-0.5))
            down = self._random(neurons, hidden, neurons**-0.5)
            self.ffns.append(FfnWeights(up=inputs.up, gate=inputs.gate, down=down, stacked=inputs.stacked))
            self.gate_up.append(inputs.stacked[: 2 * neurons])
            self.stock_down.append(down.T.contiguous())
            assert inputs.router is not None
            self.routers.append(inputs.router)
        self.random_routers = [router.clone() for router in self.routers]
        self.take(1)
        self.route(0.0)

    def _random(self, rows: int, columns: int, scale: float) -> Tensor:
        values = torch.empty(rows, columns, dtype=torch.bfloat16, device=self.generator.device)
        return values.normal_(std=scale, generator=self.generator)

    def take(self, tokens: int) -> None:
        """Other hidden states, of standard normal numbers: a random router's logits are then standard normal, too."""
        self.x = self._random(tokens, self.widths.hidden, 1.0)
        self.states = [self.x] * self.widths.layers

    def route(self, sparsity: float, *, same: bool = False) -> None:
        """Skips a share of the experts: for all tokens the same ones, exactly, or for every token its own, about."""
        self.routings = []
        experts = self.widths.experts
        for index, (router, values) in enumerate(zip(self.routers, self.random_routers, strict=True)):
            if same:
                router.zero_()
                order = torch.randperm(experts, generator=torch.Generator().manual_seed(index))
                bias = torch.full((experts,), -1.0)
                bias[order[: round(experts * (1 - sparsity))]] = 1.0
                self.routings.append(Routing(weight=router, bias=bias.to(router.device)))
            else:
                router.copy_(values)
                threshold = statistics.NormalDist().inv_cdf(sparsity) if sparsity > 0 else -1e4
                bias = torch.zeros(experts, device=router.device)
                self.routings.append(Routing(weight=router, bias=bias, threshold=threshold))

    def follow(self, masks: Sequence[Tensor], core: int = 0) -> None:
        """Lets the tokens of the first layers choose by given masks, each layer by one of its own.

        The E rows of a router are orthonormal. Hidden states are logits of 1 and -1 times the router, and noise that no
        router sees.

        Args:
            masks: boolean [T, E'] of each such layer. Where E' is less than E, some columns are taken twice, spread
                over all; where it is more, some are left out.
            core: how many of the columns, the first ones, are those of experts that are always on.

        Raises:
            RuntimeError: if a router decides otherwise, which rounding to bf16 does not explain.
        """
        widths, device = self.widths, self.generator.device
        square = torch.randn(widths.hidden, widths.experts, device=device, generator=self.generator)
        basis = torch.linalg.qr(square).Q
        self.states, self.routings = [], []
        for mask, router in zip(masks, self.routers, strict=False):
            columns = torch.arange(widths.experts, device=mask.device) * mask.shape[1] // widths.experts
            wanted = mask[:, columns].to(device)
            noise = torch.randn(len(mask), widths.hidden, device=device, generator=self.generator)
            seen = torch.where(wanted, 1.0, -1.0) - noise @ basis
            router.copy_(basis.T)
            self.states.append((noise + seen @ basis.T).bfloat16())
            bias = torch.zeros(widths.experts, device=device)
            self.routings.append(Routing(weight=router, bias=bias, core=int((columns < core).sum())))
            if not torch.equal(active_experts(self.states[-1], self.routings[-1]), wanted):
                raise RuntimeError("a router must choose by the mask that it was given")
        self.x = self.states[0]

    def decided(self, layer: int) -> Tensor:
        """Boolean [T]: tokens none of whose logits is so near the threshold that rounding alone decides.

        Sums in another order differ by about 1e-6 of these logits, and where that moves a 16-bit product over the
        threshold two right results differ by an expert.
        """
        routing = self.routings[layer]
        assert routing.weight is not None
        assert routing.bias is not None
        products = self.x.float() @ routing.weight.float().T
        low, high = ((products + move).bfloat16().float() + routing.bias > routing.threshold for move in (-1e-4, 1e-4))
        return (low == high).all(1)
