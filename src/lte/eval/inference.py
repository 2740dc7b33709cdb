"""Running a model for measurement: eval mode, hard routing, no gradients, all restored afterwards.

Shapes: B sequences, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from rich.progress import track
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lte.data.rows import LmCollator, routing_masks
from lte.hf.inputs import model_inputs, run_without_logits
from lte.hf.install import sparse_ffns
from lte.methods.calibration import eval_mode

Batch = Mapping[str, Tensor]


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


def as_batches(
    data: Dataset[Any] | Iterable[Batch], model: Any, batch_size: int, collator: Any = None
) -> Iterable[Batch]:
    """Batches of a data set of rows in its order; anything else is taken as batches already.

    Args:
        data: a torch or Hugging Face data set of rows with `input_ids` and `labels`, or an iterable of
            batches.
        model: its pad token fills rows of different lengths.
        batch_size: rows per batch, for a data set.
        collator: makes a batch of rows; `None` pads on the right and ignores the padding.
    """
    if not (isinstance(data, Dataset) or hasattr(data, "column_names")):
        return data
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got batch_size={batch_size}")
    pad = getattr(getattr(model, "config", None), "pad_token_id", None)
    # What padding holds does not matter: attention and labels leave it out.
    collator = collator or LmCollator(pad or 0)
    return DataLoader(data, batch_size=batch_size, collate_fn=collator)  # type: ignore[arg-type]
