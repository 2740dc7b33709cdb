"""Reading, splitting, packing and masking text."""

from __future__ import annotations

import gzip
import json
import lzma
from itertools import chain
from pathlib import Path
from typing import Any

import datasets
import pandas
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from lte.train import encoding
from lte.train.data import (
    DataConfig,
    LmCollator,
    TokenRows,
    calibration_batches,
    check_sequence_length,
    load_lm_datasets,
    read_documents,
    token_mask,
)
from tests.tiny_models import tiny_sparse_model

TURN = "{{ m.role }} : {{ m.content }} END "
TEMPLATE = f"{{% for m in messages %}}{TURN}{{% endfor %}}{{% if add_generation_prompt %}}assistant : {{% endif %}}"
TAGGED = (
    "{% for m in messages %}{{ m.role }} : {% if m.role == 'assistant' %}{% generation %}{{ m.content }} END "
    "{% endgeneration %}{% else %}{{ m.content }} END {% endif %}{% endfor %}"
)
# Turns before the last are written differently, as reasoning models do.
UNSTABLE = "{% for m in messages %}{{ m.role }} : {{ '' if loop.last else 'w9 ' }}{{ m.content }} END {% endfor %}"
DOCUMENTS = [f"w{i} w{i + 1} w{i + 2} w{i + 3} w{i + 4}" for i in range(0, 200, 5)]
CHAT = [("user", "w1"), ("assistant", "w2 w3"), ("user", "w4"), ("assistant", "w5")]


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    """A word is a token; w<i> has the id i + 7."""
    words = ["[UNK]", "[EOS]", "[BOS]", "user", "assistant", ":", "END", *(f"w{i}" for i in range(300))]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="[EOS]", unk_token="[UNK]")
    wrapped.chat_template = TEMPLATE
    return wrapped


@pytest.fixture(scope="module")
def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE that starts every text with [BOS], as Llama 3 does."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=["[EOS]", "[BOS]"], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(read_documents("pydoc-topics", DataConfig())[:5], trainer)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.TemplateProcessing(single="[BOS] $A", special_tokens=[("[BOS]", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="[EOS]", bos_token="[BOS]")


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return str(path)


@pytest.fixture
def jsonl(tmp_path: Path) -> str:
    return write_jsonl(tmp_path / "texts.jsonl", [{"text": text} for text in DOCUMENTS])


@pytest.fixture
def pairs(tmp_path: Path) -> str:
    rows = [
        {"prompt": f"w{i} w{i + 1}", "completion": " ".join(f"w{i + j}" for j in range(i % 5 + 1))} for i in range(40)
    ]
    return write_jsonl(tmp_path / "pairs.jsonl", rows)


@pytest.fixture
def chats(tmp_path: Path) -> str:
    messages = [{"role": role, "content": content} for role, content in CHAT]
    rows = [{"messages": [*messages, {"role": "user", "content": f"w{i}"}]} for i in range(100, 104)]
    return write_jsonl(tmp_path / "chats.jsonl", rows)


def load(tokenizer: Any, **options: Any) -> Any:
    return load_lm_datasets(DataConfig(**options), tokenizer, progress=False)


def labelled(rows: Any) -> list[int]:
    return [token for row in rows for token in row["labels"].tolist() if token != -100]


