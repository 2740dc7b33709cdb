"""Documents to rows: packing, labels and positions of texts, completions and chats."""

from __future__ import annotations

from itertools import chain

import pytest
import torch

from lte.data import encoding
from lte.data.rows import DataConfig, LmCollator, read_documents
from lte.hf.inputs import model_inputs
from tests.data.text_samples import CHAT, TAGGED, TEMPLATE, UNSTABLE, labelled, load, write_jsonl
from tests.tiny_models import tiny_sparse_model


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

    def test_packed_documents_do_not_see_each_other(self, pairs, tokenizer, causal_type):
        rows = list(load(tokenizer, train=pairs, kind="completion", sequence_length=16).train)[:4]
        for row in rows:
            row["input_ids"] = row["input_ids"] % 90
        batch = LmCollator(0)(rows)
        model = tiny_sparse_model(causal_type)
        if causal_type == "opt":
            with pytest.raises(ValueError, match=r"position_ids must not be in batches for opt, .* set pack=False"):
                model_inputs(model, batch)
            return
        with torch.no_grad():
            packed = model(**model_inputs(model, batch)).logits
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
        rows = [{"messages": [{"who": "human", "says": f"w{i}"}]} for i in range(4)]
        with pytest.raises(
            ValueError, match=r"line 1: message 1 of 1: it must have role and content .*, got who, says"
        ):
            load(tokenizer, train=write_jsonl(tmp_path / "odd.jsonl", rows), kind="chat")
