"""What the inspector's page holds equals what is measured, and stays small."""

from __future__ import annotations

import base64
import json
import re
from typing import Any

import numpy as np
import pytest
import torch

from lte.eval.inference import hard_inference
from lte.eval.sparsity import measure_sparsity
from lte.eval.text_tokens import readable_entries
from lte.eval.token_routing import record_routing, record_text, selectivity, strongest_tokens
from lte.report.inspector import Inspector, NamedText, inspector_data, inspector_page
from tests.report.inspected import NASTY, PLAIN, byte_level_tokenizer, large_run, sparse_model

MAX_PAGE_BYTES = 3_000_000


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
    assert (run["next"] is None) == (model_type in ("bert", "t5"))
    assert run["target"] == model.config.lte["target_sparsity"]
    assert run["measured"] is None
    assert run["reads_at_once"] == (model_type in ("bert", "t5"))
    assert any("encoder and a decoder" in note for note in run["notes"]) == (model_type == "t5")


def test_a_reference_text_gives_what_is_known_of_experts(tokenizer: Any) -> None:
    model, reference = sparse_model(), NamedText("book", PLAIN * 3)
    run = Inspector(model, tokenizer, "tiny", reference=reference).run(NamedText("t", "open"))
    ids = tokenizer(reference.text)["input_ids"]
    routing = record_routing(model, ids)
    expected = strongest_tokens(routing, ids)
    known = run["reference"]
    assert known["tokens"]["ids"] == ids
    shape = expected.positions.shape
    np.testing.assert_array_equal(unpack(known["positions"], "<i4", shape), expected.positions)
    np.testing.assert_array_equal(unpack(known["scores"], "<f4", shape), expected.scores)
    np.testing.assert_array_equal(unpack(known["switched_on"], "<i4", shape), expected.switched_on)
    np.testing.assert_array_equal(unpack(known["use"], "<f4", shape[:2]), routing.expert_use.astype("<f4"))
    wanted = np.nan_to_num(selectivity(routing, ids)).astype("<f4")
    np.testing.assert_array_equal(unpack(known["selectivity"], "<f4", shape[:2]), wanted)
    bundled = Inspector(model, tokenizer, "tiny").run(NamedText("t", "open"))["reference"]
    assert bundled["text"] == "the bundled text"
    assert "".join(bundled["tokens"]["tokens"]).startswith("Alice was beginning")


def test_what_the_model_expects_and_what_if(tokenizer: Any) -> None:
    model, text = sparse_model(), NamedText("t", PLAIN)
    run = Inspector(model, tokenizer, "tiny").run(text)
    routing, predictions = record_text(model, run["ids"])
    assert predictions is not None
    tokens = len(run["ids"])
    np.testing.assert_array_equal(unpack(run["next"]["surprise"], "<f4", (tokens,))[1:], predictions.surprise[1:])
    np.testing.assert_array_equal(unpack(run["next"]["entropy"], "<f4", (tokens,)), predictions.entropy)
    places = unpack(run["next"]["likeliest"], "<i4", (tokens, 5))
    words = readable_entries(tokenizer, predictions.likeliest.ravel().tolist())
    assert [run["next"]["words"][place] for place in places.ravel()] == words
    steps = run["what_if"]
    counts = unpack(steps["counts"], "<u2", (len(steps["thresholds"]), tokens))
    assert steps["thresholds"] == sorted(steps["thresholds"])
    assert steps["thresholds"][steps["own"]] == pytest.approx(0.5)
    np.testing.assert_array_equal(counts[steps["own"]], routing.active.sum((0, 2)))


def test_a_text_is_continued_as_the_model_continues_it(tokenizer: Any) -> None:
    model = sparse_model()
    inspector = Inspector(model, tokenizer, "tiny")
    ids = torch.tensor([tokenizer("while")["input_ids"]])
    with hard_inference(model):
        expected = model.generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=None)[0, ids.shape[1] :]
    model.generation_config.eos_token_id = None
    found = list(inspector.generate(NamedText("t", "while"), 6))
    assert [token["id"] for token in found] == expected.tolist()
    whole = record_routing(model, [*ids[0].tolist(), *expected.tolist()]).active[:, ids.shape[1] :].mean((0, 2))
    assert [token["share"] for token in found] == pytest.approx(whole.tolist())
    model.generation_config.eos_token_id = [expected[2].item()]
    stopped = list(inspector.generate(NamedText("t", "while"), 6))
    assert len(stopped) == expected.tolist().index(expected[2].item())
    with pytest.raises(ValueError, match="model must write token by token to continue a text"):
        next(Inspector(sparse_model("bert"), tokenizer, "tiny").generate(NamedText("t", "while")))


def test_a_special_token_in_writing_is_said(tokenizer: Any) -> None:
    mark = tokenizer.all_special_tokens[0]
    run = Inspector(sparse_model(), tokenizer, "tiny").run(NamedText("t", f"a {mark} b"))
    assert [run["tokens"][place].strip() for place in run["special"]] == [mark]
    assert "holds a special token (framed)" in run["notes"][0]


def test_pairs_are_the_tokens_that_both_texts_have(tokenizer: Any) -> None:
    inspector = Inspector(sparse_model(), tokenizer, "tiny")
    runs = [inspector.run(NamedText("t", text)) for text in ("abcXdef", "abcdYef")]
    data = inspector_data(runs)
    assert data["pairs"] == [[0, 0, 3], [4, 3, 1], [5, 5, 2]]
    assert [run["reference"] for run in data["runs"]] == [0, 0]
    assert len(data["references"]) == 1


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
    total = f"{len(tokenizer(PLAIN * 40)['input_ids']):,}"
    assert len(run["ids"]) == shown
    assert run["notes"] == [f"Only the first {shown:,} of {total} tokens are shown; the text was cut there."]
    assert run["reference"]["notes"][0].startswith("Only the first 256 of ")


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
    assert len(inspector_page(inspector_data([run])).encode()) < MAX_PAGE_BYTES
