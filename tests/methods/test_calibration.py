"""`calibrate_` and `measure_sparsity`: the kinds of data that they take, and that a target is met again."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import datasets
import peft
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import lte
from lte.methods import METHODS, config_of
from tests.methods.methods import calibration_batches, made
from tests.tiny_models import VOCAB, randomise_routers_, tiny_dense_model, tiny_sparse_model

ROWS = torch.randint(3, VOCAB, (24, 40), generator=torch.Generator().manual_seed(5))
TEXTS = [" ".join(f"w{int(token)}" for token in row) for row in ROWS]
FITTED = [name for name, method in METHODS.items() if method.calibrate or method.fit]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    words = {"<pad>": 0, "<s>": 1, "</s>": 2, **{f"w{i}": i for i in range(3, VOCAB)}}
    plain = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=plain, pad_token="<pad>", eos_token="</s>")


def batches() -> list[dict[str, Tensor]]:
    return [{"input_ids": part, "labels": part} for part in ROWS.split(8)]


def dataset(stream: bool = False) -> Any:
    columns = {"input_ids": ROWS.tolist(), "labels": ROWS.tolist()}
    found = datasets.Dataset.from_dict(columns)
    return found.to_iterable_dataset() if stream else found


def biases(model: Any) -> list[Tensor]:
    return [ffn.router.bias.detach().clone() for ffn in lte.sparse_ffns(model).values()]


@pytest.mark.parametrize("kind", ["texts", "dataset", "stream", "rows", "generator"])
def test_all_kinds_of_data_are_the_same(kind: str, tokenizer: Any) -> None:
    data = {
        "texts": lambda: TEXTS,
        "dataset": dataset,
        "stream": lambda: dataset(stream=True),
        "rows": lambda: [{"input_ids": row, "labels": row} for row in ROWS],
        "generator": lambda: iter(batches()),
    }[kind]
    expected = lte.measure_sparsity(tiny_sparse_model(), batches())
    assert lte.measure_sparsity(tiny_sparse_model(), data(), tokenizer=tokenizer) == expected
    one, other = tiny_sparse_model(), tiny_sparse_model()
    lte.calibrate_(one, batches(), target_sparsity=0.7)
    assert lte.calibrate_(other, data(), tokenizer=tokenizer, target_sparsity=0.7) is other
    assert all(torch.equal(*pair) for pair in zip(biases(one), biases(other), strict=True))


@pytest.mark.parametrize("target", [None, 0.3])
def test_lte_meets_the_configured_or_the_given_target(target: float | None, tmp_path: Path) -> None:
    model = tiny_sparse_model()
    with torch.no_grad():
        for ffn in lte.sparse_ffns(model).values():
            ffn.router.bias += 1.0
    model.config.lte_measurement = {"sparsity": 0.1}
    lte.calibrate_(model, batches(), target_sparsity=target)
    wanted = 0.5 if target is None else target
    assert lte.measure_sparsity(model, batches()).sparsity == pytest.approx(wanted, abs=5e-3)
    assert model.config.lte_measurement is None, "what was measured before holds no more"
    model.save_pretrained(tmp_path)
    assert AutoModelForCausalLM.from_pretrained(tmp_path).target_sparsity == wanted


@pytest.mark.parametrize("method", FITTED)
def test_every_method_that_sets_something_takes_a_new_target(method: str, tmp_path: Path) -> None:
    model = made(method, target_sparsity=0.25)
    lte.calibrate_(model, calibration_batches(), target_sparsity=0.75)
    fresh = made(method, target_sparsity=0.75)
    if method == "lte":
        fresh = lte.calibrate_(fresh, calibration_batches())
    found, expected = (lte.measure_sparsity(each, calibration_batches()) for each in (model, fresh))
    assert found.sparsity == pytest.approx(expected.sparsity, abs=0.02)
    assert config_of(model) == config_of(fresh)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert lte.measure_sparsity(loaded, calibration_batches()) == found


@pytest.mark.parametrize("target", ["q_proj", "down_proj"])
def test_an_adapter_around_an_lte_model_is_calibrated_and_measured(target: str) -> None:
    lora = peft.LoraConfig(target_modules=[target], r=2, init_lora_weights=False)
    model = peft.get_peft_model(tiny_sparse_model(), lora)
    lte.calibrate_(model, batches(), target_sparsity=0.6)
    measured = lte.measure_sparsity(model, batches())
    assert measured.sparsity == pytest.approx(0.6, abs=5e-3)
    merged = lte.measure_sparsity(model.merge_and_unload(), batches())
    assert measured.sparsity == pytest.approx(merged.sparsity, abs=1e-3)
    assert measured.weights_read == pytest.approx(merged.weights_read, rel=1e-2)
    assert model.config.lte["target_sparsity"] == 0.6


def test_an_accelerated_model_is_calibrated() -> None:
    model = lte.sparsify_(tiny_dense_model(intermediate_size=128), lte.LteConfig(expert_size=16, grouping="random"))
    randomise_routers_(model)
    plain = copy.deepcopy(model)
    lte.accelerate_(model)
    for each in (model, plain):
        lte.calibrate_(each, batches(), target_sparsity=0.7)
    assert lte.is_accelerated(model)
    assert lte.measure_sparsity(model, batches()).sparsity == pytest.approx(0.7, abs=5e-3)
    assert all(torch.allclose(*pair, atol=1e-4) for pair in zip(biases(model), biases(plain), strict=True))


def test_frozen_predictors_and_recording_stay_as_they_were() -> None:
    model = made("deja_vu").requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items() if "predictor" in name}
    lte.calibrate_(model, batches())
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert any(not torch.equal(value, model.state_dict()[name]) for name, value in before.items())
    sparse = tiny_sparse_model().train()
    sparse.model.layers[0].mlp.eval()
    next(iter(lte.sparse_ffns(sparse).values())).record_logits = True
    lte.calibrate_(sparse, batches())
    assert [ffn.record_logits for ffn in lte.sparse_ffns(sparse).values()] == [True, False]
    assert [layer.mlp.training for layer in sparse.model.layers] == [False, True]


def test_max_tokens_are_spread_over_a_data_set_and_the_first_of_others() -> None:
    model = tiny_sparse_model()
    assert lte.measure_sparsity(model, dataset(), max_tokens=80, batch_size=1).tokens == 80
    first = lte.measure_sparsity(model, batches()[:1])
    assert lte.measure_sparsity(model, batches(), max_tokens=320) == first
    spread = lte.measure_sparsity(model, [{"input_ids": ROWS[[0, 12]]}])
    assert lte.measure_sparsity(model, dataset(), max_tokens=80) == spread


def test_long_texts_are_cut_to_what_the_model_takes(tokenizer: Any) -> None:
    model = tiny_sparse_model()
    long = " ".join(TEXTS[:4])
    assert lte.measure_sparsity(model, [long], tokenizer=tokenizer).tokens == 160
    cut = [{"input_ids": part[None]} for part in ROWS[:4].flatten().split(64)]
    found, expected = lte.measure_sparsity(model, [long], tokenizer=tokenizer), lte.measure_sparsity(model, cut)
    assert found.expert_use == expected.expert_use


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (TEXTS, "tokenizer must be given for texts, got tokenizer=None; pass that of the model"),
        ("one text", "data must be a list of texts, rows with input_ids, or batches, got a str"),
        (3, "data must be a list of texts, rows with input_ids, or batches, got a int"),
        ([3], "data must hold texts, rows with input_ids, or batches, got a int"),
        ([{"text": "a"}], r"input_ids must be in every batch as \[B, T\], got the keys text; or in every row"),
        ([], "must"),
    ],
)
def test_other_data_is_refused(data: Any, message: str) -> None:
    for verb in (lte.calibrate_, lte.measure_sparsity):
        with pytest.raises(ValueError, match=message):
            verb(tiny_sparse_model(), data)


def test_what_cannot_be_calibrated_says_so() -> None:
    with pytest.raises(ValueError, match="thresholds or predictors to set, got a dense one"):
        lte.calibrate_(tiny_dense_model(), batches())
    for name in ("kla", "random_router", "static_pruning", "wanda"):
        with pytest.raises(ValueError, match=f"thresholds or predictors to set, got one of the method {name}"):
            lte.calibrate_(made(name), batches())
    with pytest.raises(ValueError, match=r"target_sparsity must lie in \[0, 1\), got target_sparsity=1"):
        lte.calibrate_(tiny_sparse_model(), batches(), target_sparsity=1.0)
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        lte.calibrate_(tiny_sparse_model(), batches(), batch_size=0)
    with pytest.raises(ValueError, match="max_tokens must be at least 1"):
        lte.calibrate_(tiny_sparse_model(), batches(), max_tokens=0)
