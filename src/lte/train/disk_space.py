"""Whether what a training writes fits on the disk, and what can go if it does not."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lte.files import free_bytes
from lte.train.config import TrainConfig
from lte.train.memory import saved_numbers, stored_bytes
from lte.train.optimisers import OPTIMISERS

_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


def checkpoints_of(save_steps: int, steps: tuple[int, int]) -> tuple[int, bool]:
    """How many checkpoints a training writes one after the other, and whether any of them has moments.

    The last one, and one at the end of stage 1, have none.

    Args:
        save_steps: steps between two.
        steps: of stage 1 and of stage 2.
    """
    first, last = steps[0], sum(steps)
    between = range(save_steps, last, save_steps)
    return len(between) + 1, any(step != first for step in between)


def checkpoint_bytes(trainer: Any) -> int:
    """About the bytes of a checkpoint: the weights, or the adapters, and the two moments of Adam if any is kept."""
    parameters = list(trainer.model.parameters())
    trained = [p for p in parameters if p.requires_grad]
    saved = trained if hasattr(trainer.model, "peft_config") else parameters
    # Of weights that the settings will freeze there are none.
    optim = str(getattr(trainer.args.optim, "value", trainer.args.optim)).lower()
    has_moments = trainer.routing.trainable == "all" and "adam" in optim and _keeps_moments(trainer)
    narrow = OPTIMISERS[optim].moment_bytes if optim in OPTIMISERS else None
    # Moments have the dtype of their weights, if they are not narrow.
    moments = sum(2 * p.nbytes if narrow is None else narrow * p.numel() for p in trained) if has_moments else 0
    return sum(p.nbytes for p in saved) + int(moments)


def _keeps_moments(trainer: Any) -> bool:
    args = trainer.args
    by_steps = args.save_strategy == "steps" and args.save_steps >= 1 and args.max_steps > 0
    if args.save_only_model or not by_steps or trainer.is_deepspeed_enabled:
        return not args.save_only_model
    first = round(trainer.routing.stage1_ratio * args.max_steps)
    return checkpoints_of(int(args.save_steps), (first, args.max_steps - first))[1]


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


@dataclass(frozen=True, kw_only=True)
class RunFiles:
    """Bytes that a run of `lte train` writes.

    Attributes:
        checkpoint: of one resume point: what trains, and the optimiser's moments if one within a stage is written.
        model: of the trained folder.
        base: of the model that adapters are for, and of the adapters; 0 without any.
        at_once: how many resume points there are while one replaces another.
    """

    checkpoint: int
    model: int
    base: int = 0
    at_once: int = 2

    @classmethod
    def of(
        cls, model: Any, config: TrainConfig, save_dtype: str | None = None, steps: tuple[int, int] | None = None
    ) -> RunFiles:
        """What a run writes, from the shapes of its model and its settings.

        Args:
            model: with its method, before adapters and other dtypes.
            config: of the training.
            save_dtype: of the trained folder, one of `lte.config.DTYPE_NAMES`; `None` for that of its weights.
            steps: of stage 1 and of stage 2; `None` where they are not known, other than by `config`.
        """
        weights, trained, moments = stored_bytes(model, config)
        if steps is None and config.stage1_steps > 0 and config.stage2_steps > 0:
            steps = config.stage1_steps, config.stage2_steps
        written, has_moments = (2, True) if steps is None else checkpoints_of(config.save_steps, steps)
        narrow = config.weights_dtype == "bfloat16" and not config.lora_rank
        each = _BYTES[save_dtype or ("bfloat16" if narrow else "float32")]
        plain, routers = saved_numbers(model)
        return cls(
            checkpoint=(trained if config.lora_rank else weights) + moments * has_moments,
            model=each * plain + 4 * routers,
            base=int(config.lora_rank is not None) * (weights + trained),
            at_once=min(2, written),
        )

    @property
    def most(self) -> int:
        """The most that there is at a time: when a resume point replaces another, or when the model is saved."""
        return self.base + max(self.at_once * self.checkpoint, self.checkpoint + self.model)

    def sentence(self) -> str:
        """All parts in GB, for the start of a run."""
        base = f" beside {self.base / 1e9:.2g} GB of adapters and what they are for" if self.base else ""
        return (
            f"up to {self.most / 1e9:.2g} GB while it trains (a resume point has {self.checkpoint / 1e9:.2g} GB"
            f"{base}), {(self.model + self.base) / 1e9:.2g} GB when it is finished"
        )


def check_run_space(output: Path, files: RunFiles) -> None:
    """Refuses a disk without room for what a run will write, before it trains; what is there of it already counts.

    Raises:
        ValueError: says how much is free, what is needed, and what can be deleted.
    """
    free = free_bytes(output)
    there = sum(path.stat().st_size for path in output.rglob("*") if path.is_file()) if output.is_dir() else 0
    if free + there < files.most:
        raise ValueError(
            f"output must have room for {files.sentence()}; got {output} with {free / 1e9:.3g} GB free; "
            f"{what_to_delete_of_run(output)}, take another folder, or write less: --save-dtype bfloat16, --optim "
            "adamw_torch_8bit"
        )


def what_to_delete_of_run(output: Path, checkpoints: Path | None = None) -> str:
    """What to do when a run's folder cannot be written: what can go of it, and what its training goes on from.

    Args:
        output: folder of the run.
        checkpoints: of the run, where its weights are already.
    """
    from lte.train.checkpoints import in_order, is_finished

    whole = [path for path in in_order(checkpoints or output / "checkpoints") if is_finished(path)]
    partial = [path for path in output.glob(".*.partial-*") if path.is_dir()]
    names = [str(path) for path in (*whole[1:], *partial)]
    go = f"delete {', '.join(names)} or other files on that disk" if names else "delete other files on that disk"
    return f"{go}; {whole[0]} holds what was trained and must stay" if whole else go
