"""Faults put into every file of a saved folder: each is refused with the file and a way out, or changes nothing."""

from __future__ import annotations

import json
import math
import random
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

import lte
from lte.eval.models import load_any_model, save_folder
from lte.hf.card import CARD_FILE
from lte.hf.checkpoints import CHECKSUM_FILE
from lte.hf.dense import load_tokenizer
from lte.hf.verify import loading_fault
from tests.cli.conftest import VOCAB_SIZE, save_tiny_model
from tests.methods.methods import made
from tests.tiny_models import tiny_sparse_model

TEXT = "while the wind blows"
WAYS_OUT = ("copy, download or save the folder again", "correct", "save_pretrained", "load the folder")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    return load_tokenizer(save_tiny_model(tmp_path_factory.mktemp("dense")))


@pytest.fixture(scope="module")
def whole(tokenizer: PreTrainedTokenizerBase, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A good folder with a tokenizer and a generation config."""
    folder = tmp_path_factory.mktemp("whole") / "model"
    save_folder(tiny_sparse_model(vocab_size=VOCAB_SIZE), tokenizer, folder)
    return folder


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "model"))


def behaviour(folder: Path) -> tuple[Any, ...]:
    """All that a user sees of a folder: weights, config, generation, tokens and chats."""
    model, tokenizer = load_any_model(str(folder)), load_tokenizer(folder)
    config = {key: value for key, value in model.config.to_dict().items() if key != "_name_or_path"}
    chat = tokenizer.apply_chat_template([{"role": "user", "content": TEXT}], tokenize=False)
    weights = {name: value.tolist() for name, value in model.state_dict().items()}
    return weights, config, model.generation_config.to_dict(), tokenizer(TEXT)["input_ids"], chat


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture(scope="module")
def expected(whole: Path) -> tuple[Any, ...]:
    return behaviour(whole)


def outcome(folder: Path, expected: tuple[Any, ...]) -> str | None:
    """The message with which a folder is refused; `None` if it behaves as the whole one, bit by bit."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        try:
            found = behaviour(folder)
        except (ValueError, OSError, UserWarning) as error:
            return str(error)
    assert found == expected
    return None


def test_a_folder_of_the_commands_has_a_tokenizer_a_template_and_checksums(whole: Path) -> None:
    assert {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"} <= {
        *names(whole)
    }
    assert lte.verify(whole) == []
    assert sorted(json.loads((whole / CHECKSUM_FILE).read_text())["files"]) == sorted(
        {*names(whole)} - {CARD_FILE, CHECKSUM_FILE}
    )


@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 0.97, 1.0])
def test_files_cut_short(share: float, whole: Path, copy: Path, expected: tuple[Any, ...]) -> None:
    refused = []
    for name in names(whole):
        data = (whole / name).read_bytes()
        (copy / name).write_bytes(data[: min(int(share * len(data)), len(data) - 1)])
        message = outcome(copy, expected)
        if message is not None:
            assert name in message
            assert any(way in message for way in WAYS_OUT), message
            refused.append(name)
        if name != CARD_FILE and not (name == CHECKSUM_FILE and share == 1):
            assert any(found.startswith(name) for found in lte.verify(copy)), name
        (copy / name).write_bytes(data)
    # A last line break is no loss.
    always = {"model.safetensors", *([] if share == 1 else ["config.json", "chat_template.jinja"])}
    assert always <= {*refused}
    assert outcome(copy, expected) is None


def test_files_that_are_gone(whole: Path, copy: Path, expected: tuple[Any, ...]) -> None:
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (copy / name).unlink()
        message = outcome(copy, expected)
        assert message is not None
        assert str(copy) in message
        assert any(found.startswith(f"{name} is missing") for found in lte.verify(copy))
        shutil.copy(whole / name, copy / name)


def test_flipped_bits_are_found(whole: Path, copy: Path) -> None:
    generator = random.Random(0)
    files = [name for name in names(whole) if name != CARD_FILE]
    for flip in range(60):
        name = files[flip % len(files)]
        data = bytearray((whole / name).read_bytes())
        data[generator.randrange(len(data))] ^= 1 << generator.randrange(8)
        (copy / name).write_bytes(data)
        found = lte.verify(copy)
        assert any(name in one for one in found) or (name == CHECKSUM_FILE and found), (name, found)
        (copy / name).write_bytes((whole / name).read_bytes())
    assert lte.verify(copy) == []


WRONG: dict[str, Any] = {
    "null": None,
    "text": "x",
    "list": [],
    "dict": {},
    "negative": -1,
    "NaN": math.nan,
    "infinite": math.inf,
    "huge": 10**30,
    "beyond floats": 10**400,
    "bool": True,
}


