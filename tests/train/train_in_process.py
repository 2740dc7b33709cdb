"""One process of several: trains a tiny model with the settings that it is given and saves its weights."""

from __future__ import annotations

import json
import os
import sys

import torch

import lte
from lte.train.config import TrainConfig
from lte.train.two_stage import train_two_stage
from tests.tiny_models import tiny_dense_model
from tests.train.toy import toy_rows

if __name__ == "__main__":
    folder, options = sys.argv[1], json.loads(sys.argv[2])
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = lte.sparsify_(tiny_dense_model(), lte.LteConfig(expert_size=8, grouping="random"))
    summary = train_two_stage(model, toy_rows(), TrainConfig(**options), folder)
    rank = os.environ.get("RANK", "0")
    torch.save({"weights": model.state_dict(), "log": summary.log_history}, f"{folder}/rank{rank}.pt")