class TestReading:
    @pytest.mark.parametrize("ending", ["jsonl", "json", "csv", "parquet", "txt", "jsonl.gz", "txt.xz"])
    def test_every_format_gives_the_same_documents(self, tmp_path, ending):
        path, table = tmp_path / f"texts.{ending}", pandas.DataFrame({"text": DOCUMENTS})
        if ending == "csv":
            table.to_csv(path, index=False)
        elif ending == "parquet":
            table.to_parquet(path)
        else:
            opener: Any = {".gz": gzip.open, ".xz": lzma.open}.get(path.suffix, open)
            with opener(path, "wt") as file:
                if ending == "json":
                    json.dump([{"text": text} for text in DOCUMENTS], file)
                else:
                    texts = DOCUMENTS if "txt" in ending else [json.dumps({"text": text}) for text in DOCUMENTS]
                    file.write("\n".join(texts))
        assert read_documents(str(path), DataConfig()) == (["\n".join(DOCUMENTS)] if "txt" in ending else DOCUMENTS)

    def test_lists_globs_and_mixed_formats(self, tmp_path, jsonl):
        for name in ("b", "a"):
            (tmp_path / f"{name} [1].txt").write_text(name)
        assert read_documents([str(tmp_path / "b [1].txt"), str(tmp_path / "a*")], DataConfig()) == ["b", "a"]
        assert read_documents(str(tmp_path / "*"), DataConfig()) == ["a", "b", *DOCUMENTS]

    def test_csv_keeps_texts_that_look_like_missing_values(self, tmp_path):
        (tmp_path / "x.csv").write_text("text\nNone\n\nNA\nsome words\n")
        assert read_documents(str(tmp_path / "x.csv"), DataConfig()) == ["None", "NA", "some words"]

    def test_the_built_in_text_needs_no_file(self):
        documents = read_documents("pydoc-topics", DataConfig())
        assert len(documents) > 50
        assert sum(map(len, documents)) > 300_000

    def test_hub_names_go_through_datasets(self, monkeypatch, tokenizer):
        seen = []

        def fake(*args: Any, **kwargs: Any) -> Any:
            seen.append((args, kwargs["split"]))
            return datasets.Dataset.from_dict({"text": DOCUMENTS if kwargs["split"] == "train[:10]" else ["w200 w201"]})

        monkeypatch.setattr(datasets, "load_dataset", fake)
        options = {"train": "owner/name-1.0", "validation": "owner/name-1.0", "name": "subset", "split": "train[:10]"}
        found = load(tokenizer, sequence_length=8, **options)
        assert seen == [(("owner/name-1.0", "subset"), split) for split in ("train[:10]", "validation")]
        assert tokenizer.decode(labelled(found.validation)) == "w200 w201 [EOS]"

    def test_an_unreachable_hub_name_is_a_clear_error(self, monkeypatch):
        def fail(*args: Any, **kwargs: Any) -> Any:
            raise ConnectionError("no network")

        monkeypatch.setattr(datasets, "load_dataset", fail)
        with pytest.raises(
            ValueError, match=r"got pydoc-topic, .* near it are pydoc-topics.* from the hub .*no network"
        ):
            read_documents("pydoc-topic", DataConfig())


class TestSplitting:
    def test_no_held_out_document_is_trained_on(self, tmp_path, tokenizer):
        # Every document is there twice: a copy of a held-out one must go, too.
        path = write_jsonl(tmp_path / "twice.jsonl", [{"text": text} for text in DOCUMENTS * 2])
        found = load(tokenizer, train=path, sequence_length=16, validation_fraction=0.25)
        held_out = {token for token in labelled(found.validation) if token > 6}
        assert held_out
        assert not held_out & set(labelled(found.train))
        info = found.info
        assert info["train"]["documents"] + info["validation"]["documents"] + info["copies_removed"] == 80

    def test_a_single_text_is_cut_between_words_near_its_end(self, tmp_path, tokenizer):
        (tmp_path / "one.txt").write_text(" ".join(f"w{i}" for i in range(200)))
        found = load(tokenizer, train=str(tmp_path / "one.txt"), sequence_length=8, validation_fraction=0.1)
        train, held_out = labelled(found.train), labelled(found.validation)
        assert train == list(range(7, 7 + len(train)))
        # What is between them is the partial row that training drops, up to the word at the cut.
        assert held_out == [*range(held_out[0], 207), 1]
        assert train[-1] + found.info["train"]["dropped_tokens"] == held_out[0]

    def test_shared_held_out_files_are_warned_of(self, jsonl, tokenizer):
        with pytest.warns(UserWarning, match="40 of 40 held-out documents are also in the training data"):
            load(tokenizer, train=jsonl, validation=jsonl, sequence_length=16)