def edit_config(folder: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    config = json.loads((folder / "config.json").read_text())
    edit(config)
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("kind", WRONG)
def test_fields_of_the_method(kind: str, whole: Path, copy: Path, expected: tuple[Any, ...]) -> None:
    fields = json.loads((whole / "config.json").read_text())["lte"]
    for field in fields:
        edit_config(copy, lambda config, field=field: config["lte"].update({field: WRONG[kind]}))  # type: ignore[misc]
        # Seeds are of no account once a model is there, and a router may have no rank.
        if (field, kind) in {("seed", "negative"), ("router_rank", "null")}:
            loaded = AutoModelForCausalLM.from_pretrained(copy)
            assert {name: value.tolist() for name, value in loaded.state_dict().items()} == expected[0]
        else:
            # A bias that the folder does not hold is no wrong field.
            missing = (field, kind) == ("dropped_bias", "bool")
            wrong = "must hold all weights of the model" if missing else rf": config\.json: .*{field}="
            with pytest.raises(ValueError, match=rf"{copy}.*{wrong}"):
                AutoModelForCausalLM.from_pretrained(copy)
        shutil.copy(whole / "config.json", copy / "config.json")
    edit_config(copy, lambda config: config.update(lte=WRONG[kind]))
    with pytest.raises(ValueError, match=rf"{copy}: .*(must hold the settings of a method, got|version must be)"):
        AutoModelForCausalLM.from_pretrained(copy)


@pytest.mark.parametrize("method", ["cats", "deja_vu", "noisy_topk", "teal", "wina", "static_pruning"])
def test_fields_of_other_methods(method: str, tmp_path: Path) -> None:
    made(method).save_pretrained(tmp_path)
    config = (tmp_path / "config.json").read_text()
    for field in json.loads(config)["lte"]:
        edit_config(tmp_path, lambda config, field=field: config["lte"].update({field: {"a": 1}}))  # type: ignore[misc]
        if field != "dense_neurons":
            with pytest.raises(ValueError, match=f"{field}="):
                lte.methods.config_of(load_any_model(str(tmp_path)))
        (tmp_path / "config.json").write_text(config)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *[("hidden_size", value) for value in (None, "abc", [], {}, -1, 0, 64, 10**30)],
        *[("num_hidden_layers", value) for value in (None, "2", 0, 1, 3, -1)],
        *[("num_attention_heads", value) for value in (0, 3, -4, True)],
        *[("hidden_act", value) for value in (None, "nope", 3)],
        *[("vocab_size", value) for value in (None, 0, 7, 1e3)],
        *[("rope_parameters", value) for value in ("x", [1])],
        *[("model_type", value) for value in (None, 5, [], "lte_nothing")],
        *[("dtype", value) for value in ("float99",)],
        *[("quantization_config", value) for value in ("x", [])],
        *[("lte_measurement", value) for value in ("x", [1], {"sparsity": "x"}, {"active_fraction": [None]})],
        *[
            ("lte_measurement", {"union_fraction": value})
            for value in (
                *(1, [1], {"texts": 1}, {"others": {}}, {"row": {"x": [1]}}, {"row": {"1": [1]}}, {"row": {"2": 0.5}}),
                *({"row": {"2": [each]}} for each in ("x", -0.1, 1.1, float("nan"))),
            )
        ],
    ],
)
def test_fields_of_the_family(field: str, value: Any, copy: Path) -> None:
    edit_config(copy, lambda config: config.update({field: value}))
    with pytest.raises(ValueError, match=f"{copy}") as caught:
        load_any_model(str(copy))
    assert "config.json" in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"null", b"[1]", b'{"model_type": ', b"\xff\xfe\x00", b"[" * 5000])
def test_a_config_that_is_none(content: bytes, copy: Path) -> None:
    (copy / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match=rf"got {copy}: config\.json .*; copy, download or save the folder again"):
        load_any_model(str(copy))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["mlp.router.weight", "mlp.router.bias", "mlp.down_proj.weight"])
def test_weights_that_are_no_numbers(name: str, value: float, copy: Path) -> None:
    weights = load_file(copy / "model.safetensors")
    weights[f"model.layers.1.{name}"].view(-1)[3] = value
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"finite weights, got NaN or infinity in 1: model.layers.1.{name};"):
        AutoModelForCausalLM.from_pretrained(copy)
    assert any(f"model.layers.1.{name}" in one for one in lte.verify(copy))
    assert name.startswith("mlp.down") or name in str(loading_fault(copy))


@pytest.mark.parametrize("method", ["cats", "teal", "wina", "deja_vu"])
def test_thresholds_and_predictors_that_are_no_numbers(method: str, tmp_path: Path) -> None:
    made(method).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    own = next(name for name in weights if {"threshold", "input_norms", "predictor"} & {*name.split(".")})
    weights[own] = torch.full_like(weights[own], math.nan)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"got NaN or infinity in 1: {own}"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_pickle_as_weights(copy: Path) -> None:
    (copy / "model.safetensors").unlink()
    torch.save({"a": copy}, copy / "pytorch_model.bin")
    with pytest.raises(ValueError, match=rf"got {copy}: its weights are a pickle .* save the model as safetensors"):
        load_any_model(str(copy))


@pytest.mark.parametrize(
    ("file", "field", "value"),
    [
        ("generation_config.json", "eos_token_id", "x"),
        ("generation_config.json", "pad_token_id", [None]),
        ("tokenizer_config.json", "model_max_length", "x"),
        ("tokenizer_config.json", "padding_side", "x"),
        ("tokenizer_config.json", "pad_token", 5),
    ],
)
def test_fields_of_other_files(file: str, field: str, value: Any, copy: Path) -> None:
    content = json.loads((copy / file).read_text())
    (copy / file).write_text(json.dumps({**content, field: value}))
    part = "a file of its tokenizer" if file.startswith("tokenizer") else "config.json or generation_config.json does"
    with pytest.raises(ValueError, match=rf"must load, got {copy}: ({part}|{file}: {field} must be)"):
        behaviour(copy)


def test_a_name_that_is_unknown_is_found_below_the_first_level(copy: Path) -> None:
    edit_config(copy, lambda config: config.update(rope_parameters={"rope_type": "spiral", "rope_theta": 1e4}))
    with pytest.raises(ValueError, match=r'KeyError: .spiral. \(look at rope_parameters\.rope_type="spiral"\)'):
        load_any_model(str(copy))


def test_other_files_do_not_stop_a_folder(copy: Path, expected: tuple[Any, ...]) -> None:
    (copy / "results.json").write_text("not JSON")
    (copy / "notes.safetensors").write_bytes(b"")
    assert outcome(copy, expected) is None
    assert lte.verify(copy) == []
