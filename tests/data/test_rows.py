"""Batches of rows, which of their tokens count, and rows that do not fit the model."""

from __future__ import annotations

import pytest
import torch

from lte.data.config import DataConfig, check_sequence_length
from lte.data.rows import LmCollator, TokenRows, calibration_batches, load_lm_datasets, token_mask
from tests.data.text_samples import load


class TestBatches:
    def test_padding_and_ignored_labels_do_not_count(self):
        batch = LmCollator(0)([{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}, {"input_ids": [5], "labels": [5]}])
        assert token_mask(batch)[:, :3].tolist() == [[False, True, True], [True, False, False]]
        assert batch["input_ids"].tolist() == [[5, 6, 7] + [0] * 5, [5] + [0] * 7]
        assert batch["labels"].tolist() == [[-100, 6, 7] + [-100] * 5, [5] + [-100] * 7]
        assert torch.equal(token_mask(batch) | (batch["labels"] == -100), torch.ones(2, 8, dtype=torch.bool))
        assert batch["attention_mask"].sum(1).tolist() == [3, 1]

    def test_rows_of_one_length_have_no_mask(self):
        batch = LmCollator(None)([{"input_ids": [5, 6, 7], "labels": [5, 6, 7]}] * 2)
        assert sorted(batch) == ["input_ids", "labels"]
        assert token_mask(batch).all()

    def test_padding_of_packed_rows_is_one_more_document(self):
        rows = [{"input_ids": [5] * n, "labels": [5] * n, "position_ids": [0, 1, 0][:n]} for n in (3, 2)]
        batch = LmCollator(9)(rows)
        assert sorted(batch) == ["input_ids", "labels", "position_ids"]
        assert batch["position_ids"].tolist() == [[0, 1, 0, 0, 1, 2, 3, 4], [0, 1, 0, 1, 2, 3, 4, 5]]
        assert token_mask(batch).sum(1).tolist() == [3, 2]

    def test_padding_needs_a_token(self):
        with pytest.raises(ValueError, match="pad_token_id must be a token for rows of different lengths"):
            LmCollator(None)([{"input_ids": [5] * n, "labels": [5] * n} for n in (1, 2)])

    def test_calibration_rows_spread_over_the_data(self):
        rows = TokenRows([[i] * 4 for i in range(100)], [[i] * 4 for i in range(100)])
        batches = list(calibration_batches(rows, 40, 5, LmCollator(0)))
        assert torch.cat([batch["input_ids"][:, 0] for batch in batches]).tolist() == list(range(0, 100, 10))
        uneven = TokenRows(*[[[1] * (1 + i * i * 7 % 11) for i in range(400)]] * 2)
        tokens = sum(int(token_mask(batch).sum()) for batch in calibration_batches(uneven, 450, 5, LmCollator(0)))
        assert 400 <= tokens <= 500
        with pytest.raises(ValueError, match="dataset must hold at least one row"):
            next(calibration_batches(TokenRows([], []), 40, 5, LmCollator(0)))


def test_what_does_not_fit_the_model_is_refused(jsonl, tokenizer):
    with pytest.raises(ValueError, match="sequence_length must be at most 8 for this model"):
        load_lm_datasets(DataConfig(train=jsonl, sequence_length=16), tokenizer, max_length=8)
    check_sequence_length(DataConfig(sequence_length=16), None)
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="tokenizer must have an end-of-text token"):
        load(tokenizer, train=jsonl)
