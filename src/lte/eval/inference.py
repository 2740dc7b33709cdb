"""Running a model for measurement: eval mode, hard routing, no gradients, all restored afterwards.

Shapes: B sequences, T tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lte.data.batches import Batch
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
