"""The two models of a run: the sparse one on the kernels, and a stock dense one with the same weights."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lte.config import LteConfig
from lte.hf.acceleration import accelerate_, no_kernels
from lte.hf.families import Family, dense_ffns, family_of
from lte.hf.install import num_neurons, require_sparse_ffns, sparse_ffns
from lte.hf.loading import is_ours
from lte.methods import densify_, sparsify_
from lte.nn.accelerated import WeightFormat
from lte.nn.sparse_ffn import SparseFfn

# FFN weights that are timed together hold at least this much, so that no cache holds them all.
LEAST_FFN_BYTES = 2 << 30


@dataclass(frozen=True)
class ModelPair:
    """What is compared.

    Attributes:
        sparse: LTE model in eval and hard mode, its FFNs laid out for the kernels.
        dense: stock model with the same weights in the stock layout; all but the FFNs is shared with `sparse`.
        trained: whether the routers of `sparse` are its own, and not put there for this run.
        weights: what the kernels read, "native" or "int8".
    """

    sparse: Any
    dense: Any
    trained: bool
    weights: WeightFormat

    @property
    def family(self) -> Family:
        """The row of the family table."""
        return family_of(self.dense.config)

    @property
    def sparse_ffns(self) -> list[SparseFfn]:
        """FFNs of the sparse model in depth order."""
        return list(require_sparse_ffns(self.sparse).values())

    @property
    def dense_ffns(self) -> list[nn.Module]:
        """FFNs of the dense model in depth order."""
        return list(dense_ffns(self.dense, self.family).values())

    @property
    def device(self) -> torch.device:
        """Where both lie."""
        return next(self.dense.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return self.dense_ffns[0].get_submodule(self.family.layout.down).weight.dtype  # type: ignore[return-value]

    @property
    def provider(self) -> str:
        """Name of the sparse model in the rows."""
        return "lte" if self.weights == "native" else f"lte {self.weights}"


def model_pair(model: Any, weights: WeightFormat = "native") -> ModelPair:
    """Makes both models of a dense or LTE model, which becomes one of them: use it no more.

    A dense model gets routers and keeps the order of its neurons. The FFNs are in memory twice from here on.

    Raises:
        ValueError: for an unknown family or a model that cannot be converted.
    """
    if family_of(model.config).layout.spread:
        raise ValueError(
            "model must have FFNs that are modules of their own to be timed, got model_type="
            f"{model.config.model_type!r}, whose blocks hold them"
        )
    reason = no_kernels(model) if is_ours(model) else None
    if reason is not None:
        raise ValueError(
            f"model must be dense or an LTE model for `lte bench`, which times kernels, got one of the method {reason}"
        )
    model.eval().requires_grad_(False)
    trained = bool(sparse_ffns(model))
    other = _copy_ffns(model, family_of(model.config))
    if trained:
        sparse, dense = model, densify_(other)
    else:
        sparse, dense = sparsify_(other, LteConfig(grouping="contiguous", expert_size=_expert_size(model))), model
    for ffn in sparse_ffns(sparse).values():
        ffn.set_mode("hard")
    sparse.requires_grad_(False)
    accelerate_(sparse, weights)
    return ModelPair(sparse, dense, trained, weights)


def _copy_ffns(model: Any, family: Family) -> Any:
    """A copy that shares all parameters and buffers but those of the FFNs."""
    ffns = sparse_ffns(model) or dense_ffns(model, family)
    own = {id(tensor) for ffn in ffns.values() for tensor in (*ffn.parameters(), *ffn.buffers())}
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers()) if id(tensor) not in own}
    return copy.deepcopy(model, shared)


def _expert_size(model: Any) -> int:
    """32, or the largest power of two below it that divides the neurons."""
    family = family_of(model.config)
    neurons = num_neurons(next(iter(dense_ffns(model, family).values())), family.layout)
    return next(size for size in (32, 16, 8) if neurons % size == 0)


def timed_layers(pair: ModelPair) -> int:
    """How many FFNs are timed together: enough to fill no cache with them, at least 4 if there are so many."""
    size = sum(p.nbytes for p in pair.dense_ffns[0].parameters())
    return min(len(pair.dense_ffns), max(4, -(-LEAST_FFN_BYTES // size)))
