"""A toy language that a tiny model learns in a few steps, as rows of tokens."""

from __future__ import annotations

import numpy as np

from lte.data.rows import TokenRows
from tests.tiny_models import VOCAB


def toy_rows(count: int = 64, length: int = 32, seed: int = 0) -> TokenRows:
    """Rows of a random walk in which every token has four possible successors."""
    successors = np.random.default_rng(1).integers(3, VOCAB, (VOCAB, 4))
    generator = np.random.default_rng(seed)
    rows = np.full((count, length), 3)
    for t in range(1, length):
        rows[:, t] = successors[rows[:, t - 1], generator.integers(0, 4, count)]
    return TokenRows(list(rows), list(rows))
