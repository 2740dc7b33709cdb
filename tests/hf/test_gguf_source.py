"""GGUF files, whole, quantised and in parts, are converted tensor by tensor as transformers reads them."""

from __future__ import annotations

from pathlib import Path

import gguf
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import lte
from lte.eval.models import load_config
from lte.hf import gguf_source
from lte.hf.dense import load_dense_model, load_tokenizer
from lte.runs.conversion import convert_folder
from tests.hf.gguf_files import copy_gguf, tiny_llama, train_tokenizer, write_gguf

CONFIG = lte.LteConfig(expert_size=16)
Q8, Q4, F16 = (gguf.GGMLQuantizationType[name] for name in ("Q8_0", "Q4_0", "F16"))


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokenizer = train_tokenizer()
    model = tiny_llama(tokenizer.get_vocab_size(), tie_word_embeddings=request.param)
    return write_gguf(tmp_path_factory.mktemp("gguf") / "model.gguf", model, tokenizer)


def tensors(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def assert_as_in_memory(converted: Path, path: Path, dtype: torch.dtype) -> None:
    model = load_dense_model(path, dtype)
    lte.sparsify_(model, CONFIG).save_pretrained(converted.with_name("in-memory"))
    found, wanted = tensors(converted), tensors(converted.with_name("in-memory"))
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name
    assert (converted / "config.json").read_text() == (converted.with_name("in-memory") / "config.json").read_text()


@pytest.mark.parametrize("kind", [None, Q8, Q4, F16], ids=lambda kind: getattr(kind, "name", "F32"))
def test_a_file_of_any_type(kind: gguf.GGMLQuantizationType | None, path: Path, tmp_path: Path) -> None:
    copy = path if kind is None else copy_gguf(path, kind=kind)[0]
    convert_folder(copy, tmp_path / "sparse", CONFIG)
    # That of the file, which transformers keeps for some architectures.
    assert_as_in_memory(tmp_path / "sparse", copy, torch.float16 if kind == F16 else torch.float32)
    assert (
        load_tokenizer(tmp_path / "sparse")("upon a time")["input_ids"] == load_tokenizer(path)("upon a time").input_ids
    )


def test_a_model_in_parts(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = copy_gguf(path, parts=3)
    # Some rows at a time.
    monkeypatch.setattr(gguf_source, "PIECE_BYTES", 16 * 64 * 5)
    convert_folder(parts[0], tmp_path / "sparse", CONFIG, dtype=torch.bfloat16)
    assert_as_in_memory(tmp_path / "sparse", path, torch.bfloat16)
    with pytest.raises(ValueError, match="must hold the whole model, got one of 3 parts; join them"):
        load_config(str(parts[0])) and load_dense_model(parts[0])
    with pytest.raises(ValueError, match=r"model must be the first of its 3 GGUF files, named \.\.\.-00001-of-00003"):
        convert_folder(parts[1], tmp_path / "other", CONFIG)
    parts[1].rename(tmp_path / parts[1].name)
    with pytest.raises(ValueError, match=rf"must lie beside its other parts, got no {parts[1].name}"):
        convert_folder(parts[0], tmp_path / "other", CONFIG)
    parts[2].rename(parts[1])
    with pytest.raises(ValueError, match="must be part 2 of 3, got another"):
        convert_folder(parts[0], tmp_path / "other", CONFIG)


def test_a_file_without_a_tokenizer_is_converted_without(tmp_path: Path) -> None:
    tokenizer = train_tokenizer()
    keys = ("model", "pre", "tokens", "token_type", "merges", "bos_token_id", "eos_token_id", "unknown_token_id")
    without = {f"tokenizer.ggml.{key}": None for key in keys}
    path = write_gguf(tmp_path / "model.gguf", tiny_llama(tokenizer.get_vocab_size()), tokenizer, without)
    assert not convert_folder(path, tmp_path / "sparse", CONFIG).has_tokenizer
    assert not list((tmp_path / "sparse").glob("tokenizer*"))
    assert not lte.verify(tmp_path / "sparse")


def test_a_tokenizer_that_cannot_be_built_is_refused_before_the_work(tmp_path: Path) -> None:
    tokenizer = train_tokenizer()
    wrong = {"tokenizer.ggml.bos_token_id": 100_000}
    path = write_gguf(tmp_path / "model.gguf", tiny_llama(tokenizer.get_vocab_size()), tokenizer, wrong)
    with pytest.raises(ValueError, match=r"must name one of its \d+ tokens, got bos_token_id=100000"):
        convert_folder(path, tmp_path / "sparse", CONFIG)
    assert not (tmp_path / "sparse").exists()


def test_a_file_that_lacks_tensors_is_refused(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mapped = gguf_source.get_gguf_hf_weights_map

    def without(*args: object) -> dict[str, str]:
        return {name: own for name, own in mapped(*args).items() if name != "blk.0.ffn_up.weight"}

    monkeypatch.setattr(gguf_source, "get_gguf_hf_weights_map", without)
    with pytest.raises(ValueError, match=r"got 1 missing: model\.layers\.0\.mlp\.up_proj\.weight"):
        convert_folder(path, tmp_path / "sparse", CONFIG)


def test_an_architecture_that_is_read_otherwise_is_refused(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gguf_source, "_reads_otherwise", lambda architecture: architecture == "llama")
    with pytest.raises(ValueError, match=r"must be of an architecture that can be read tensor by tensor, got llama"):
        convert_folder(path, tmp_path / "sparse", CONFIG)
    monkeypatch.undo()
    assert not gguf_source._reads_otherwise("llama")
