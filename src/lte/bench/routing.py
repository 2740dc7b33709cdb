"""Routers that activate a wanted share of the experts, through their weights and biases alone.

Values change in place, so that compiled functions and CUDA graphs of a model follow.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import fmean

import torch
from torch import Tensor

from lte.config import check_fraction
from lte.nn.accelerated import AcceleratedFfn
from lte.nn.hooks import before_each_call
from lte.nn.sparse_ffn import SparseFfn

# Distinct tokens of `TokenPatterns`: with half of the experts active, 64 tokens need nearly all of them.
MAX_PATTERNS = 256
MARGIN = 1.0
QUANTILE_SAMPLES = 1 << 20
# A shift of one layer changes what the later ones see.
SHIFTS = 3


def _refresh_(ffns: Sequence[SparseFfn]) -> None:
    """Lets accelerated layers copy their routers' weights to where compiled graphs read them."""
    for ffn in ffns:
        ffn.set_mode(ffn.mode)


def active_count(num_experts: int, sparsity: float) -> int:
    """How many experts are active at a sparsity."""
    check_fraction("sparsity", sparsity, upper_closed=True)
    return round(num_experts * (1 - sparsity))


def forced_mask(rows: int, num_experts: int, sparsity: float, seed: int) -> Tensor:
    """Boolean [rows, E]: in each row `active_count` random experts, the same for the same seed on any device."""
    order = torch.rand(rows, num_experts, generator=torch.Generator().manual_seed(seed)).argsort(1)
    return order.argsort(1) < active_count(num_experts, sparsity)


@torch.no_grad()
def force_same_(ffns: Sequence[SparseFfn], sparsity: float, seed: int = 0) -> None:
    """All tokens get the same random experts, others in each layer: weights 0, biases beside the threshold."""
    for index, ffn in enumerate(ffns):
        mask = forced_mask(1, ffn.num_experts, sparsity, seed + index)[0]
        ffn.router.weight.zero_()
        bias = ffn.threshold_logit + torch.where(mask, MARGIN, -MARGIN)
        ffn.router.bias.copy_(bias.to(ffn.router.bias.device))
    _refresh_(ffns)


