"""A GGUF file gives the model and the tokenizer that it holds, or is refused in a sentence that names it."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast

import lte.hf.gguf
from lte.data.tasks import get_task
from lte.data.tasks.models import load_task_model
from lte.eval.models import load_config
from lte.hf.dense import load_dense_model, load_tokenizer
from lte.hf.gguf import read_gguf
from tests.hf.gguf_files import SPECIAL, logits_of, tiny_llama, train_sentencepiece, train_tokenizer, write_gguf

TOKENS = torch.arange(10, 58)[None]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer()


@pytest.fixture
def model(tokenizer: Tokenizer) -> LlamaForCausalLM:
    return tiny_llama(tokenizer.get_vocab_size())


@pytest.fixture
def path(tmp_path: Path, model: LlamaForCausalLM, tokenizer: Tokenizer) -> Path:
    return write_gguf(tmp_path / "model.gguf", model, tokenizer)


@pytest.mark.parametrize("name", ["model.gguf", "MODEL.GGUF", "no-ending"])
def test_a_file_gives_its_model_whatever_its_name(path: Path, model: LlamaForCausalLM, name: str) -> None:
    path = path.rename(path.with_name(name))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        loaded = load_dense_model(path)
    torch.testing.assert_close(logits_of(loaded, TOKENS), logits_of(model, TOKENS))
    assert load_config(str(path)).vocab_size == model.config.vocab_size
    assert load_tokenizer(path)("upon a time")["input_ids"]


def test_metadata_are_read_anew_only_when_the_file_changes(
    path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = []
    reader = gguf.GGUFReader
    monkeypatch.setattr(gguf, "GGUFReader", lambda *args, **kwargs: read.append(args) or reader(*args, **kwargs))
    config, words = load_config(str(path)), load_tokenizer(path)
    count = len(read)
    assert count > 0
    config.vocab_size = 1
    words.chat_template = "another"
    assert load_config(str(path)).vocab_size == tokenizer.get_vocab_size()
    assert load_tokenizer(path).chat_template is None
    assert len(read) == count
    write_gguf(path, tiny_llama(tokenizer.get_vocab_size(), max_position_embeddings=96), tokenizer)
    assert load_config(str(path)).max_position_embeddings == 96
    assert len(read) > count


def test_a_classifier_starts_from_a_file(path: Path, model: LlamaForCausalLM) -> None:
    loaded = load_task_model(path, get_task("sst2"), load_tokenizer(path))
    assert loaded.config.num_labels == 2
    assert torch.equal(loaded.model.layers[1].mlp.up_proj.weight, model.model.layers[1].mlp.up_proj.weight)


@pytest.mark.parametrize("part", [0, 6, 30, 500, 0.3, -1])
def test_a_file_cut_short_is_refused(path: Path, part: float) -> None:
    data = path.read_bytes()
    end = int(part * len(data)) if isinstance(part, float) else part
    path.write_bytes(data[:end])
    for load in (load_dense_model, load_tokenizer, lambda name: load_config(str(name))):
        with pytest.raises(ValueError, match=rf"{path}.*(whole GGUF file|does not begin with|version=)"):
            load(path)


@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        ({"split.count": 3}, r"must hold the whole model, got one of 3 parts; join them"),
        ({"general.type": "adapter"}, r"must hold a model, got general.type=adapter"),
        ({"tokenizer.ggml.eos_token_id": 9999}, r"must name one of its \d+ tokens, got eos_token_id=9999"),
        ({"tokenizer.ggml.tokens": None}, r"must hold a tokenizer"),
    ],
)
def test_a_file_that_is_no_whole_model_is_refused(
    tmp_path: Path, model: LlamaForCausalLM, tokenizer: Tokenizer, metadata: dict[str, Any], words: str
) -> None:
    path = write_gguf(tmp_path / "model.gguf", model, tokenizer, metadata)
    with pytest.raises(ValueError, match=rf"{path} {words}"):
        load_tokenizer(path)


def test_files_of_other_kinds_are_refused(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[:4] + b"\0\0\0\3" + data[8:])
    with pytest.raises(ValueError, match=r"must be a little-endian GGUF file of version 2 or 3"):
        load_dense_model(path)
    place = data.index(b"blk.1.ffn_up.weight") + len(b"blk.1.ffn_up.weight") + 4 + 2 * 8
    path.write_bytes(data[:place] + b"\x63\0\0\0" + data[place + 4 :])
    with pytest.raises(ValueError, match=r"de-quantise, got blk.1.ffn_up.weight of type 99"):
        load_dense_model(path)
    path.write_bytes(data.replace(b"llama", b"lamma"))
    with pytest.raises(ValueError, match=r"must hold a model that transformers can read, got lamma"):
        load_dense_model(path)


def test_special_tokens_are_those_of_the_metadata(
    tmp_path: Path, model: LlamaForCausalLM, tokenizer: Tokenizer
) -> None:
    template = "{% for message in messages %}<|user|>{{ message.content }}</s>{% endfor %}"
    metadata = {
        "tokenizer.ggml.eos_token_id": 3,
        "tokenizer.ggml.padding_token_id": 2,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.chat_template": template,
    }
    found = load_tokenizer(write_gguf(tmp_path / "model.gguf", model, tokenizer, metadata))
    assert (found.bos_token_id, found.eos_token_id, found.pad_token_id, found.unk_token_id) == (1, 3, 2, 0)
    plain = tokenizer.encode(" the little house").ids
    assert found(" the little house")["input_ids"] == [1, *plain]
    chat = found.apply_chat_template([{"role": "user", "content": " the little house"}], tokenize=False)
    assert found(chat, add_special_tokens=False)["input_ids"] == [3, *plain, 2]
    found.save_pretrained(tmp_path / "saved")
    assert AutoTokenizer.from_pretrained(tmp_path / "saved")(chat)["input_ids"] == found(chat)["input_ids"]


def test_special_tokens_of_letters_that_are_no_bytes(
    tmp_path: Path, model: LlamaForCausalLM, tokenizer: Tokenizer
) -> None:
    bar = "\N{FULLWIDTH VERTICAL LINE}"
    names = {1: f"<{bar}begin▁of▁sentence{bar}>", 2: f"<{bar}end▁of▁sentence{bar}>"}
    tokens = [names.get(index, tokenizer.id_to_token(index)) for index in range(tokenizer.get_vocab_size())]
    metadata = {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.add_bos_token": True}
    found = load_tokenizer(write_gguf(tmp_path / "model.gguf", model, tokenizer, metadata))
    assert len(found) == len(tokens)
    plain = tokenizer.encode(" the little house").ids
    assert found(f" the little house{names[2]}")["input_ids"] == [1, *plain, 2]


@pytest.mark.parametrize(("pre", "begins"), [("gpt-2", False), ("llama-bpe", True)])
def test_texts_begin_as_llama_cpp_has_it_where_the_file_is_silent(
    tmp_path: Path, model: LlamaForCausalLM, tokenizer: Tokenizer, pre: str, begins: bool
) -> None:
    path = write_gguf(tmp_path / "model.gguf", model, tokenizer, {"tokenizer.ggml.pre": pre})
    assert (load_tokenizer(path)("the house")["input_ids"][0] == 1) == begins


@pytest.mark.parametrize("prefix", [None, True, False])
def test_a_vocabulary_with_scores_is_read_with_its_prefix(tmp_path: Path, prefix: bool | None) -> None:
    tokenizer, metadata = train_sentencepiece()
    metadata["tokenizer.ggml.add_space_prefix"] = prefix
    path = write_gguf(tmp_path / "model.gguf", tiny_llama(tokenizer.get_vocab_size()), tokenizer, metadata)
    load_dense_model(path)
    found = load_tokenizer(path)
    first, *others = found.convert_ids_to_tokens(found("the little house")["input_ids"])
    assert first == "<s>"
    assert others == (["the", "▁little", "▁house"] if prefix is False else ["▁the", "▁little", "▁house"])
    assert found.decode(found("the sea: \N{SNOWMAN}")["input_ids"], skip_special_tokens=True) == "the sea: \N{SNOWMAN}"
    found.save_pretrained(tmp_path / "saved")
    saved = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert saved("the little house")["input_ids"] == found("the little house")["input_ids"]


def test_merges_that_do_not_make_the_vocabulary_are_refused(
    tmp_path: Path, model: LlamaForCausalLM, tokenizer: Tokenizer
) -> None:
    merges = [" ".join(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]]
    path = write_gguf(tmp_path / "few.gguf", model, tokenizer, {"tokenizer.ggml.merges": merges[:20]})
    with pytest.raises(ValueError, match=r"finds the words of its vocabulary, got one that misses \d+ of \d+: '"):
        load_tokenizer(path)
    path = write_gguf(tmp_path / "other.gguf", model, tokenizer, {"tokenizer.ggml.merges": ["qq qq"]})
    with pytest.raises(ValueError, match=r"other.gguf must hold a tokenizer that transformers can build"):
        load_tokenizer(path)


def build_instead(monkeypatch: pytest.MonkeyPatch, tokenizer: Tokenizer) -> None:
    """Lets transformers build a tokenizer that is not the file's."""
    built = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    monkeypatch.setattr(lte.hf.gguf.AutoTokenizer, "from_pretrained", lambda *_, **__: built)


