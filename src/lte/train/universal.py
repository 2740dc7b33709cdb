"""Checkpoints of ZeRO for another number of processes: DeepSpeed's universal checkpoints.

DeepSpeed writes the moments and the weights in fp32 as a flat shard of each process, which so many processes alone can
read. Its converter makes a folder of them with files of each parameter, and its engine reads that with any number.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from lte.train.processes import num_processes
from lte.train.sharding import innermost

# What the converter writes into a checkpoint, beside the folder of each process's shards; the name comes last.
_SUFFIX, _NAME_FILE = "_universal", "latest_universal"


def is_of_other_processes(checkpoint: Path) -> bool:
    """Whether as many processes as there are now cannot read a checkpoint of DeepSpeed as it is."""
    return _writers(checkpoint) not in (0, num_processes())


def _writers(checkpoint: Path) -> int:
    """How many processes wrote a checkpoint of DeepSpeed; 0 for other checkpoints."""
    return len(list(checkpoint.glob("global_step*/*zero_pp_rank_*_optim_states.pt")))


def make_universal(checkpoint: Path) -> None:
    """Has DeepSpeed's converter write a checkpoint's universal form beside its shards; the first process calls.

    It takes a process of its own: this one has a GPU and threads, which those that the converter forks would share.

    Raises:
        ValueError: with the converter's reason, as for moments of other optimisers than Adam.
    """
    discard_universal(checkpoint)
    shards = next(checkpoint.glob("global_step*"))
    command = ["-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state"]
    command += ["--input_folder", shards.name, "--output_folder", shards.name + _SUFFIX]
    done = subprocess.run([sys.executable, *command], cwd=checkpoint, capture_output=True, text=True)
    if done.returncode:
        discard_universal(checkpoint)
        reason = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        writers = _writers(checkpoint)
        raise ValueError(
            f"num_processes must stay what it was where DeepSpeed cannot convert its checkpoint, got {num_processes()} "
            f"where {checkpoint} was written by {writers}, and {reason!r} from its converter; launch {writers}, or "
            "train with FSDP2, which goes on with any number"
        )


def discard_universal(checkpoint: Path) -> None:
    """Removes what `make_universal` wrote into a checkpoint."""
    (checkpoint / _NAME_FILE).unlink(missing_ok=True)
    for folder in checkpoint.glob(f"global_step*{_SUFFIX}"):
        shutil.rmtree(folder)


def read_universal_(plugin: Any, reads: bool) -> None:
    """Has the engine read the universal form of a checkpoint, or its shards.

    Args:
        plugin: accelerate's, changed in place; before the model is prepared.
        reads: whether it is the universal form.
    """
    plugin.deepspeed_config["checkpoint"] = {**plugin.deepspeed_config.get("checkpoint", {}), "load_universal": reads}


def settle_universal_(engine: Any, optimizer: Any, checkpoint: Path) -> None:
    """Mends what DeepSpeed mixes up in reading a universal checkpoint; later ones are read as shards.

    In ZeRO-3 all groups of parameters get the settings of the first one, weight decay among them, and all shards share
    one count of steps, which each of them then raises in every step.

    Args:
        engine: of DeepSpeed, changed in place.
        optimizer: of the trainer, changed in place.
        checkpoint: that was read.
    """
    engine._config.load_universal_checkpoint = False
    path = next(checkpoint.glob(f"global_step*{_SUFFIX}/zero/optimizer_state.pt"))
    kept = torch.load(path, map_location="cpu", weights_only=False, mmap=True)
    groups = kept.get("optimizer_state_dict", kept)["param_groups"]
    optimizer = innermost(optimizer)
    for group, own in zip(optimizer.param_groups, groups, strict=True):
        group.update({name: value for name, value in own.items() if name != "params"})
    for state in optimizer.state.values():
        if isinstance(state.get("step"), torch.Tensor):
            state["step"] = state["step"].clone()
