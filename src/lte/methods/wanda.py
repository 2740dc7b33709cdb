"""Wanda: weights of the smallest |W_ij| ||X_j||_2 are set to 0 (Sun et al., ICLR 2024, arXiv 2306.11695).

||X_j||_2 is the norm of input j over the calibration tokens, and weights compete within their output row: a share of
each row goes, or all but N of each M consecutive inputs. As in the paper the blocks are pruned one after another, so
that a block sees what the pruned ones before it compute. The model stays a stock model with zeros in it, and no neuron
is skipped: its FLOPs are nominal, 2 per non-zero weight, and `lte.eval.cost.Cost` says how its bytes are counted.

Settings of the paper: 50% of all block linears (`linears="block"`), 128 sequences of C4. The default prunes the FFNs
alone, which compares like with like.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from lte.config import MethodConfig, check_choice
from lte.hf.families import block_name, family_of
from lte.methods.calibration import run_batches
from lte.methods.input_sparsity import Linears, projections_of
from lte.methods.method import Batches, Method, register
from lte.nn.all_or_nothing import keep_numbers
from lte.nn.hooks import before_each_call

Pattern = Literal["unstructured", "2:4", "4:8"]


@dataclass(frozen=True, kw_only=True)
class WandaConfig(MethodConfig):
    """`target_sparsity` is the share of the weights of each output row that is set to 0.

    Attributes:
        pattern: `unstructured`, or how many of how many consecutive inputs stay; those need a target of 0.5.
        linears: which projections are pruned: those of the FFNs, or all of the transformer blocks.
        sequential: whether a block's inputs are those that the pruned blocks before it give, as in the paper; each
            block then takes a pass of its own up to itself. Otherwise one pass of the dense model serves all.
    """

    name = "wanda"
    pattern: Pattern = "unstructured"
    linears: Linears = "ffn"
    sequential: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("pattern", self.pattern, get_args(Pattern))
        check_choice("linears", self.linears, get_args(Linears))
        if self.pattern != "unstructured" and self.target_sparsity != 0.5:
            raise ValueError(
                f"target_sparsity must be 0.5 for pattern={self.pattern!r}, got target_sparsity={self.target_sparsity}"
            )


def pruned_weights(weight: Tensor, input_norms: Tensor, config: WandaConfig) -> Tensor:
    """Which weights go, bool [O, K].

    Args:
        weight: [O, K].
        input_norms: ||X_j||_2, [K].
        config: the share or the pattern.

    Raises:
        ValueError: if the pattern does not divide K.
    """
    scores = weight.abs().float() * input_norms
    if config.pattern == "unstructured":
        return _smallest(scores, round(config.target_sparsity * scores.shape[1]))
    kept, group = map(int, config.pattern.split(":"))
    if scores.shape[1] % group:
        raise ValueError(f"pattern must divide {scores.shape[1]} inputs, got pattern={config.pattern!r}")
    return _smallest(scores.unflatten(1, (-1, group)), group - kept).flatten(1)


def _smallest(scores: Tensor, count: int) -> Tensor:
    """True at the `count` smallest of the last dimension; of equal ones the first."""
    index = scores.argsort(dim=-1, stable=True)[..., :count]
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, index, True)


@torch.no_grad()
def prune_wanda_(model: Any, config: WandaConfig, batches: Batches) -> None:
    """Sets weights of a dense model to 0 in place.

    Args:
        model: a dense model of a supported family.
        config: what to prune.
        batches: with `input_ids` and optionally `attention_mask`, [B, T]; padding does not count.

    Raises:
        ValueError: for a pattern that does not fit, or no calibration token.
    """
    family = family_of(model.config)
    projections = projections_of(model, family, config.linears)
    keep_numbers(family.layout.matrix(projection) for projection in projections.values())
    groups: dict[str, dict[str, Any]] = {}
    for name, projection in projections.items():
        groups.setdefault(block_name(name) if config.sequential else "", {})[name] = projection
    for block, part in groups.items():
        norms = _input_norms(model, batches, part, model.get_submodule(block) if block else None)
        for name, projection in part.items():
            weight = family.layout.matrix(projection)
            weight.masked_fill_(pruned_weights(weight, norms[name], config), 0)


def _input_norms(model: Any, batches: Batches, projections: dict[str, Any], last: Any) -> dict[str, Tensor]:
    """||X_j||_2 of the inputs of each projection over the tokens that are no padding, fp32 [K]."""
    squares: dict[str, Tensor] = {}
    masks: dict[str, Tensor] = {}

    def add(name: str, args: tuple[Tensor, ...]) -> None:
        rows = args[0].flatten(0, -2)
        kept = rows[masks[name].to(rows.device).flatten()].double()
        squares[name] = squares.get(name, 0.0) + kept.square().sum(0)

    with before_each_call(projections, add):
        run_batches(model, batches, masks, list(projections), last)
    return {name: total.sqrt().float() for name, total in squares.items()}


register(
    Method(
        config=WandaConfig,
        about="no neurons: weights that matter little are 0",
        prepare=prune_wanda_,
        needs_calibration=lambda config: True,
        no_kernels="it leaves a stock model with zeros among its weights, which no kernel here skips",
        zeroes_weights=True,
    )
)
