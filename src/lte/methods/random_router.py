"""Random routers: frozen linear routers with random weights and top-K, the ablation of LTE's paper (arXiv 2402.06126).

The model is trained, its routers are not: what routing is worth beyond some fixed division of the tokens. Experts are
those of LTE, and the K experts of the highest scores compute unscaled.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from lte.hf.install import StockFfn
from lte.methods.method import Method, register, wraps_ffns
from lte.methods.neuron_ffn import (
    ExpertConfig,
    ExpertFfn,
    group_experts_as_lte_,
    keep_largest,
    needs_grouping_text,
)
from lte.methods.selectors import LinearSelector, count_weights


@dataclass(frozen=True, kw_only=True)
class RandomRouterConfig(ExpertConfig):
    """`seed` draws the routers, too."""

    name = "random_router"


class RandomRouterFfn(ExpertFfn):
    """Keeps the K experts of the largest x . w_e, w_e ~ N(0, 1 / D)."""

    frozen = ("router",)

    def __init__(self, stock: StockFfn, config: RandomRouterConfig):
        super().__init__(stock, config)
        self.router = LinearSelector(stock, self.num_experts, stock.hidden_size**-0.5, config.seed)

    @property
    def selector_weights(self) -> int:
        """Those of the router."""
        return count_weights(self.router)

    def expert_multipliers(self, x: Tensor, activated: Tensor, hidden: Tensor) -> Tensor:
        """See `ExpertFfn`."""
        return keep_largest(self.router(x).detach(), self.num_kept_experts)


register(
    Method(
        config=RandomRouterConfig,
        about="experts, by frozen random routers",
        install=wraps_ffns(RandomRouterFfn),
        prepare=group_experts_as_lte_,
        needs_calibration=needs_grouping_text,
        trained=True,
    )
)
