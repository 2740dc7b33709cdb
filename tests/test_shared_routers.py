"""What experiments/shared_routers.py computes of single FFNs, against the FFNs themselves."""

from __future__ import annotations

import argparse
import json
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lte import LteConfig
from lte.train.added_terms import AddedTerms
from tests.tiny_models import tiny_dense_model

ROOT = Path(__file__).parents[1]
SIZE = 8


@pytest.fixture(scope="module")
def script() -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "experiments" / "shared_routers.py"))


@pytest.fixture
def ffn() -> Any:
    torch.manual_seed(0)
    return tiny_dense_model().model.layers[0].mlp


def states(documents: int = 3, length: int = 20) -> Tensor:
    return torch.randn(documents, length, 32)


def test_errors_are_those_of_the_ffn(script: dict[str, Any], ffn: Any) -> None:
    x = states()
    order = script["order_of"](ffn, x, LteConfig(expert_size=SIZE, grouping="contribution"))
    assert order.sort().values.equal(torch.arange(64))
    tokens = script["tokens_of"](ffn, x, order, SIZE)
    on = torch.rand(3, 20, 8) < 0.5
    mask = torch.empty(3, 20, 64)
    mask[..., order] = on.float().repeat_interleave(SIZE, -1)
    whole, sparse = ffn(x), ffn.down_proj(script["hidden"](ffn, x) * mask)
    expected = (whole - sparse).square().sum(-1) / whole.square().sum(-1)
    torch.testing.assert_close(script["errors"](tokens.products, 1 - on.float()), expected, rtol=1e-4, atol=1e-5)


def test_the_gradient_of_errors(script: dict[str, Any], ffn: Any) -> None:
    tokens = script["tokens_of"](ffn, states(), torch.arange(64), SIZE)
    off = torch.rand(3, 20, 8, requires_grad=True)
    plain = torch.einsum("nte,ntef,ntf->nt", off, tokens.products, off)
    torch.testing.assert_close(script["errors"](tokens.products, off), plain)
    (expected,) = torch.autograd.grad(plain.sum(), off)
    (found,) = torch.autograd.grad(script["errors"](tokens.products, off).sum(), off)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_unions(script: dict[str, Any], ffn: Any) -> None:
    scores = torch.zeros(1, 18, 8)
    scores[0, ::2, :2] = scores[0, 0, 2:4] = scores[0, 17, 4:6] = 1
    # Of 4 pairs of experts one is on in every 2 tokens, one at first alone, one behind the last chunk of 4.
    tokens = script["tokens_of"](ffn, states(1, 18), torch.arange(64), SIZE)
    found = script["measure"](tokens, scores, 0.5)
    assert found["unions"] == pytest.approx({"2": 25 / 36, "4": 11 / 16, "8": 5 / 8, "16": 2 / 4})


def test_the_core_is_that_of_the_library(script: dict[str, Any]) -> None:
    """Of 8 experts a third are 3, as `neuron_order` has them, not 2."""
    torch.manual_seed(0)
    ffn = tiny_dense_model().model.layers[0].mlp
    tokens = script["tokens_of"](ffn, states(4, 32), torch.arange(64), SIZE)
    core = LteConfig(always_on=0.33).num_always_on(8)
    router, _ = script["train"](tokens, script["Setting"]("core", always_on=0.33), core, 0.5, 20, 1e-2)
    with torch.no_grad():
        logits = script["logits_of"](router, tokens.x)
    on = logits > logits.flatten().kthvalue(logits.numel() // 2).values
    assert on[..., :core].all()
    assert not on[..., core:].all((0, 1)).any()
    assert script["measure"](tokens, logits, 0.5)["sparsity"] == pytest.approx(0.5, abs=0.02)


def test_what_is_measured_is_off_as_wanted(script: dict[str, Any], ffn: Any) -> None:
    x = states(8, 64)
    tokens = script["tokens_of"](ffn, x, torch.arange(64), SIZE)
    found = script["measure"](tokens, torch.randn(8, 64, 8), 0.5)
    assert found["sparsity"] == pytest.approx(0.5, abs=0.02)
    best, chunks = script["with_hindsight"](tokens, 0.5)
    assert best["error"] < found["error"]
    assert chunks["unions"]["8"] == pytest.approx(0.5, abs=0.03)


def test_training_helps_and_shared_experts_are_wanted(script: dict[str, Any], ffn: Any) -> None:
    # Neighbours that want much the same.
    x = states(16, 8).repeat_interleave(8, 1) + 0.5 * states(16, 64)
    tokens = script["tokens_of"](ffn, x, torch.arange(64), SIZE)
    found = {}
    for setting in (script["Setting"]("default"), script["Setting"]("union", terms=AddedTerms(union=3.0))):
        router, eta = script["train"](tokens, setting, 0, 0.5, 300, 1e-2)
        assert eta > 0
        with torch.no_grad():
            found[setting.name] = script["measure"](tokens, script["logits_of"](router, tokens.x), 0.5)
    random = script["measure"](tokens, torch.randn(16, 64, 8), 0.5)
    assert found["default"]["error"] < random["error"]
    assert found["union"]["unions"]["8"] > found["default"]["unions"]["8"] + 0.02


def test_a_record_of_all_settings(script: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = tmp_path / "texts.jsonl"
    words = [str(number**3) for number in range(1000)]
    # The second document is too short.
    documents = [" ".join(words[start : start + count]) for start, count in ((0, 9), (9, 2), (20, 9), (30, 9), (40, 9))]
    texts.write_text("\n".join(json.dumps({"text": text}) for text in [*documents, " ".join(words[50:60])]))
    given = script["rows"].__globals__
    torch.manual_seed(0)
    monkeypatch.setitem(given, "load_dense_model", lambda path: tiny_dense_model().eval())
    monkeypatch.setitem(given, "load_tokenizer", lambda path: lambda text: {"input_ids": [ord(c) % 32 for c in text]})
    args = argparse.Namespace(
        model="tiny", train=texts, held_out=texts, documents=4, length=32, layers=[1], targets=[0.5], settings=None,
        expert_size=SIZE, steps=20, rate=3e-3,
    )  # fmt: skip
    rows = list(script["rows"](args))
    names = [each.name for each in script["SETTINGS"]]
    assert sorted(row["setting"] for row in rows if "hindsight" not in row["setting"]) == sorted(names)
    assert len({(row["grouping"], row["setting"]) for row in rows}) == len(rows)
    for row in rows:
        assert row["layer"] == 1
        share = next((each.always_on for each in script["SETTINGS"] if each.name == row["setting"]), 0.0)
        assert row["always_on"] == LteConfig(always_on=share).num_always_on(8)
        assert row["sparsity"] == pytest.approx(0.5, abs=0.15)
        assert 0 < row["error"] < 4
        assert list(row["unions"]) == ["2", "4", "8", "16"]
    args.targets = [0.9]
    with pytest.raises(ValueError, match=r"target_sparsity must be at most 0\.875"):
        list(script["rows"](args))
    args.targets, args.layers = [0.5], [2]
    with pytest.raises(SystemExit, match=r"--layers must lie in \[0, 2\), got \[2\]"):
        list(script["rows"](args))
    args.layers, args.documents = [1], 6
    with pytest.raises(SystemExit, match="must have 6 documents of 32 tokens, got 4"):
        list(script["rows"](args))
    monkeypatch.setitem(given, "load_dense_model", lambda path: tiny_dense_model("gpt2").eval())
    with pytest.raises(SystemExit, match="must have FFNs with gate_proj, up_proj and down_proj, got GPT2LMHeadModel"):
        list(script["rows"](args))