class TestText:
    def test_every_held_out_token_is_in_one_row_and_training_drops_less_than_a_row(self, jsonl, tokenizer):
        found = load(tokenizer, train=jsonl, sequence_length=16, validation_fraction=0.25)
        train, held_out = found.info["train"], found.info["validation"]
        # Five words and the end-of-text token each.
        assert (train["tokens"], train["dropped_tokens"]) == (30 * 6 // 16 * 16, 30 * 6 % 16)
        assert len(labelled(found.train)) == train["tokens"]
        assert (len(labelled(found.validation)), held_out["tokens"], held_out["rows"]) == (60, 60, 4)
        words = [token - 7 for token in labelled(found.validation) if token != 1]
        assert words == sorted(set(words))
        assert {len(row["input_ids"]) for part in (found.train, found.validation) for row in part} == {16}
        assert found.validation[3]["labels"].tolist()[12:] == [-100] * 4

    def test_without_packing_documents_have_rows_of_their_own(self, jsonl, tokenizer):
        found = load(tokenizer, train=jsonl, sequence_length=4, pack=False)
        assert sorted({len(row["input_ids"]) for row in found.train}) == [2, 4]
        assert len(labelled(found.train)) == found.info["train"]["tokens"] == 38 * 6

    def test_the_same_settings_give_the_same_rows(self, jsonl, tokenizer):
        first, second = (load(tokenizer, train=jsonl, sequence_length=16) for _ in range(2))
        assert labelled(first.train) == labelled(second.train)
        assert first.info == second.info
        other = load(tokenizer, train=jsonl, sequence_length=16, data_seed=1)
        assert first.info["train"]["rows_sha256"] != other.info["train"]["rows_sha256"]

    def test_token_limits_hold(self, jsonl, tokenizer):
        limits = {"max_train_tokens": 40, "max_validation_tokens": 17, "validation_fraction": 0.5}
        found = load(tokenizer, train=jsonl, sequence_length=16, **limits)
        assert (len(labelled(found.train)), len(labelled(found.validation))) == (32, 17)
        assert found.info["train"]["dropped_tokens"] == 8

    def test_pieces_and_batches_of_long_documents_change_nothing(self, monkeypatch, byte_tokenizer):
        topics = read_documents("pydoc-topics", DataConfig())[:12]
        monkeypatch.setattr(encoding, "PIECE_CHARS", 2000)
        monkeypatch.setattr(encoding, "BATCH_CHARS", 5000)
        encoder = encoding.Encoder(DataConfig(), byte_tokenizer, progress=False)
        found = [ids.tolist() for ids, _ in encoder._text(topics, None, "train")]
        assert max(map(len, topics)) > 10_000
        assert found == [[*byte_tokenizer(topic)["input_ids"], 0] for topic in topics]
        assert all(ids[0] == 1 for ids in found)
        capped = [ids.tolist() for ids, _ in encoder._text(topics, 1000, "train")]
        assert list(chain(*capped)) == list(chain(*found))[:1000]


class TestCompletions:
    def test_only_completions_have_labels(self, pairs, tokenizer):
        row = load(tokenizer, train=pairs, kind="completion", pack=False, data_seed=3).train[0]
        prompt = tokenizer.decode(row["input_ids"][:2])
        start = int(prompt.split()[0][1:])
        completion = " ".join(f"w{start + j}" for j in range(start % 5 + 1))
        assert prompt == f"w{start} w{start + 1}"
        assert tokenizer.decode(row["input_ids"][2:]) == f"{completion} [EOS]"
        assert row["labels"].tolist() == [-100, -100, *row["input_ids"].tolist()[2:]]

    def test_packing_keeps_labels_and_restarts_positions(self, pairs, tokenizer):
        options = {"train": pairs, "kind": "completion", "sequence_length": 16}
        packed, single = load(tokenizer, **options), load(tokenizer, pack=False, **options)
        assert labelled(packed.train) == labelled(single.train)
        assert packed.info["train"]["tokens"] == single.info["train"]["tokens"]
        assert len(packed.train) < len(single.train) / 2
        for row in packed.train:
            starts = (row["position_ids"] == 0).nonzero().flatten().tolist()
            assert len(row["input_ids"]) <= 16
            assert row["labels"][starts].eq(-100).all()
            parts = [row["position_ids"][a:b].tolist() for a, b in zip(starts, [*starts[1:], None], strict=True)]
            assert all(part == list(range(len(part))) for part in parts)

    @pytest.mark.filterwarnings("ignore:truncated documents in the validation")
    def test_long_prompts_lose_their_beginning_but_not_the_begin_of_text_token(self, tmp_path, byte_tokenizer):
        rows = [{"prompt": "p" * 50 + str(i), "completion": "yes"} for i in range(10, 14)]
        path = write_jsonl(tmp_path / "long.jsonl", rows)
        with pytest.warns(UserWarning, match="truncated documents in the train data: 3 of 3"):
            found = load(byte_tokenizer, train=path, kind="completion", sequence_length=16, pack=False)
        row = found.train[0]
        text = byte_tokenizer.decode(row["input_ids"])
        assert len(row["input_ids"]) == 16
        assert row["input_ids"][0] == 1
        assert text.endswith("yes[EOS]")
        assert text.split("yes")[0][-2:] in {"10", "11", "12", "13"}

    def test_packed_documents_do_not_see_each_other(self, pairs, tokenizer, model_type):
        rows = list(load(tokenizer, train=pairs, kind="completion", sequence_length=16).train)[:4]
        for row in rows:
            row["input_ids"] = row["input_ids"] % 90
        batch = LmCollator(0)(rows)
        model = tiny_sparse_model(model_type)
        with torch.no_grad():
            packed = model(batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
            for row, logits in zip(rows, packed, strict=True):
                starts = (row["position_ids"] == 0).nonzero().flatten().tolist()
                for start, end in zip(starts, [*starts[1:], len(row["input_ids"])], strict=True):
                    alone = model(row["input_ids"][None, start:end], use_cache=False).logits[0]
                    torch.testing.assert_close(logits[start:end], alone, rtol=1e-4, atol=1e-4)


class TestChats:
    @pytest.mark.parametrize("template", [TEMPLATE, TAGGED])
    def test_only_what_the_assistant_says_has_labels(self, chats, tokenizer, template):
        tokenizer.chat_template = template
        row = load(tokenizer, train=chats, kind="chat", pack=False).train[0]
        assert tokenizer.decode(row["labels"][row["labels"] >= 0]) == "w2 w3 END w5 END"
        text = tokenizer.decode(row["input_ids"])
        assert text.startswith("user : w1 END assistant : w2 w3 END user : w4 END assistant : w5 END user : w10")

    def test_chats_without_an_answer_are_left_out(self, tmp_path, tokenizer):
        chats = [
            [{"role": r, "content": c} for r, c in CHAT[: 1 + i % 2]] + [{"role": "user", "content": f"w{i}"}]
            for i in range(8)
        ]
        path = write_jsonl(tmp_path / "chats.jsonl", [{"messages": chat} for chat in chats])
        with pytest.warns(UserWarning, match="unlabelled documents in the train data"):
            found = load(tokenizer, train=path, kind="chat", data_seed=1)
        assert set(labelled(found.train)) == {9, 10, 6}
        assert found.info["train"]["unlabelled_documents"] >= 3

    def test_templates_that_cannot_serve_are_clear_errors(self, chats, tokenizer):
        tokenizer.chat_template = UNSTABLE
        with pytest.raises(ValueError, match=r"changes turn 2 of 5; mark .* \{% generation %\}"):
            load(tokenizer, train=chats, kind="chat")
        tokenizer.chat_template = None
        with pytest.raises(ValueError, match="tokenizer must have a chat template for kind=chat"):
            load(tokenizer, train=chats, kind="chat")

    def test_messages_of_another_form_are_a_clear_error(self, tmp_path, tokenizer):
        rows = [{"messages": [{"from": "human", "value": f"w{i}"}]} for i in range(4)]
        with pytest.raises(ValueError, match="messages with role and content, got one with from, value"):
            load(tokenizer, train=write_jsonl(tmp_path / "share.jsonl", rows), kind="chat")


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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train": "{dir}/text.jsonl"}, "matches nothing; near it are texts.jsonl"),
        ({"train": "{dir}"}, r"got the folder .*; try .*/\*.jsonl"),
        (
            {"train": "{dir}/texts.jsonl", "text_field": "body"},
            "field 'body' .* fields text; .* probably text_field=text",
        ),
        ({"train": "{dir}/texts.jsonl", "kind": "chat"}, "field 'messages' for kind=chat, got the fields text"),
        ({"train": "{dir}/numbers.jsonl"}, "the field 'text' must hold text"),
        ({"train": "{dir}/texts.jsonl", "sequence_length": 4096}, "train data must fill at least one row"),
        ({"train": "{dir}/blank.jsonl"}, "at least one document"),
        ({"train": "{dir}/empty.jsonl"}, "got the empty file"),
        ({"train": "{dir}/broken.jsonl"}, "must be readable as jsonl, got .*broken.jsonl: JSON parse error"),
        ({"train": "{dir}/odd.xyz"}, "format must be given for files that end in .xyz"),
        ({"train": "{dir}/short.txt"}, "validation_fraction must leave text on both sides"),
        ({"train": "{dir}/same.jsonl"}, "at least two different documents"),
        ({"train": "pydoc", "format": "builtin"}, "must be one of pydoc-topics"),
        ({"train": "pydoc-topics", "kind": "chat"}, "kind must be text for the built-in pydoc-topics"),
    ],
)
def test_bad_data_is_a_clear_error(tmp_path, jsonl, tokenizer, options, message):
    contents = {
        "blank.jsonl": '{"text": " "}',
        "empty.jsonl": "",
        "broken.jsonl": '{"text": "a"}\n{"text": ',
        "odd.xyz": "a",
    }
    contents |= {"short.txt": "a", "same.jsonl": '{"text": "a"}\n' * 4, "numbers.jsonl": '{"text": 3}'}
    for name, content in contents.items():
        (tmp_path / name).write_text(content)
    options = {k: v.format(dir=tmp_path) if isinstance(v, str) else v for k, v in options.items()}
    with pytest.raises(ValueError, match=message):
        load(tokenizer, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "chats"}, "did you mean chat"),
        ({"format": "jsnl"}, "did you mean jsonl or json"),
        ({"train": []}, r"train must name a file, glob or data set, got train=\[\]"),
        ({"sequence_length": 1}, "sequence_length must be at least 2"),
        ({"validation_fraction": 0.0}, "validation_fraction must lie in"),
        ({"max_train_tokens": 3}, "max_train_tokens must be at least sequence_length"),
    ],
)
def test_bad_settings_are_clear_errors(options, message):
    with pytest.raises(ValueError, match=message):
        DataConfig(**options)


def test_what_does_not_fit_the_model_is_refused(jsonl, tokenizer):
    with pytest.raises(ValueError, match="sequence_length must be at most 8 for this model"):
        load_lm_datasets(DataConfig(train=jsonl, sequence_length=16), tokenizer, max_length=8)
    check_sequence_length(DataConfig(sequence_length=16), None)
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="tokenizer must have an end-of-text token"):
        load(tokenizer, train=jsonl)
