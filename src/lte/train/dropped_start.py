"""What the biases that stand for dropped outputs start from: the mean of these on text (SPON, arXiv 2512.12744).

At first nothing is dropped, so that a vector for all that will be would be wrong. It comes with the target: where the
ramp of stage 1 has reached a share of the target sparsity, that share of the vector has been added. What the training
makes of it is left alone.

Shapes: B sequences, T tokens, D hidden size, F neurons, E experts.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lte.data.batches import Batch
from lte.data.rows import routing_masks
from lte.hf.inputs import run_without_logits
from lte.hf.install import require_sparse_ffns
from lte.hf.projections import base_of
from lte.methods.lte import evaluating
from lte.nn.hooks import before_each_call
from lte.nn.shards import assign_, whole
from lte.nn.sparse_ffn import SparseFfn
from lte.train.sparsity_controller import target_logit


@torch.no_grad()
def mean_dropped_outputs(model: nn.Module, batches: Iterable[Batch], target_sparsity: float) -> list[Tensor]:
    """The mean over tokens of what each FFN's experts below the threshold add to its output, fp32 [D] each.

    The threshold is the logit below which the target's share of all experts lies, on the same text. All experts run
    meanwhile: what routers that are only fitted would do to later layers is not what trained ones do.

    Args:
        model: an LTE model with fitted routers.
        batches: as for `lte.train.router_init.fit_routers_`; they are read twice.
        target_sparsity: share of experts that are dropped.
    """
    batches = list(batches)
    ffns = require_sparse_ffns(model)
    found: list[Tensor] = []
    for batch in batches:
        masks = routing_masks(model, list(ffns), batch)
        logits, _ = run_densely(model, ffns, batch, hidden=False)
        found.append(target_logit([logits[name] for name in ffns], [masks[name] for name in ffns], target_sparsity))
    finite = torch.stack([logit for logit in found if logit.isfinite()])
    threshold = finite.mean()
    sums: dict[str, Tensor] = {}
    counts: dict[str, Tensor] = {}
    for batch in batches:
        masks = routing_masks(model, list(ffns), batch)
        logits, hidden = run_densely(model, ffns, batch)
        for name in ffns:
            counted = masks[name].to(logits[name].device).flatten()
            off = (logits[name] <= threshold.to(logits[name].device)).flatten(0, -2) & counted[:, None]
            grouped = hidden[name].flatten(0, -2).float().unflatten(-1, (off.shape[-1], -1))
            sums[name] = sums.get(name, 0) + (grouped * off[..., None]).sum(0).flatten()
            counts[name] = counts.get(name, 0) + counted.sum()
    return [_output(ffn, sums[name] / counts[name].clamp_min(1)) for name, ffn in ffns.items()]


def run_densely(
    model: nn.Module, ffns: dict[str, SparseFfn], batch: Batch, *, hidden: bool = True
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The router logits [..., E] of each FFN by name, all experts on, and if `hidden` its activations [..., F]."""
    logits: dict[str, Tensor] = {}
    activations: dict[str, Tensor] = {}
    ups = {name: ffn.part(ffn.layout.up) for name, ffn in ffns.items()}
    downs = {name: ffn.part(ffn.layout.down) for name, ffn in ffns.items()} if hidden else {}

    def route(name: str, args: tuple[Any, ...]) -> None:
        logits[name] = ffns[name].router(args[0])

    def keep(name: str, args: tuple[Any, ...]) -> None:
        activations[name] = args[0]

    with evaluating(model, "dense"), before_each_call(ups, route), before_each_call(downs, keep):
        run_without_logits(model, batch)
    return logits, activations


def _output(ffn: SparseFfn, hidden: Tensor) -> Tensor:
    # Weights may lie on the CPU beside passes on a GPU: those of FSDP.
    down = ffn.layout.numbers(base_of(ffn.part(ffn.layout.down)))
    with torch.autocast(down.device.type, enabled=False):
        return down @ hidden.to(down.device)


class DroppedStart:
    """The vectors of one training, and how much of them the biases have got; frozen biases stay as they are.

    What a bias in bf16 cannot take of a step's small part is kept for the next steps.

    Args:
        ffns: in depth order.
        vectors: fp32 [D] of each, on any device.
        share: which was added already.
    """

    def __init__(self, ffns: Sequence[SparseFfn], vectors: Sequence[Tensor], share: float = 0.0):
        self.ffns, self.share = list(ffns), share
        self.vectors = self._beside_biases(vectors)
        self.rests = [torch.zeros_like(vector) for vector in self.vectors]

    def _beside_biases(self, vectors: Sequence[Tensor]) -> list[Tensor]:
        biases = [ffn.part(ffn.layout.down).bias for ffn in self.ffns]
        return [vector.to(bias.device) for vector, bias in zip(vectors, biases, strict=True)]

    @torch.no_grad()
    def follow_(self, share: float) -> None:
        """Adds what is missing to a share of the vectors, in place."""
        for index, (ffn, vector) in enumerate(zip(self.ffns, self.vectors, strict=True)):
            bias = ffn.part(ffn.layout.down).bias
            if not bias.requires_grad:
                continue
            wide = torch.promote_types(bias.dtype, torch.float32)
            wanted = whole(bias).to(wide) + ((share - self.share) * vector + self.rests[index]).to(wide)
            assign_(bias, wanted)
            self.rests[index] = (wanted - whole(bias).to(wide)).to(vector)
        self.share = share

    def state(self) -> dict[str, Any]:
        """What a checkpoint must hold, JSON-ready."""
        return {
            "share": self.share,
            "vectors": [vector.tolist() for vector in self.vectors],
            "rests": [rest.tolist() for rest in self.rests],
        }

    @classmethod
    def of_state(cls, ffns: Sequence[SparseFfn], state: dict[str, Any]) -> DroppedStart:
        """The inverse of `state`."""
        vectors, rests = ([torch.tensor(each) for each in state[name]] for name in ("vectors", "rests"))
        made = cls(ffns, vectors, state["share"])
        made.rests = made._beside_biases(rests)
        return made
