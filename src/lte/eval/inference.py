"""Running a model for measurement: eval mode, hard routing, no gradients, all restored afterwards.

Shapes: B sequences, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lte.data.batches import Batch
from lte.data.rows import routing_masks
from lte.hf.inputs import model_inputs, run_without_logits
from lte.hf.install import sparse_ffns
from lte.methods.calibration import eval_mode


@contextmanager
def hard_inference(model: nn.Module) -> Iterator[None]:
    """Runs a block in eval mode, without gradients, and with all sparse FFNs in hard mode.

    The training flag of every module and the mode of every sparse FFN are restored, also after an error. A
    dense model is fine.
    """
    modes = {ffn: ffn.mode for ffn in sparse_ffns(model).values()}
    for ffn in modes:
        ffn.set_mode("hard")
    try:
        with eval_mode(model), torch.no_grad():
            yield
    finally:
        for ffn, mode in modes.items():
            ffn.set_mode(mode)


def model_device(model: nn.Module) -> torch.device:
    """The device of the model's first parameters, where its inputs belong."""
    return next(model.parameters()).device


def moved_batches(
    batches: Iterable[Batch], device: torch.device, *, progress: bool, description: str = "evaluating"
) -> Iterator[dict[str, Tensor]]:
    """The tensors of each batch on `device`, with a progress bar if `progress`.

    Raises:
        ValueError: if `input_ids` is missing or not [B, T], or `attention_mask` has another shape.
    """
    from rich.progress import track  # `import lte` does without

    for batch in track(batches, description, disable=not progress, transient=True):
        if "input_ids" not in batch or batch["input_ids"].ndim != 2:
            got = tuple(batch["input_ids"].shape) if "input_ids" in batch else f"the keys {', '.join(batch)}"
            raise ValueError(f"input_ids must be in every batch as [B, T], got {got}; stack rows with a collator")
        mask = batch.get("attention_mask")
        if mask is not None and mask.shape != batch["input_ids"].shape:
            raise ValueError(
                f"attention_mask must be [B, T] as input_ids is, got attention_mask={tuple(mask.shape)} for "
                f"input_ids={tuple(batch['input_ids'].shape)}"
            )
        yield {key: value.to(device, non_blocking=True) for key, value in batch.items() if torch.is_tensor(value)}


def forward_logits(model: nn.Module, batch: Batch) -> Tensor:
    """The model's logits [B, T, V] for a batch; labels and unknown keys stay out of the model."""
    return model(**model_inputs(model, batch)).logits


class RoutingCounter(Protocol):
    """What counts the forward pass that just ended."""

    @property
    def layers(self) -> Mapping[str, Any]:
        """What it counts, by qualified name of the modules."""

    def update(self, mask: Mapping[str, Tensor]) -> None:
        """Counts over the tokens of the masks [B, T], by name."""


def count_batches(
    model: nn.Module,
    counter: RoutingCounter,
    batches: Iterable[Batch],
    *,
    skip_ignored_labels: bool = True,
    progress: bool = False,
) -> None:
    """Runs a model with any head over `batches` in hard mode, and lets `counter` count each pass.

    Args:
        model: modes are restored afterwards.
        counter: used as a context around this.
        batches: `input_ids` and optionally `attention_mask` and `labels`, [B, T], on any device.
        skip_ignored_labels: whether tokens with the label -100 are left out, if the model predicts the next token.
        progress: whether to show a progress bar.
    """
    with hard_inference(model):
        for batch in moved_batches(batches, model_device(model), progress=progress):
            run_without_logits(model, batch)
            counter.update(routing_masks(model, counter.layers, batch, skip_ignored_labels=skip_ignored_labels))