def test_another_way_of_cutting_text_is_refused(
    path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    # No word gets its space, so that most of the vocabulary is never used.
    cut = Tokenizer.from_str(tokenizer.to_str())
    spaces = pre_tokenizers.Split(" ", "isolated")
    cut.pre_tokenizer = pre_tokenizers.Sequence([spaces, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    build_instead(monkeypatch, cut)
    with pytest.raises(ValueError, match=r"finds the words of its vocabulary.*take transformers 5.18 or newer"):
        load_tokenizer(path)


def test_a_vocabulary_cut_without_its_spaces_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, metadata = train_sentencepiece()
    path = write_gguf(tmp_path / "model.gguf", tiny_llama(tokenizer.get_vocab_size()), tokenizer, metadata)
    # Merges in the order of the vocabulary's letters, not of its scores, as if the scores were not there.
    parts = json.loads(tokenizer.to_str())
    parts["model"]["merges"] = sorted(parts["model"]["merges"], key=lambda pair: pair[::-1])[: 2 * 30]
    build_instead(monkeypatch, Tokenizer.from_str(json.dumps(parts)))
    with pytest.raises(ValueError, match=r"finds the words of its vocabulary"):
        load_tokenizer(path)


def test_text_that_does_not_come_back_is_refused(
    path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    bare = Tokenizer.from_str(tokenizer.to_str())
    bare.decoder = None
    build_instead(monkeypatch, bare)
    with pytest.raises(ValueError, match=r"gives text back, got .*Once upon"):
        load_tokenizer(path)


def test_tokens_without_an_embedding_go(path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    more = Tokenizer.from_str(tokenizer.to_str())
    more.add_special_tokens(["<PRE>", "<SUF>"])
    build_instead(monkeypatch, more)
    found = load_tokenizer(path)
    assert len(found) == tokenizer.get_vocab_size()
    assert max(found("<PRE> the house")["input_ids"]) < tokenizer.get_vocab_size()


@pytest.mark.parametrize(
    ("count", "words"),
    [(9999, r"a tokenizer of \d+ tokens, got 9999"), (99, r"its special tokens, got None for '<s>'")],
)
def test_another_vocabulary_is_refused(path: Path, monkeypatch: pytest.MonkeyPatch, count: int, words: str) -> None:
    build_instead(monkeypatch, Tokenizer(models.BPE({f"t{index}": index for index in range(count)}, [])))
    with pytest.raises(ValueError, match=words):
        load_tokenizer(path)


def test_more_tokens_than_embeddings_are_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = write_gguf(tmp_path / "model.gguf", tiny_llama(100), tokenizer)
    with pytest.raises(ValueError, match=r"must have an embedding for each of its \d+ tokens, got 100"):
        load_dense_model(path)


def test_a_model_is_held_to_all_numbers_of_its_file(
    tmp_path: Path, model: LlamaForCausalLM, tokenizer: Tokenizer
) -> None:
    bias = {"blk.0.attn_q.bias": np.ones(64, dtype=np.float32)}
    path = write_gguf(tmp_path / "more.gguf", model, tokenizer, tensors=bias)
    with pytest.raises(ValueError, match=r"must hold the numbers that a LlamaForCausalLM has"):
        load_dense_model(path)
    model.model.layers[1].mlp.up_proj = None
    path = write_gguf(tmp_path / "less.gguf", model, tokenizer)
    with pytest.raises(ValueError, match=r"must hold all weights .* 1 missing: model.layers.1.mlp.up_proj.weight"):
        load_dense_model(path)


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


@pytest.mark.parametrize(
    ("scaling", "said"),
    [
        ({"rope_type": "linear", "factor": 4.0}, {"type": "linear", "factor": 4.0}),
        (YARN, {"type": "yarn", "factor": 4.0, "original_context_length": 16}),
        ({"rope_type": "llama3", **LLAMA3}, None),
    ],
)
def test_rotary_scaling_is_kept(
    tmp_path: Path, tokenizer: Tokenizer, scaling: dict[str, Any], said: dict[str, Any] | None
) -> None:
    rope = {"rope_theta": 10000.0}
    wanted = tiny_llama(tokenizer.get_vocab_size(), rope_parameters={**rope, **scaling})
    metadata = {f"llama.rope.scaling.{key}": value for key, value in (said or {}).items()}
    plain = 10000.0 ** (-np.arange(0, 16, 2) / 16)
    divisors = plain / wanted.model.rotary_emb.inv_freq.numpy()
    tensors = {} if said else {"rope_freqs.weight": divisors.astype(np.float32)}
    loaded: Any = load_dense_model(write_gguf(tmp_path / "model.gguf", wanted, tokenizer, metadata, tensors))
    rotary = loaded.model.rotary_emb
    assert not np.allclose(divisors, 1)
    torch.testing.assert_close(rotary.inv_freq, wanted.model.rotary_emb.inv_freq, rtol=1e-4, atol=0)
    assert rotary.attention_scaling == wanted.model.rotary_emb.attention_scaling
    torch.testing.assert_close(logits_of(loaded, TOKENS), logits_of(wanted, TOKENS), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", ["factors", "longrope"])
def test_rotary_scaling_of_other_kinds_is_refused(
    tmp_path: Path, model: LlamaForCausalLM, tokenizer: Tokenizer, kind: str
) -> None:
    metadata = {"llama.rope.scaling.type": kind} if kind == "longrope" else {}
    tensors = {"rope_freqs.weight": np.linspace(1, 5, 8, dtype=np.float32)} if kind == "factors" else {}
    path = write_gguf(tmp_path / "model.gguf", model, tokenizer, metadata, tensors)
    with pytest.raises(ValueError, match=rf"rotary scaling of the kinds linear, yarn or llama3, got .*{kind}"):
        load_dense_model(path)


@pytest.mark.parametrize("layers", [34, 62])
def test_gemma_3_scales_its_full_attention(tmp_path: Path, layers: int) -> None:
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, "gemma3")
    writer.add_block_count(layers)
    writer.add_embedding_length(672)
    writer.add_head_count(4)
    writer.add_head_count_kv(1)
    writer.add_key_length(256)
    writer.add_rope_freq_base(1e6)
    writer.add_sliding_window(512)
    writer.add_vocab_size(99)
    writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
    writer.add_rope_scaling_factor(8.0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    config = load_config(str(path))
    assert config.rope_parameters["full_attention"] == {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0}
    assert config.rope_parameters["sliding_attention"] == {"rope_type": "default", "rope_theta": 1e4}
    # Google's configs: 168 for 27B parameters, the width of a head for the smaller ones.
    assert config.query_pre_attn_scalar == (168 if layers == 62 else 256)


def trained(tokenizer: Tokenizer) -> LlamaForCausalLM:
    """A model that knows the plain sentences by heart."""
    torch.manual_seed(0)
    model = tiny_llama(tokenizer.get_vocab_size(), max_position_embeddings=256)
    rows = [torch.tensor([tokenizer.encode(sentence).ids]) for sentence in lte.hf.gguf._SENTENCES]
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(40):
        for row in rows:
            model(input_ids=row, labels=row).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def test_weights_must_belong_to_the_tokenizer(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = trained(tokenizer)
    monkeypatch.setattr(lte.hf.gguf, "_MIN_PARAMETERS", 0)
    load_dense_model(write_gguf(tmp_path / "right.gguf", model, tokenizer))

    weight = model.get_input_embeddings().weight
    with torch.no_grad():
        weight[len(SPECIAL) :] = weight[len(SPECIAL) :].flip(0)
    path = write_gguf(tmp_path / "other.gguf", model, tokenizer)
    with pytest.raises(ValueError, match=r"other.gguf must give a model that predicts plain text, got a loss of"):
        load_dense_model(path)
    monkeypatch.undo()
    with pytest.warns(UserWarning, match=r"do not belong together"):
        load_dense_model(path)


def test_a_model_of_no_numbers_is_refused(
    tmp_path: Path, model: LlamaForCausalLM, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lte.hf.gguf, "_MIN_PARAMETERS", 0)
    with torch.no_grad():
        model.model.norm.weight.fill_(torch.nan)
    with pytest.raises(ValueError, match=r"must hold finite weights"):
        load_dense_model(write_gguf(tmp_path / "model.gguf", model, tokenizer))


def test_a_file_without_a_tokenizer_is_a_model_all_the_same(
    tmp_path: Path, model: LlamaForCausalLM, tokenizer: Tokenizer
) -> None:
    bare = dict.fromkeys((f"tokenizer.ggml.{key}" for key in ("model", "pre", "tokens", "token_type", "merges")), None)
    path = write_gguf(tmp_path / "model.gguf", model, tokenizer, bare)
    assert "tokenizer.ggml.tokens" not in read_gguf(path).metadata
    torch.testing.assert_close(logits_of(load_dense_model(path), TOKENS), logits_of(model, TOKENS))
