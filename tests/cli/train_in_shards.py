"""`lte` in one process of several, with FSDP2 on CPUs, as accelerate's launcher would start it on GPUs."""

from __future__ import annotations

import os

from lte.train import two_stage
from lte_cli import main
from tests.train.sharded_in_process import FSDP, OnCpus

if __name__ == "__main__":
    os.environ.update({**FSDP, "FSDP_CPU_RAM_EFFICIENT_LOADING": "true"})
    two_stage.LteTrainer = OnCpus  # type: ignore[misc]
    main()
