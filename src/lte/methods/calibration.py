"""Running a model over calibration text, and what methods learn from it.

Shapes: N counted tokens, D hidden size, F neurons.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from lte.hf.inputs import padding_masks, run_without_logits
from lte.nn.metering import MeteredModule, metered_modules


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Runs a block in eval mode, and restores the training flag of every module."""
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, flag in training.items():
            module.training = flag


@torch.no_grad()
def run_batches(
    model: nn.Module,
    batches: Iterable[Mapping[str, Tensor]],
    masks: dict[str, Tensor],
    names: list[str],
    last: nn.Module | None = None,
) -> dict[str, float]:
    """Runs all batches in eval mode and restores the modes; returns how many tokens each of `names` has counted.

    Args:
        model: of a supported family.
        batches: with `input_ids` and optionally `attention_mask`, [B, T].
        masks: gets, before each batch runs, which tokens are no padding, bool [B, T] by name.
        names: of modules, which tell the two sides of an encoder-decoder apart.
        last: a module after which each pass ends; `None` runs the whole model.

    Raises:
        ValueError: if a module has no token that is no padding.
    """
    device = next(model.parameters()).device
    tokens = dict.fromkeys(names, 0.0)
    thread = threading.get_ident()

    def end_pass(module: nn.Module, args: Any, output: Any) -> None:
        if threading.get_ident() == thread:
            raise _PassEnds

    hook = None if last is None else last.register_forward_hook(end_pass)
    try:
        with eval_mode(model):
            for batch in batches:
                moved = {key: value.to(device) for key, value in batch.items()}
                masks.update(padding_masks(model, names, moved))
                for name in names:
                    tokens[name] += masks[name].sum().item()
                with suppress(_PassEnds):
                    run_without_logits(model, moved)
    finally:
        if hook is not None:
            hook.remove()
    if not all(tokens.values()):
        raise ValueError("batches must hold at least one calibration token, got none")
    return tokens


class _PassEnds(Exception):
    """Nothing after this module is wanted."""


def observe_(
    model: nn.Module,
    batches: Iterable[Mapping[str, Tensor]],
    see: Callable[[str, Any, tuple[Tensor, ...]], None],
    modules: Mapping[str, MeteredModule] | None = None,
) -> None:
    """Runs a model of a method densely and shows what each of its modules works on.

    Args:
        model: a model of a method.
        batches: as for `run_batches`.
        see: called with the name of a module, the module, and what `MeteredModule.observer` gets, of the N counted
            tokens alone: [N, ...] each.
        modules: which modules; `None` takes all.
    """
    modules = metered_modules(model) if modules is None else modules
    masks: dict[str, Tensor] = {}

    def observer(name: str, module: MeteredModule) -> Callable[..., None]:
        def show(*values: Tensor) -> None:
            keep = masks[name].to(values[0].device).flatten()
            see(name, module, tuple(value.detach().flatten(0, -2)[keep] for value in values))

        return show

    for name, module in modules.items():
        module.observer = observer(name, module)
    try:
        with torch.no_grad():
            run_batches(model, batches, masks, list(modules))
    finally:
        for module in modules.values():
            module.observer = None


# Of an fp32 number 8 bits of exponent and 9 of mantissa stay: bins a factor of 1 + 2^-9 apart.
_DROPPED_BITS = 14
_NOT_FINITE = 0x7F800000 >> _DROPPED_BITS


class MagnitudeHistogram:
    """Counts magnitudes in bins that are exact bit patterns, so that the order of the sums does not matter."""

    def __init__(self) -> None:
        self.counts = torch.zeros(1 << (31 - _DROPPED_BITS), dtype=torch.int64)

    def update(self, values: Tensor) -> None:
        """Adds all of `values`."""
        bits = values.float().abs().flatten().view(torch.int32) >> _DROPPED_BITS
        self.counts = self.counts.to(bits.device) + torch.bincount(bits, minlength=len(self.counts))

    def quantile(self, share: float) -> float:
        """The smallest magnitude, to a factor of 1 + 2^-9, such that at least `share` of all are not above it.

        A share of 0 gives 0: what is above it is all that is not zero.

        Raises:
            ValueError: if a value was NaN or infinite.
        """
        if self.counts[_NOT_FINITE:].any():
            raise ValueError("activations must be finite, got NaN or infinity; the weights are damaged")
        if share <= 0:
            return 0.0
        total = self.counts.cpu().cumsum(0).double()
        index = int(torch.searchsorted(total, share * total[-1]))
        upper = torch.tensor(((index + 1) << _DROPPED_BITS) - 1, dtype=torch.int32)
        return upper.view(torch.float32).item()
