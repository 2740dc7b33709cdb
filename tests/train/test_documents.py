"""Where documents begin in the rows of a batch."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from lte.data.rows import LmCollator, PromptsCounted
from lte.train.documents import follows_document, separators_of


def test_a_document_ends_with_a_separator_and_where_positions_start_anew() -> None:
    ids = torch.tensor([[5, 2, 6, 7, 9, 8], [2, 5, 5, 5, 5, 5]])
    assert follows_document({"input_ids": ids}, (2, 9)).long().tolist() == [[0, 1, 0, 1, 1, 0], [0, 0, 1, 1, 1, 1]]
    positions = torch.tensor([[0, 1, 2, 0, 1, 2], [0, 1, 2, 3, 4, 5]])
    found = follows_document({"input_ids": ids, "position_ids": positions}, ())
    assert found.long().tolist() == [[0, 1, 1, 0, 1, 1], [0, 1, 1, 1, 1, 1]]


def test_separators_are_those_of_the_configs_the_tokenizer_and_the_collator() -> None:
    model = SimpleNamespace(
        config=SimpleNamespace(eos_token_id=[7, 2]), generation_config=SimpleNamespace(eos_token_id=5)
    )
    collator = PromptsCounted(LmCollator(0, eos_token_id=11))
    assert separators_of(model, collator, SimpleNamespace(eos_token_id=3), None) == (2, 3, 5, 7, 11)
    assert separators_of(SimpleNamespace(config=SimpleNamespace(eos_token_id=None))) == ()