class TokenPatterns:
    """Hidden states for which a router can be set so that each token gets experts of its own.

    x = c + n with K distinct random vectors c in turn and noise n orthogonal to all of them. A router whose weights lie
    in the span of the c gives exact logits c W^T, whatever the noise: W = pinv(C) M for wanted logits M [K, E].

    Args:
        tokens: T.
        hidden: D.
        dtype: of the hidden states.
        device: where they are.
        seed: of the vectors and the noise.
    """

    def __init__(self, tokens: int, hidden: int, dtype: torch.dtype, device: torch.device, seed: int = 0):
        generator = torch.Generator(device).manual_seed(seed)
        self.count = min(tokens, max(hidden // 8, 1), MAX_PATTERNS)
        self.centres = torch.randn(self.count, hidden, device=device, generator=generator)
        x = self.centres[torch.arange(tokens, device=device) % self.count]
        if tokens > self.count:
            noise = torch.randn(tokens, hidden, device=device, generator=generator)
            basis = torch.linalg.qr(self.centres.T).Q
            x = x + noise - (noise @ basis) @ basis.T
        self.x = x.to(dtype)
        self.inverse = torch.linalg.pinv(self.centres)

    @torch.no_grad()
    def force_(self, ffns: Sequence[SparseFfn], sparsity: float, seed: int = 0) -> None:
        """Every token gets random experts of its own (T > K: every K-th token the same), others in each layer.

        Raises:
            ValueError: for a low-rank router, which cannot hold such weights.
        """
        for index, ffn in enumerate(ffns):
            if ffn.router.down is not None:
                raise ValueError("routing must be 'same' for a low-rank router, got routing='different'")
            mask = forced_mask(self.count, ffn.num_experts, sparsity, seed + index).to(self.centres.device)
            logits = torch.where(mask, MARGIN, -MARGIN)
            ffn.router.weight.copy_((self.inverse @ logits).T)
            ffn.router.bias.fill_(ffn.threshold_logit)
        _refresh_(ffns)


@torch.no_grad()
def force_random_(
    ffns: Sequence[SparseFfn],
    sparsity: float,
    text: Callable[[], object],
    steps: Callable[[], object] | None = None,
    seed: int = 0,
) -> None:
    """Random routers that keep a share of the experts on average, others for each token.

    Biases are set on what the layers see, one after the other while those before them switch already: of a trained
    model neither the norm nor the mean of its hidden states is known. What it comes to is measured, see `measure_use`.

    Args:
        ffns: layers of one model.
        sparsity: share of experts that are off.
        text: passes many tokens through the model at once: each expert is on for the same share of them.
        steps: passes those tokens whose share counts, which come after others: one shift for all experts of a layer.
        seed: of the weights.
    """
    check_fraction("sparsity", sparsity, upper_closed=True)
    for index, ffn in enumerate(ffns):
        random = torch.randn(ffn.router.weight.shape, generator=torch.Generator().manual_seed(seed + index))
        ffn.router.weight.copy_(random.to(ffn.router.weight.device))

    def set_bias(ffn: SparseFfn, args: tuple[Tensor, ...]) -> None:
        router = ffn.router
        logits = args[0].flatten(0, -2).float() @ router.weight.float().T
        centres = logits.mean(0)
        spread = logits - centres
        scale = MARGIN / spread.std().clamp_min(1e-6)
        router.weight.mul_(scale)
        router.bias.copy_(ffn.threshold_logit - scale * (centres + _share_below(spread, sparsity)))
        ffn.set_mode(ffn.mode)

    with before_each_call({ffn: ffn.reader for ffn in ffns}, set_bias):
        text()
    if steps is not None and 0 < sparsity < 1:
        for _ in range(SHIFTS):
            _shift_biases_(ffns, sparsity, steps)


@torch.no_grad()
def move_thresholds_(ffns: Sequence[SparseFfn], sparsity: float, run: Callable[[], object]) -> None:
    """Moves the biases of all routers by the same amount, until a share of the experts is off while `run` runs.

    The same as one other threshold for all layers; experts that are always on stay on. What it comes to elsewhere is
    measured, see `measure_use`.

    Raises:
        ValueError: if more experts than that are always on.
    """
    most = 1 - fmean(ffn.router.always_on / ffn.num_experts for ffn in ffns)
    if sparsity > most:
        raise ValueError(
            f"sparsities must be at most {most:.4g}, as the other experts are always on, got sparsities={sparsity}"
        )
    margins: list[Tensor] = []

    def note(ffn: SparseFfn, args: tuple[Tensor, ...]) -> None:
        margins.append(ffn.router(args[0]).flatten() - ffn.threshold_logit)

    for _ in range(SHIFTS):
        margins.clear()
        with before_each_call({ffn: ffn.reader for ffn in ffns}, note):
            run()
        shift = _share_below(torch.cat(margins), sparsity)
        for ffn in ffns:
            ffn.router.bias[ffn.router.always_on :].sub_(shift)
        _refresh_(ffns)


def _shift_biases_(ffns: Sequence[SparseFfn], sparsity: float, run: Callable[[], object]) -> None:
    seen: dict[SparseFfn, list[Tensor]] = {ffn: [] for ffn in ffns}
    with before_each_call(
        {ffn: ffn.reader for ffn in ffns}, lambda ffn, args: seen[ffn].append(ffn.router(args[0]).flatten())
    ):
        run()
    for ffn, logits in seen.items():
        ffn.router.bias.add_(ffn.threshold_logit - _share_below(torch.cat(logits), sparsity))
    _refresh_(ffns)


def _share_below(values: Tensor, share: float) -> Tensor:
    """What a share of the values lie below; for none and all of them with room for larger ones."""
    if share in (0, 1):
        return (2 * share - 1) * 10 * values.abs().max()
    flat = values.flatten()
    return torch.quantile(flat[:: -(-flat.numel() // QUANTILE_SAMPLES)], share)


class RouterValues:
    """What the routers of some layers hold now, and what use of experts the layers expect, to be put back later."""

    def __init__(self, ffns: Sequence[SparseFfn]):
        self.ffns = list(ffns)
        self.uses = [ffn.acceleration.use for ffn in ffns if isinstance(ffn, AcceleratedFfn)]
        self.parameters = [p for ffn in ffns for p in ffn.router.parameters()]
        self.values = [p.detach().clone() for p in self.parameters]

    @torch.no_grad()
    def restore_(self) -> None:
        """Puts them back in place."""
        for parameter, value in zip(self.parameters, self.values, strict=True):
            parameter.copy_(value)
        _refresh_(self.ffns)
        for ffn, use in zip(self.ffns, self.uses, strict=False):
            if isinstance(ffn, AcceleratedFfn) and ffn.acceleration.use != use:
                ffn.expect_(use)

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Restores them after a block."""
        try:
            yield
        finally:
            self.restore_()


@dataclass(frozen=True)
class Use:
    """Shares of experts, mean over layers and calls.

    Attributes:
        active: of a token, mean over tokens.
        union: that at least one token of a call needs.
    """

    active: float
    union: float

    @property
    def sparsity(self) -> float:
        """Share of FFN neurons not computed per token."""
        return 1 - self.active


@contextmanager
def recorded_masks(ffns: Sequence[SparseFfn]) -> Iterator[list[list[Tensor]]]:
    """Collects the masks [T, E] of each call of each layer in the block; for eager calls only."""
    masks: dict[SparseFfn, list[Tensor]] = {ffn: [] for ffn in ffns}

    def record(ffn: SparseFfn, args: tuple[Tensor, ...]) -> None:
        masks[ffn].append((ffn.router(args[0]) > ffn.threshold_logit).flatten(0, -2))

    with before_each_call({ffn: ffn.reader for ffn in ffns}, record):
        yield list(masks.values())


def measure_use(ffns: Sequence[SparseFfn], run: Callable[[], object]) -> Use:
    """The experts that the layers use while `run` runs."""
    with torch.no_grad(), recorded_masks(ffns) as masks:
        run()
    return use_of([mask for layer in masks for mask in layer])


def use_of(masks: Sequence[Tensor]) -> Use:
    """The experts in use by masks [T, E] of several layers or calls."""
    return Use(
        active=fmean(mask.float().mean().item() for mask in masks),
        union=fmean(mask.any(0).float().mean().item() for mask in masks),
    )
