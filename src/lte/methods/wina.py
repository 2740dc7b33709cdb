"""WINA: every projection skips the inputs that matter least by input and weight (Chen et al., 2025, arXiv 2505.19427).

An input is used where |x_i| ||W_:,i||_2 is among the K largest of the token, K = (1 - target) of the inputs. No
calibration, and the count is exact for every token. As for TEAL, `linears="ffn"` is the default and `linears="block"`
sparsifies attention as well, as the paper does. The paper's transform, which makes the columns of some projections
orthogonal by rotating the residual stream, is left out; so is its share per layer, which it takes over from TEAL.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import Tensor

from lte.config import MethodConfig, check_choice
from lte.hf.families import Family
from lte.methods.input_sparsity import InputSparse, Linears, make_input_sparse_, remove_input_sparsity_, sparse_pair
from lte.methods.method import Batches, Method, register
from lte.methods.neuron_ffn import keep_largest, kept_count
from lte.nn.metering import metered_modules


@dataclass(frozen=True, kw_only=True)
class WinaConfig(MethodConfig):
    """`target_sparsity` is the share of inputs that every projection skips for every token.

    Attributes:
        linears: which projections are sparse: those of the FFNs, or all of the transformer blocks.
    """

    name = "wina"
    linears: Linears = "ffn"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("linears", self.linears, get_args(Linears))


class WinaInputs(InputSparse):
    """Uses the inputs of the largest |x_i| times `input_norms`, a buffer [K]."""

    input_norms: Tensor

    def keeps(self, x: Tensor) -> Tensor:
        """See `InputSparse`."""
        scores = x.abs() * self.input_norms
        return keep_largest(scores, kept_count(x.shape[-1], self.target_sparsity)).bool()


_CLASSES = sparse_pair(WinaInputs)


def install_(model: Any, family: Family, config: WinaConfig) -> None:
    """Makes the projections sparse."""

    def initialise_(projection: Any) -> None:
        projection.target_sparsity = config.target_sparsity
        width = projection.dense_neurons
        projection.register_buffer(
            "input_norms", torch.ones(width, device=projection.weight.device, dtype=torch.float32)
        )

    make_input_sparse_(model, family, config.linears, _CLASSES, initialise_)


@torch.no_grad()
def fit_norms_(model: Any, config: WinaConfig, batches: Batches) -> None:
    """Sets the norms of the columns."""
    for projection in metered_modules(model).values():
        projection.input_norms.copy_(projection.matrix.float().norm(dim=0))  # type: ignore[operator]


register(
    Method(
        config=WinaConfig,
        about="inputs of the projections that are small for the token and its weights",
        install=install_,
        remove=remove_input_sparsity_,
        fit=fit_norms_,
        fp32_names=("input_norms",),
    )
)
