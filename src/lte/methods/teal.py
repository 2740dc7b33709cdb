"""TEAL: every projection skips the inputs of small magnitude (Liu et al., ICLR 2025, arXiv 2408.14690).

An input x_i is used where |x_i| is above a threshold of its projection, the quantile of |x_i| on calibration text. The
columns of the others are not read: of gate and up by x, of down by h. `uniform` gives every projection the target;
`greedy` is the paper's Algorithm 1, which raises, in every transformer block by itself, the share of the projection
whose step costs the block's output least, until the block's weights are skipped to the target.

The paper sparsifies attention too, which is `linears="block"`; the default sparsifies the FFNs alone, which compares
like with like. The paper leaves the first half of the tokens of a prompt dense, which is not done here: all tokens are
treated alike. Settings of the paper: targets of 25 to 65%, greedy steps of 5%.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from lte.config import MethodConfig, check_choice
from lte.hf.families import Family, block_name
from lte.methods.calibration import MagnitudeHistogram, eval_mode, observe_, run_batches
from lte.methods.input_sparsity import InputSparse, Linears, make_input_sparse_, remove_input_sparsity_, sparse_pair
from lte.methods.method import Batches, Method, register
from lte.nn.metering import metered_modules

Allocation = Literal["uniform", "greedy"]


@dataclass(frozen=True, kw_only=True)
class TealConfig(MethodConfig):
    """`target_sparsity` is the share of inputs that is skipped, mean over the weights of a block for `greedy`.

    Attributes:
        allocation: how the target is shared out between the projections of a block.
        linears: which projections are sparse: those of the FFNs, or all of the transformer blocks.
        greedy_step: share of a block's weights by which `greedy` proceeds.
    """

    name = "teal"
    allocation: Allocation = "uniform"
    linears: Linears = "ffn"
    greedy_step: float = 0.05

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("allocation", self.allocation, get_args(Allocation))
        check_choice("linears", self.linears, get_args(Linears))
        if not 0 < self.greedy_step <= 1:
            raise ValueError(f"greedy_step must lie in (0, 1], got greedy_step={self.greedy_step}")


class TealInputs(InputSparse):
    """Skips inputs with |x_i| <= `threshold`, a scalar buffer."""

    threshold: Tensor

    def keeps(self, x: Tensor) -> Tensor:
        """See `InputSparse`."""
        return x.abs() > self.threshold


_CLASSES = sparse_pair(TealInputs)


def install_(model: Any, family: Family, config: TealConfig) -> None:
    """Makes the projections sparse, with thresholds of 0."""

    def initialise_(projection: Any) -> None:
        projection.register_buffer("threshold", torch.zeros((), device=projection.weight.device, dtype=torch.float32))

    make_input_sparse_(model, family, config.linears, _CLASSES, initialise_)


@torch.no_grad()
def fit_thresholds_(model: Any, config: TealConfig, batches: Batches) -> None:
    """Sets all thresholds by the magnitudes of the inputs in the dense model.

    The greedy shares are found on the first batch: it runs every block once per projection and step.
    """
    histograms: dict[str, MagnitudeHistogram] = {}

    def see(name: str, module: Any, values: tuple[Tensor, ...]) -> None:
        histograms.setdefault(name, MagnitudeHistogram()).update(values[0])

    observe_(model, batches, see)
    projections: dict[str, Any] = metered_modules(model)
    for projection in projections.values():
        projection.threshold.zero_()
    if config.allocation == "uniform":
        for name, projection in projections.items():
            projection.threshold.fill_(histograms[name].quantile(config.target_sparsity))
        return
    blocks: dict[str, list[str]] = {}
    for name in projections:
        blocks.setdefault(block_name(name), []).append(name)
    calls = _block_calls(model, list(blocks), batches[0])
    with eval_mode(model):
        for block, names in blocks.items():
            part = {name: (projections[name], histograms[name]) for name in names}
            _allocate_greedily_(calls[block], part, config)


@dataclass
class _BlockCall:
    """A transformer block, what it was called with, what it gave, and which tokens count, bool [B T]."""

    block: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Tensor
    keep: Tensor

    def error(self) -> float:
        """Squared distance of the block's output to what it was, over the tokens that count."""
        change = _first(self.block(*self.args, **self.kwargs)) - self.output
        return change.flatten(0, -2)[self.keep].float().square().sum().item()


def _first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def _block_calls(model: Any, names: list[str], batch: Mapping[str, Tensor]) -> dict[str, _BlockCall]:
    """One dense pass; the calls are kept as they were, on the device."""
    calls: dict[str, _BlockCall] = {}
    masks: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def hook(block: Any, args: Any, kwargs: Any, output: Any) -> None:
            calls[name] = _BlockCall(block, args, kwargs, _first(output), masks[name].flatten())

        return hook

    hooks = [model.get_submodule(name).register_forward_hook(keep(name), with_kwargs=True) for name in names]
    try:
        run_batches(model, [batch], masks, names)
    finally:
        for hook in hooks:
            hook.remove()
    return calls


def _allocate_greedily_(call: _BlockCall, part: dict[str, tuple[Any, MagnitudeHistogram]], config: TealConfig) -> None:
    """Algorithm 1 of the paper for one block; a step skips the same number of weights wherever it is taken."""
    total = sum(projection.dense_weights for projection, _ in part.values())
    shares = dict.fromkeys(part, 0.0)
    skipped = 0.0
    while config.target_sparsity - skipped > 1e-9:
        step = min(config.greedy_step, config.target_sparsity - skipped)
        errors = {}
        for name, (projection, histogram) in part.items():
            share = min(1.0, shares[name] + step * total / projection.dense_weights)
            if share == shares[name]:
                continue
            before = projection.threshold.clone()
            projection.threshold.fill_(histogram.quantile(share))
            errors[name] = (call.error(), share)
            projection.threshold.copy_(before)
        best = min(errors, key=lambda name: errors[name][0])
        projection, histogram = part[best]
        projection.threshold.fill_(histogram.quantile(errors[best][1]))
        skipped += (errors[best][1] - shares[best]) * projection.dense_weights / total
        shares[best] = errors[best][1]


register(
    Method(
        config=TealConfig,
        about="inputs of the projections that are small for the token",
        install=install_,
        remove=remove_input_sparsity_,
        fit=fit_thresholds_,
        needs_calibration=lambda config: True,
        fp32_names=("threshold",),
    )
)
