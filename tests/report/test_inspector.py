"""What the inspector's page holds equals what is measured, and stays small."""

from __future__ import annotations

import base64
import json
import re
from typing import Any

import numpy as np
import pytest
import torch

from lte.eval.sparsity import measure_sparsity
from lte.eval.token_routing import record_routing, strongest_tokens
from lte.report.inspector import Inspector, NamedText, inspector_data, inspector_page
from tests.report.inspected import NASTY, PLAIN, byte_level_tokenizer, large_run, sparse_model

MAX_PAGE_BYTES = 5_000_000


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return byte_level_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def unpack(text: str, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), dtype).reshape(shape)


def active_of(run: dict[str, Any]) -> np.ndarray:
    layers, tokens, experts = run["layers"], len(run["ids"]), run["experts"]
    packed = unpack(run["active"], "u1", (layers, tokens, -(-experts // 8)))
    return np.unpackbits(packed, axis=-1, count=experts).astype(bool)


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "opt", "bert", "t5"])
def test_the_numbers_are_those_that_are_measured(model_type: str, tokenizer: Any) -> None:
    model = sparse_model(model_type)
    run = Inspector(model, tokenizer, "tiny").run(NamedText("t", PLAIN))
    ids = torch.tensor([run["ids"]])
    measured = measure_sparsity(model, [{"input_ids": ids, "labels": ids}])
    use = active_of(run).mean(1)
    assert use.tolist() == measured.expert_use[: run["layers"]]
    assert run["sparsity"] == pytest.approx(1 - use.mean())
    reference = unpack(run["reference"]["use"], "<f4", use.shape)
    np.testing.assert_array_equal(reference, use.astype(np.float32))
    assert run["reads_at_once"] == (model_type in ("bert", "t5"))
    assert any("encoder and a decoder" in note for note in run["notes"]) == (model_type == "t5")


def test_a_reference_text_gives_the_strongest_tokens(tokenizer: Any) -> None:
    model, reference = sparse_model(), NamedText("book", PLAIN * 3)
    run = Inspector(model, tokenizer, "tiny", reference=reference).run(NamedText("t", "open"))
    ids = tokenizer(reference.text)["input_ids"]
    expected = strongest_tokens(record_routing(model, ids), ids)
    known = run["reference"]
    assert known["tokens"]["ids"] == ids
    shape = expected.positions.shape
    np.testing.assert_array_equal(unpack(known["positions"], "<i4", shape), expected.positions)
    np.testing.assert_array_equal(unpack(known["scores"], "<f4", shape), expected.scores)
    np.testing.assert_array_equal(unpack(known["switched_on"], "<i4", shape), expected.switched_on)
    assert Inspector(model, tokenizer, "tiny").run(NamedText("t", "open"))["reference"]["tokens"] is None


def test_two_texts_and_two_models_are_two_runs_of_their_own(tokenizer: Any) -> None:
    first, second = Inspector(sparse_model(seed=0), tokenizer, "a"), Inspector(sparse_model(seed=1), tokenizer, "b")
    runs = [first.run(NamedText("t", PLAIN)), first.run(NamedText("n", NASTY)), second.run(NamedText("t", PLAIN))]
    assert [run["ids"] == runs[0]["ids"] for run in runs] == [True, False, True]
    assert runs[0]["active"] != runs[2]["active"]
    assert first.run(NamedText("t", PLAIN)) == runs[0]


@pytest.mark.parametrize(("max_tokens", "shown"), [(5, 5), (10_000, 256)])
def test_a_long_text_is_cut_and_says_so(max_tokens: int, shown: int, tokenizer: Any) -> None:
    inspector = Inspector(sparse_model(), tokenizer, "tiny", max_tokens, NamedText("r", PLAIN * 30))
    run = inspector.run(NamedText("t", PLAIN * 40))
    total = f"{run['total_tokens']:,}"
    assert len(run["ids"]) == shown
    assert run["notes"] == [f"Only the first {shown:,} of {total} tokens are shown; the text was cut there."]
    assert run["reference"]["notes"][0].startswith(f"Only the first {shown:,} of ")


@pytest.mark.parametrize("model_type", ["roberta", "bert", "opt", "gpt2", "phi"])
def test_the_longest_text_that_a_model_takes(model_type: str, tokenizer: Any) -> None:
    # RoBERTa's padding token is 0 here, and its 256 positions begin at 1.
    run = Inspector(sparse_model(model_type), tokenizer, "tiny").run(NamedText("t", PLAIN * 40))
    assert len(run["ids"]) == (255 if model_type == "roberta" else 256)


def test_damaged_weights_are_an_error(tokenizer: Any) -> None:
    model = sparse_model()
    with torch.no_grad():
        model.get_input_embeddings().weight[:] = float("nan")
    with pytest.raises(ValueError, match="router scores must be numbers"):
        Inspector(model, tokenizer, "tiny").run(NamedText("t", PLAIN))


def test_the_page_holds_the_data(tokenizer: Any) -> None:
    data = inspector_data([Inspector(sparse_model(), tokenizer, "<i>").run(NamedText(NASTY, NASTY))])
    text = inspector_page(data)
    assert "<script>document.title" not in text
    found = re.search(r'id="page-data">(.*?)</script>', text, flags=re.DOTALL)
    assert found is not None
    assert json.loads(found[1]) == data


def test_a_page_of_2000_tokens_30_layers_and_48_experts_is_small(tokenizer: Any) -> None:
    run = large_run(Inspector(sparse_model(), tokenizer, "tiny").run(NamedText("t", PLAIN)))
    assert len(inspector_page(inspector_data([run, run])).encode()) < MAX_PAGE_BYTES
