"""What one of several training processes is: `torchrun` starts one per GPU."""

from __future__ import annotations

import os

import torch


def training_device() -> torch.device:
    """Where Trainer puts the model of this process: each process of a node has its own GPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def is_main_process() -> bool:
    """Whether this process writes the files and talks to the user."""
    return int(os.environ.get("RANK", "0")) == 0
