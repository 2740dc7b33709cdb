from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset

import lte
from lte.eval import perplexity
from lte.eval.perplexity import PerplexityResult, evaluate_model
from lte.eval.sparsity import measure_sparsity
from tests.tiny_models import PAD, VOCAB, tiny_dense_model, tiny_sparse_model


def quality(model: Any, data: Any, **options: Any) -> PerplexityResult:
    return evaluate_model(model, data, **options)[0]


class Rows(Dataset[dict[str, Tensor]]):
    def __init__(self, *lengths: int):
        generator = torch.Generator().manual_seed(5)
        self.rows = [torch.randint(3, VOCAB, (length,), generator=generator) for length in lengths]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.rows[index], "labels": self.rows[index]}


def batch_of(*rows: Tensor, side: str = "right", labels: Tensor | None = None) -> dict[str, Tensor]:
    length = max(len(row) for row in rows)
    pads = [torch.full((length - len(row),), PAD) for row in rows]
    parts = zip(rows, pads, strict=True)
    ids = torch.stack([torch.cat([row, pad] if side == "right" else [pad, row]) for row, pad in parts])
    mask = (ids != PAD).long()
    labels = ids.masked_fill(mask == 0, -100) if labels is None else labels
    return {"input_ids": ids, "labels": labels, "attention_mask": mask}


def test_the_loss_is_that_of_transformers(causal_type: str) -> None:
    model = tiny_dense_model(causal_type)
    ids = torch.stack(Rows(9, 9, 9).rows)
    labels = ids.clone()
    labels[0, :4] = -100
    with torch.no_grad():
        expected = model(input_ids=ids, labels=labels).loss.item()
    result = quality(model, [{"input_ids": ids, "labels": labels}], progress=False)
    assert result.nll_per_token == pytest.approx(expected, rel=1e-5)
    assert result.tokens == 8 + 8 + 5
    assert result.perplexity == pytest.approx(math.exp(expected), rel=1e-5)


def test_the_mean_is_over_tokens_and_not_over_batches() -> None:
    model, rows = tiny_dense_model(), Rows(2, 12, 7)
    one_by_one = [quality(model, [batch_of(row)], progress=False) for row in rows.rows]
    total = sum(result.nll_per_token * result.tokens for result in one_by_one)
    for batch_size in (1, 2, 3):
        result = quality(model, rows, batch_size=batch_size, progress=False)
        assert result.tokens == 1 + 11 + 6
        assert result.nll_per_token == pytest.approx(total / 18, rel=1e-5)


def test_padding_on_either_side_and_labels_on_padding_change_nothing() -> None:
    model, rows = tiny_dense_model(), Rows(4, 11).rows
    right, left = batch_of(*rows), batch_of(*rows, side="left")
    expected = quality(model, [right], progress=False)
    found = quality(model, [left], progress=False)
    assert (found.tokens, found.nll_per_token) == (13, pytest.approx(expected.nll_per_token, rel=1e-5))
    careless = {**left, "labels": left["input_ids"]}
    assert quality(model, [careless], progress=False) == found


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model, rows = tiny_dense_model(), Rows(9, 4)
    expected = quality(model, rows, progress=False)
    monkeypatch.setattr(perplexity, "CHUNK_LOGITS", 5 * VOCAB)
    result = quality(model, rows, progress=False)
    assert result.nll_per_token == pytest.approx(expected.nll_per_token, rel=1e-6)


def test_quality_and_sparsity_come_from_one_pass_in_hard_mode(causal_type: str) -> None:
    model, rows = tiny_sparse_model(causal_type).train(), Rows(9, 4, 6)
    ffns = list(lte.sparse_ffns(model).values())
    ffns[0].set_mode("soft")
    result, measured = evaluate_model(model, rows, batch_size=2, progress=False)
    assert measured is not None
    batches = [batch_of(*rows.rows[:2]), batch_of(rows.rows[2])]
    assert measured == measure_sparsity(model, batches)
    assert measured.tokens == 19
    assert (ffns[0].mode, ffns[0].record_logits, model.training) == ("soft", False, True)
    for ffn in ffns:
        ffn.set_mode("hard")
    assert quality(model, rows, batch_size=2, progress=False) == result


def test_a_dense_model_has_no_measurement() -> None:
    result, measured = evaluate_model(tiny_dense_model(), Rows(9), progress=False)
    assert measured is None
    assert result.tokens == 8


def test_a_bfloat16_model_and_autocast_stay_close_to_fp32() -> None:
    model, rows = tiny_sparse_model(routed=False), Rows(9, 4)
    expected = quality(model, rows, progress=False).nll_per_token
    autocast = quality(model, rows, autocast_dtype=torch.bfloat16, progress=False)
    assert autocast.nll_per_token == pytest.approx(expected, rel=2e-2)
    assert autocast.nll_per_token != expected
    half = quality(model.to(torch.bfloat16), rows, device="cpu", progress=False)
    assert half.nll_per_token == pytest.approx(expected, rel=2e-2)


def test_words_give_the_perplexity_per_word() -> None:
    result = quality(tiny_dense_model(), Rows(9), num_words=4, progress=False)
    assert result.perplexity_per_word == pytest.approx(result.perplexity**2)
    assert PerplexityResult(1.0, 8).perplexity_per_word is None
    assert PerplexityResult(1e4, 8).perplexity == math.inf


def test_the_progress_bar_works(capsys: pytest.CaptureFixture[str]) -> None:
    assert quality(tiny_dense_model(), Rows(9), progress=True).tokens == 8


def test_a_loss_of_nan_names_its_batch() -> None:
    model = tiny_dense_model()
    with torch.no_grad():
        model.model.embed_tokens.weight[7] = float("nan")
    ids = torch.tensor([[5, 6, 8]])
    batches = [{"input_ids": ids, "labels": ids}, {"input_ids": ids + 1, "labels": ids}]
    with pytest.raises(ValueError, match="the loss must be finite, got nan in batch 1 of 2"):
        quality(model, batches, progress=False)


@pytest.mark.parametrize(
    ("data", "options", "message"),
    [
        ([], {}, "labels must hold a token to predict after the first of a row, got none"),
        ([batch_of(torch.tensor([5]))], {}, "labels must hold a token to predict"),
        (
            [{"input_ids": torch.ones(1, 3).long()}],
            {},
            "labels must be in every batch, got the keys input",
        ),
        (
            [{"labels": torch.ones(1, 3)}],
            {},
            r"input_ids must be in every batch as \[B, T\], got the keys",
        ),
        (Rows(9), {"num_words": 0}, "num_words must be at least 1 or None, got num_words=0"),
        (Rows(9), {"batch_size": 0}, "batch_size must be at least 1, got batch_size=0"),
    ],
)
def test_wrong_data_is_refused(data: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        quality(tiny_dense_model(), data, progress=False, **options)


def test_a_model_that_predicts_no_next_token_is_refused() -> None:
    with pytest.raises(ValueError, match="model must predict the next token to have a perplexity, got DistilBert"):
        quality(tiny_dense_model("distilbert"), Rows(9), progress=False)
