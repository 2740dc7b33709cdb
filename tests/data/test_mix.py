"""Several kinds of text in one training: shares, order, held-out parts, and what a mix refuses."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from lte.data.config import DataConfig, check_sources, cut_long_texts, read_documents
from lte.data.encoding import to_dataset
from lte.data.mix import read_mix
from lte.data.mixing import interleaved, load_mix
from lte.data.rows import LmDatasets, load_lm_datasets
from tests.data.text_samples import CHAT, write_jsonl

LENGTH = 16


def document(first: int, words: int = 20) -> str:
    return " ".join(f"w{first + i % 20}" for i in range(words))


@pytest.fixture
def mix(tmp_path: Path) -> Callable[..., str]:
    """Writes a mix of two texts, w0 to w19 and w100 to w119, and question and answer pairs from w200 on."""
    write_jsonl(tmp_path / "a.jsonl", [{"text": document(0)} for _ in range(40)])
    write_jsonl(tmp_path / "b.jsonl", [{"text": document(100, 20 + i)} for i in range(10)])
    write_jsonl(tmp_path / "held.jsonl", [{"text": document(0, 7)} for _ in range(5)])
    pairs = [{"question": f"w{200 + i}", "answer": f"w{220 + i} w{221 + i}"} for i in range(40)]
    write_jsonl(tmp_path / "qa.jsonl", pairs)
    write_jsonl(
        tmp_path / "chat.jsonl",
        [{"messages": [{"role": r, "content": c} for r, c in (*CHAT, ("user", f"w{i}"))]} for i in range(9)],
    )

    def write(**kinds: Any) -> str:
        whole = {
            "first": {"train": "a.jsonl", "validation": "held.jsonl", "weight": 3},
            "second": {"train": "b.jsonl"},
            "pairs": {"train": "qa.jsonl", "prompt_field": "question", "completion_field": "answer", "weight": 1},
        }
        path = tmp_path / "texts.yaml"
        path.write_text(yaml.safe_dump(kinds or whole, sort_keys=False))
        return str(path)

    return write


def load(path: str, tokenizer: Any, tokens: int = 320, **options: Any) -> LmDatasets:
    config = DataConfig(mix=path, mix_folder=str(Path(path).parent), max_train_tokens=tokens, sequence_length=LENGTH,
                        **{"label_prompts": True, **options})  # fmt: skip
    return load_mix(config, tokenizer, progress=False)


def kind_of(row: dict[str, torch.Tensor]) -> str:
    word = int(row["input_ids"].max()) - 7
    return "pairs" if word >= 200 else "second" if word >= 100 else "first"


def test_each_kind_has_its_share_everywhere_and_a_small_one_is_repeated(
    mix: Callable[..., str], tokenizer: Any
) -> None:
    found = load(mix(), tokenizer, tokens=800)
    kinds = [kind_of(row) for row in found.train]
    counts = {name: kinds.count(name) for name in ("first", "second", "pairs")}
    assert counts["first"] == 30
    # 160 tokens each; there are about 120 of the pairs, which come once more in part.
    assert counts["second"] == 10
    assert counts["pairs"] == pytest.approx(10, abs=1)
    for name, count in counts.items():
        assert kinds[: len(kinds) // 2].count(name) == pytest.approx(count / 2, abs=1)
    assert found.info["train"]["rows_of_kinds"] == counts
    assert found.info["train"]["rows"] == len(found.train)
    assert found.info["train"]["tokens"] == LENGTH * len(found.train)


def test_the_order_is_the_same_again_and_follows_the_seed(mix: Callable[..., str], tokenizer: Any) -> None:
    first, again, other = load(mix(), tokenizer), load(mix(), tokenizer), load(mix(), tokenizer, data_seed=1)
    assert first.info["train"]["rows_sha256"] == again.info["train"]["rows_sha256"]
    assert [row["input_ids"].tolist() for row in first.train] == [row["input_ids"].tolist() for row in again.train]
    assert [row["input_ids"].tolist() for row in first.train] != [row["input_ids"].tolist() for row in other.train]


def test_held_out_parts_are_kept_by_name_and_not_trained_on(mix: Callable[..., str], tokenizer: Any) -> None:
    found = load(mix(), tokenizer)
    assert list(found.kinds) == ["first", "second", "pairs"]
    assert sum(map(len, found.kinds.values())) == len(found.validation)
    assert {kind_of(row) for row in found.kinds["second"]} == {"second"}
    # Five documents of 7 words and a mark.
    assert found.info["kinds"]["first"]["validation"]["tokens"] == 40
    assert found.info["kinds"]["second"]["validation"]["documents"] == 1
    assert found.info["validation"]["documents"] == 5 + 1 + 2


def test_prompts_are_trained_on_like_text(mix: Callable[..., str], tokenizer: Any) -> None:
    config = DataConfig(train=str(Path(mix()).parent / "qa.jsonl"), prompt_field="question", completion_field="answer",
                        sequence_length=LENGTH, label_prompts=True)  # fmt: skip
    found = load_lm_datasets(config, tokenizer, progress=False)
    row = found.train[0]
    assert set(row) == {"input_ids", "labels"}
    assert torch.equal(row["input_ids"], row["labels"])
    assert row["input_ids"].tolist().count(tokenizer.eos_token_id) == 4
    chats = DataConfig(train=str(Path(mix()).parent / "chat.jsonl"), sequence_length=48, label_prompts=True)
    tokenizer.chat_template = tokenizer.chat_template.replace("END", "[EOS] END")
    text = tokenizer.decode(load_lm_datasets(chats, tokenizer, progress=False).train[0]["input_ids"])
    assert text.startswith("user : w1 [EOS] END assistant : w2 w3 [EOS] END user")
    # What the template writes after its last mark is left out: the token after it is that of another chat.
    assert text.count("[EOS] user : w1") == 1
    assert "END user : w1" not in text


def test_kinds_that_keep_documents_apart_go_with_those_that_do_not(mix: Callable[..., str], tokenizer: Any) -> None:
    found = load(mix(), tokenizer, label_prompts=False)
    for row in found.train:
        if kind_of(row) == "pairs":
            assert (row["position_ids"] == 0).sum() > 1
        else:
            assert row["position_ids"].tolist() == list(range(LENGTH))


def test_rows_are_spread_evenly() -> None:
    def table(value: int, rows: int) -> Any:
        ids = np.full(2 * rows, value, dtype=np.int32)
        return to_dataset({"input_ids": ids, "labels": ids}, np.arange(0, 2 * rows + 1, 2), "0" * 16)

    merged = interleaved([table(1, 6), table(2, 3), table(3, 1)])
    assert [int(row["input_ids"][0]) for row in merged] == [1, 2, 1, 1, 2, 3, 1, 1, 2, 1]


def test_python_library_is_sources_without_tests() -> None:
    documents = read_documents("python-library", DataConfig())
    assert any(text.startswith('"""') and "class Random" in text for text in documents)
    assert sum(map(len, documents)) > 5_000_000
    assert not any("unittest.main()" in text and "import test.support" in text for text in documents)


