"""`lte` in one process of several, with FSDP2 on CPUs, as accelerate's launcher would start it on GPUs."""

from __future__ import annotations

import os
from typing import Any

from lte.eval import models
from lte.hf import checkpoints, dense
from lte.train import two_stage
from lte_cli import main
from tests.train.sharded_in_process import FSDP, OnCpus


def load_whole(*args: Any, **kwargs: Any) -> Any:
    """As it is, and says who reads weights."""
    print(f"process {os.environ['RANK']} reads weights")
    return own(*args, **kwargs)


own = checkpoints.load_whole
if __name__ == "__main__":
    models.load_whole = dense.load_whole = load_whole
    os.environ.update({**FSDP, "FSDP_CPU_RAM_EFFICIENT_LOADING": "true"})
    two_stage.LteTrainer = OnCpus  # type: ignore[misc]
    main()
