"""What a batch needs: the union of its tokens' experts, and the batch from which the sparse path no longer wins.

Shapes: N sequences, P positions, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lte.bench.routing import recorded_masks
from lte.bench.rows import Row, is_dense
from lte.bench.session import Session
from lte.nn.unions import off_of_texts

BATCHES = (1, 2, 4, 8, 16, 32, 64)
POSITIONS = 64
SEQUENCES_AT_A_TIME = 8


def union_table(masks: Sequence[Tensor], batches: Sequence[int] = BATCHES) -> list[dict[str, Any]]:
    """The share of experts that at least one of B tokens needs, for B different texts at the same position.

    Args:
        masks: boolean [N, P, E] of each layer: the experts of each token.
        batches: values of B; those above N are left out. Each B takes as many whole groups of texts as there are.

    Returns:
        One row per B, means over groups, positions and layers: `union`; `independent`, 1 - (1 - a)^B, the union of
        tokens that choose their experts independently of each other and all experts alike, a the mean active fraction.
    """
    active = torch.stack([mask.float().mean() for mask in masks]).mean().item()
    rows = []
    for batch in batches:
        groups = masks[0].shape[0] // batch
        if groups == 0:
            continue
        union = 1 - torch.stack([off_of_texts(mask, batch).mean() for mask in masks]).mean().item()
        rows.append({"batch": batch, "union": union, "independent": 1 - (1 - active) ** batch, "groups": groups})
    return rows


def text_masks(session: Session) -> list[Tensor]:
    """The sparse model's own masks [N, P, E] of each layer on the run's texts."""
    pair = session.pair
    ids = session.ids[:, :POSITIONS]
    with torch.no_grad(), recorded_masks(pair.sparse_ffns) as calls:
        for texts in ids.split(SEQUENCES_AT_A_TIME):
            pair.sparse(input_ids=texts, use_cache=False, logits_to_keep=1)
    return [torch.cat(layer).unflatten(0, (len(ids), -1)).cpu() for layer in calls]


def break_even_batches(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """From which batch on the sparse path is not faster than the fastest dense provider, for FFNs and decoding.

    Returns:
        One row per benchmark and sparsity setting: `batches`, those timed; `ratios`, the fastest sparse provider over
        the fastest dense one at each; `break_even`, the smallest batch with a ratio of at least 1, or `None`.
    """
    found: dict[tuple[str, str], dict[int, float]] = {}
    for row in rows:
        ours = row.get("ratio_to_dense") is not None and not is_dense(row) and str(row["provider"]).startswith("lte")
        if row["benchmark"] in ("ffn", "decode") and ours:
            ratios = found.setdefault((row["benchmark"], row["setting"]), {})
            ratios[row["batch"]] = min(row["ratio_to_dense"], ratios.get(row["batch"], float("inf")))
    return [
        {
            "benchmark": benchmark,
            "setting": setting,
            "batches": sorted(ratios),
            "ratios": [ratios[batch] for batch in sorted(ratios)],
            "break_even": next((batch for batch in sorted(ratios) if ratios[batch] >= 1), None),
        }
        for (benchmark, setting), ratios in found.items()
    ]