@pytest.mark.parametrize(
    ("kinds", "message"),
    [
        ({"a": {"train": "a.jsonl", "weight": 0}}, "weight must be a positive number, got weight=0 for a in"),
        ({"a": {"weight": 1}}, "train must be given for each kind of text of a mix, got none for a in"),
        ({"a b": {"train": "a.jsonl"}}, "names of a mix must be words like wikipedia"),
        ({"a": {"train": "a.jsonl", "sequence_length": 8}}, "key of a in .* must be one of train, validation"),
        ({"per_word": {"train": "a.jsonl"}}, "names of a mix must not be those of other metrics, got per_word in"),
        ({"before": {"train": "a.jsonl"}}, "names of a mix must not be those of other metrics, got before in"),
        ({"a": "a.jsonl"}, "mix must hold a mapping for each kind of text"),
    ],
)
def test_a_mix_that_cannot_be_is_refused(mix: Callable[..., str], kinds: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_mix(DataConfig(mix=mix(**kinds), max_train_tokens=1000))


def test_what_goes_with_a_mix_is_checked(mix: Callable[..., str]) -> None:
    path = mix()
    with pytest.raises(ValueError, match="max_train_tokens must be given with a mix"):
        read_mix(DataConfig(mix=path))
    with pytest.raises(ValueError, match="validation must be left out with a mix"):
        DataConfig(mix=path, validation="held.jsonl")
    with pytest.raises(ValueError, match=r"train must be left out with a mix, .* got train='a.jsonl'"):
        DataConfig(mix=path, train="a.jsonl")
    with pytest.raises(ValueError, match="matches nothing"):
        check_sources(DataConfig(mix=path, max_train_tokens=1000))
    check_sources(DataConfig(mix=path, mix_folder=str(Path(path).parent), max_train_tokens=1000))
    assert DataConfig(mix=path).task == "texts"


def test_what_is_measured_alone_needs_no_training_tokens(mix: Callable[..., str], tokenizer: Any) -> None:
    path = mix()
    config = DataConfig(mix=path, mix_folder=str(Path(path).parent), sequence_length=LENGTH, label_prompts=True)
    with pytest.raises(ValueError, match="max_train_tokens must be given with a mix"):
        check_sources(config)
    check_sources(config, trains=False)
    found = load_mix(config, tokenizer, progress=False, trains=False)
    trained = load(path, tokenizer)
    assert found.info["validation"] == trained.info["validation"]
    assert len(found.train) < len(trained.train)


def test_the_announcement_tells_shares_of_the_tokens(mix: Callable[..., str], tokenizer: Any) -> None:
    lines = load(mix(), tokenizer).announcements
    assert [line.partition(":")[0] for line in lines] == [
        "first, 60% of the tokens",
        "second, 20% of the tokens",
        "pairs, 20% of the tokens",
    ]


def test_long_texts_are_cut_where_words_end_and_nothing_is_lost(tmp_path: Path, tokenizer: Any) -> None:
    text, short = " ".join(f"w{i}" for i in range(250)), "w1 w2"
    config = DataConfig(piece_chars=100)
    pieces = cut_long_texts([text, short, "x" * 250], config)
    assert "".join(pieces[:-4]) == text
    assert all(piece.endswith(" ") for piece in pieces[: -4 - 1])
    assert max(map(len, pieces)) <= 101
    assert pieces[-4] == short
    assert "".join(pieces[-3:]) == "x" * 250
    assert cut_long_texts([text], DataConfig()) == [text]
    path = write_jsonl(tmp_path / "books.jsonl", [{"text": text}, {"text": text.replace("w1", "w2")}])
    options = {"train": path, "validation_fraction": 0.5, "sequence_length": 8}
    whole = load_lm_datasets(DataConfig(**options), tokenizer, progress=False)
    cut = load_lm_datasets(DataConfig(**options, piece_chars=40), tokenizer, progress=False)
    assert whole.info["train"]["documents"] == 1
    assert cut.info["train"]["documents"] > 20
    assert cut.train[0]["input_ids"].tolist() != whole.train[0]["input_ids"].tolist()
    with pytest.raises(ValueError, match="piece_chars must be at least 1"):
        DataConfig(piece_chars=0)
