from __future__ import annotations

import pytest
import torch

from lte.bench.session import Session
from lte.bench.union import break_even_batches, text_masks, union_table
from tests.bench.conftest import trained_pair


def test_the_union_by_hand() -> None:
    # One layer, 4 texts of one position, 4 experts: texts 0 and 1 share an expert, 2 and 3 do not.
    mask = torch.tensor([[1, 0, 0, 0], [1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0]]).bool().unsqueeze(1)
    rows = union_table([mask], batches=(1, 2, 4, 8))
    assert [row["batch"] for row in rows] == [1, 2, 4]  # there are no 8 texts
    assert [row["groups"] for row in rows] == [4, 2, 1]
    assert [row["union"] for row in rows] == pytest.approx([1 / 4, (1 / 4 + 2 / 4) / 2, 3 / 4])
    assert [row["independent"] for row in rows] == pytest.approx([0.25, 1 - 0.75**2, 1 - 0.75**4])


def test_positions_are_not_mixed() -> None:
    # Two texts of two positions; each text uses expert 0 at one position and 1 at the other.
    mask = torch.tensor([[[1, 0], [0, 1]], [[1, 0], [0, 1]]]).bool()
    assert union_table([mask], batches=(2,))[0]["union"] == 0.5
    assert union_table([mask, ~mask & False], batches=(2,))[0]["union"] == 0.25  # the mean over layers


def test_masks_of_a_model_on_its_texts(session: object) -> None:
    made: Session = session(trained_pair())  # type: ignore[operator]
    masks = text_masks(made)
    assert [mask.shape for mask in masks] == [(8, 16, 8)] * 2
    again = text_masks(made)[1][5]
    made.ids = made.ids[5:6]
    assert (text_masks(made)[1][0] == again).all()


def row(provider: str, batch: int, ratio: float, setting: str | None, benchmark: str = "ffn") -> dict[str, object]:
    fields = {"benchmark": benchmark, "provider": provider, "batch": batch, "setting": setting}
    return {**fields, "ratio_to_dense": ratio}


def test_break_even_is_the_first_batch_that_is_not_faster() -> None:
    rows = [
        row("dense eager", 1, 1.0, None),
        *(row("lte", batch, ratio, "0.5") for batch, ratio in ((1, 0.6), (4, 0.9), (16, 1.01))),
        *(row("lte", batch, ratio, "0.9") for batch, ratio in ((1, 0.2), (4, 0.3), (16, 0.5))),
        row("PyTorch indexing", 1, 3.0, "0.5"),
        row("lte eager", 1, 2.0, "0.5", "decode"),
        row("lte compiled, tuned", 1, 0.7, "0.5", "decode"),
        row("lte", 1, 5.0, "0.5", "prefill"),
    ]
    half, most, decode = break_even_batches(rows)
    assert (half["benchmark"], half["setting"], half["break_even"]) == ("ffn", "0.5", 16)
    assert half["ratios"] == [0.6, 0.9, 1.01]
    assert most["break_even"] is None
    assert (decode["benchmark"], decode["ratios"], decode["break_even"]) == ("decode", [0.7], None)
