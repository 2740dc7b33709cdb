"""A toy language that a tiny model learns in a few steps, as rows of tokens, and a short run on it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

import lte
from lte.data.rows import LmCollator, TokenRows
from lte.train.arguments import LteTrainingArguments
from lte.train.trainer import LteTrainer
from tests.tiny_models import PAD, VOCAB, tiny_dense_model

# Of a run with checkpoints.
STEPS = 6


def toy_rows(count: int = 64, length: int = 32, seed: int = 0) -> TokenRows:
    """Rows of a random walk in which every token has four possible successors."""
    successors = np.random.default_rng(1).integers(3, VOCAB, (VOCAB, 4))
    generator = np.random.default_rng(seed)
    rows = np.full((count, length), 3)
    for t in range(1, length):
        rows[:, t] = successors[rows[:, t - 1], generator.integers(0, 4, count)]
    return TokenRows(list(rows), list(rows))


def trainer_of(folder: Path, rows: Any = None, target: float = 0.5, **options: Any) -> LteTrainer:
    """A training of 6 steps that writes a checkpoint after every second one."""
    sizes = {"max_steps": STEPS, "per_device_train_batch_size": 4, "learning_rate": 3e-3, "logging_steps": 1}
    tokens = {"router_fit_tokens": 128, "calibration_tokens": 256}
    saving = {"save_strategy": "steps", "save_steps": 2, "report_to": "none", "use_cpu": True}
    extra = {name: options.pop(name) for name in ("callbacks", "teacher", "eval_dataset") if name in options}
    model = lte.sparsify_(
        tiny_dense_model(), lte.LteConfig(expert_size=8, grouping="random", target_sparsity=target, seed=1)
    )
    return LteTrainer(
        model,
        LteTrainingArguments(output_dir=str(folder), **{**sizes, **tokens, **saving, **options}),
        train_dataset=toy_rows(16, 16) if rows is None else rows,
        data_collator=LmCollator(PAD),
        **extra,
    )


def uneven_toy_rows(count: int = 64, seed: int = 0) -> TokenRows:
    """As `toy_rows`, of 8 to 32 tokens."""
    rows = toy_rows(count, seed=seed).input_ids
    cut = [row[: 8 + 24 * (index % 7) // 6] for index, row in enumerate(rows)]
    return TokenRows(cut, [row.copy() for row in cut])
