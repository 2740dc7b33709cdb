"""Fitting the routers before training; `lte.methods.lte` sets the thresholds after it."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lte.data.batches import Batch
from lte.data.rows import routing_masks
from lte.hf.inputs import run_without_logits
from lte.hf.install import require_sparse_ffns
from lte.methods.lte import calibrate_thresholds_, evaluating
from lte.nn.router import INITIAL_LOGIT
from lte.nn.shards import assign_, whole
from lte.nn.sparse_ffn import SparseFfn
from lte.progress import tracked

__all__ = ["Batch", "calibrate_thresholds_", "fit_routers_"]


class _NormRegression:
    """Running ridge regression of the log output norms of one layer's experts on the FFN's input."""

    def __init__(self, ffn: SparseFfn):
        self.ffn = ffn
        down = ffn.layout.numbers(ffn.part(ffn.layout.down))
        blocks = down.unflatten(1, (ffn.num_experts, -1))
        # ||h_e W_e||^2 = h_e (W_e W_e^T) h_e^T: S x S Gram matrices instead of E outputs of width D per token.
        self.gram = torch.einsum("des,det->est", blocks, blocks)
        width = down.shape[0] + 1
        self.xx = torch.zeros(width, width, device=down.device, dtype=torch.float64)
        self.xy = torch.zeros(width, ffn.num_experts, device=down.device, dtype=torch.float64)
        self.y = torch.zeros(ffn.num_experts, device=down.device, dtype=torch.float64)
        self.yy = torch.zeros(ffn.num_experts, device=down.device, dtype=torch.float64)
        self.tokens = torch.zeros((), device=down.device, dtype=torch.float64)

    def see_input(self, x: Tensor) -> None:
        """Keeps hidden states [..., D] for the `update` of the same pass."""
        self.x = x

    def update(self, hidden: Tensor, token_mask: Tensor) -> None:
        """Adds one pass with intermediate activations [..., F], over the tokens of the mask [B, T]."""
        self._move_to(hidden.device)
        x, hidden = self.x, hidden.float().unflatten(-1, (self.ffn.num_experts, -1))
        squared = torch.einsum("...es,est,...et->...e", hidden, self.gram, hidden)
        norms = (squared.clamp_min(0).sqrt() + 1e-6).log().flatten(0, -2).double()
        inputs = nn.functional.pad(x.float(), (0, 1), value=1.0).flatten(0, -2).double()
        keep = token_mask.flatten().to(inputs).unsqueeze(-1)
        norms, inputs = norms * keep, inputs * keep
        self.xx += inputs.T @ inputs
        self.xy += inputs.T @ norms
        self.y += norms.sum(0)
        self.yy += norms.square().sum(0)
        self.tokens += inputs[:, -1].sum()

    def _move_to(self, device: torch.device) -> None:
        """To where the passes run: weights of FSDP may lie on the CPU beside a GPU."""
        if self.gram.device != device:
            for name in ("gram", "xx", "xy", "y", "yy", "tokens"):
                setattr(self, name, getattr(self, name).to(device))

    def solve_(self) -> None:
        """Sets the router to the standardised prediction, shifted so that its mean logit is `INITIAL_LOGIT`."""
        ridge = 1e-2 * self.xx.diagonal().mean() * torch.eye(len(self.xx), device=self.xx.device)
        solution = torch.linalg.solve(self.xx + ridge, self.xy)
        router, routed = self.ffn.router, slice(self.ffn.router.always_on, None)
        mean = self.y[routed].mean() / self.tokens
        deviation = (self.yy[routed].mean() / self.tokens - mean.square()).clamp_min(1e-12).sqrt()
        weight = solution[:-1].T / deviation
        if router.down is not None:
            weight = self._set_low_rank_(weight, router.down)
        router.assign_(weight, (solution[-1] - mean) / deviation + INITIAL_LOGIT)

    def _set_low_rank_(self, weight: Tensor, down: Tensor) -> Tensor:
        """Sets V of U V to the directions in which the logits of W [E, D] vary most on the text; returns U [E, R].

        With the inputs' second moments X = C C^T it is the best U V of that rank for the mean squared error of the
        logits: the first singular vectors of W C.
        """
        first = self.ffn.router.always_on
        moments = self.xx[:-1, :-1] / self.tokens
        moments += 1e-6 * moments.diagonal().mean() * torch.eye(len(moments), device=moments.device)
        root = torch.linalg.cholesky(moments)
        left, values, right = torch.linalg.svd(weight[first:] @ root, full_matrices=False)
        start = whole(down).clone()
        kept = min(len(start), len(values))
        # Both factors of one size: they train at one rate.
        scale = values[:kept].sqrt()
        rows = torch.linalg.solve_triangular(root, right[:kept], upper=False, left=False)
        start[:kept] = rows * scale[:, None]
        assign_(down, start)
        found = weight.new_zeros(len(weight), len(start))
        found[first:, :kept] = left[:, :kept] * scale
        return found


@torch.no_grad()
def fit_routers_(model: nn.Module, batches: Iterable[Batch]) -> None:
    """Fits every router to how strongly each expert contributes, so that weak experts go off first.

    The logit of expert e starts as a ridge regression, on the FFN's input, of log ||E_e(x)||, standardised over the
    layer and shifted to a mean of 3. Nearly every expert is on at first, and none sits at the threshold by accident. A
    low-rank router gets the best approximation of that for the inputs.

    Args:
        model: an LTE model.
        batches: `input_ids`, and optionally `attention_mask`, `labels`, and `token_mask` (bool, [B, T]) in place of the
            tokens that count in training.
    """
    ffns = require_sparse_ffns(model)
    fits = {name: _NormRegression(ffn) for name, ffn in ffns.items()}
    masks: dict[str, Tensor] = {}

    hooks = [hook for name, fit in fits.items() for hook in _observe(fit, name, masks)]
    try:
        with evaluating(model, "dense"):
            for batch in tracked(batches, "Fitting routers"):
                masks.update(routing_masks(model, list(ffns), batch))
                run_without_logits(model, batch)
    finally:
        for hook in hooks:
            hook.remove()
    for fit in fits.values():
        fit.solve_()


def _observe(fit: _NormRegression, name: str, masks: dict[str, Tensor]) -> list[RemovableHandle]:
    """Hooks on the projections of an FFN, which every kind of FFN calls as they are."""
    layout = fit.ffn.layout
    up, down = fit.ffn.part(layout.up), fit.ffn.part(layout.down)
    return [
        up.register_forward_pre_hook(lambda module, args: fit.see_input(args[0])),
        down.register_forward_pre_hook(lambda module, args: fit.update(args[0], masks[name])),
    ]
