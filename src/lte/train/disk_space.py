"""Whether the checkpoints of a training fit on the disk, and what can go if they do not."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from lte.files import free_bytes


def checkpoint_bytes(trainer: Any) -> int:
    """About the bytes of a checkpoint: the weights, or the adapters, and the two moments of Adam beside them."""
    parameters = list(trainer.model.parameters())
    trained = [p for p in parameters if p.requires_grad]
    saved = trained if hasattr(trainer.model, "peft_config") else parameters
    # Of weights that the settings will freeze there are none.
    optim = str(trainer.args.optim).lower()
    has_moments = trainer.routing.trainable == "all" and "adam" in optim and "8bit" not in optim
    # Moments have the dtype of their weights.
    moments = 2 * sum(p.nbytes for p in trained) if has_moments and not trainer.args.save_only_model else 0
    return sum(p.nbytes for p in saved) + moments


def check_space(folder: Path, trainer: Any) -> None:
    """Refuses a disk without room for one checkpoint, and warns of one without room for those that are to be kept.

    Raises:
        ValueError: says how much is free and how much is needed.
    """
    one, free = checkpoint_bytes(trainer), free_bytes(folder)
    if free < one:
        raise ValueError(
            f"output_dir must have room for a checkpoint of about {one / 1e9:.3g} GB, got {folder} with "
            f"{free / 1e9:.3g} GB free; {what_to_delete(folder / 'checkpoint')}, or take another folder"
        )
    # One more than are kept: an older one goes when a new one is whole.
    limit = trainer.args.save_total_limit
    there = sum(1 for _ in folder.glob("checkpoint-*"))
    more = max(0, limit + 1 - there) if limit else 1
    if free < more * one:
        warnings.warn(
            f"{folder} has {free / 1e9:.3g} GB free, {more} checkpoints of about {one / 1e9:.3g} GB will not fit; "
            "lower save_total_limit or make room",
            stacklevel=4,
        )


def what_to_delete(checkpoint: Path) -> str:
    """What to do when a checkpoint cannot be written: which older ones can go, and how training goes on."""
    from lte.train.checkpoints import in_order, is_finished

    whole = [path for path in in_order(checkpoint.parent) if path != checkpoint and is_finished(path)]
    older = (
        f"delete {', '.join(path.name for path in whole[1:])} beside it" if whole[1:] else "delete other files there"
    )
    return f"{older}, then resume from {whole[0].name}" if whole else older
