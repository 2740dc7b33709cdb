"""Rows of each kind of task: what trains, what is measured, what is cut."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from lte.data.config import DataConfig
from lte.data.rows import PaddingCollator
from lte.data.tasks import TaskConfig, get_task, load_task_data
from lte.data.tasks.data import fit_sources
from tests.data.tasks.made_up import write, write_e2e, write_sst2
from tests.data.text_samples import TEMPLATE


def load(name: str, tokenizer: Any, folder: Path, **options: Any) -> Any:
    own = {key: options.pop(key) for key in ("limit", "max_new_tokens") if key in options}
    splits = {key: options.pop(key) for key in ("train_split", "split", "encoder_decoder") if key in options}
    config = TaskConfig(task=name, data_dir=str(folder), **own)
    return load_task_data(get_task(name), tokenizer, config, DataConfig(**options), **splits)


def test_classification_rows_are_shuffled_to_train_and_in_order_to_measure(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    write_sst2(tmp_path)
    data = load("sst2", tokenizer, tmp_path, sequence_length=8)
    assert (len(data.train), len(data.measured), data.info["split"]) == (96, 30, "validation")
    assert [row["labels"] for row in data.measured][:6] == [0, 0, 0, 1, 1, 1]
    assert sorted(row["labels"] for row in data.train) == [0] * 48 + [1] * 48
    assert [row["labels"] for row in data.train] != sorted(row["labels"] for row in data.train)
    assert max(len(row["input_ids"]) for row in data.train) == 8
    info = data.info["validation"]
    assert (info["examples"], info["rows"]) == (30, 30)
    lines = (tmp_path / "dev.tsv").read_text().splitlines()[1:]
    assert info["truncated_documents"] == sum(len(line.split("\t")[0].split()) > 8 for line in lines)
    assert len(info["sha256"]) == len(info["origin_sha256"]) == 64
    assert len(load("sst2", tokenizer, tmp_path, limit=4, train_split=None).measured) == 4
    few = load("sst2", tokenizer, tmp_path, max_train_tokens=512)
    assert 480 < few.info["train"]["tokens"] <= 512


def test_a_pair_without_a_mark_between_is_joined_by_a_line(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    write(tmp_path / "dev.tsv", "index\tsentence1\tsentence2\tlabel", "0\tw1 w2\tw3\tentailment")
    data = load("rte", tokenizer, tmp_path, train_split=None)
    assert data.measured[0]["input_ids"] == tokenizer("w1 w2\nw3")["input_ids"]


def test_padding_is_on_the_right_whatever_the_tokenizer_says(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.pad_token = "[EOS]"
    rows = [{"input_ids": [5, 6, 7], "labels": 1}, {"input_ids": [8], "labels": 0}]
    for side in ("left", "right"):
        tokenizer.padding_side = side
        batch = PaddingCollator(tokenizer)(rows)
        assert batch["input_ids"].tolist() == [[5, 6, 7] + [1] * 5, [8] + [1] * 7]
        assert batch["attention_mask"].sum(1).tolist() == [3, 1]
        assert torch.equal(batch["labels"], torch.tensor([1, 0]))
    assert PaddingCollator(tokenizer, "left")(rows)["attention_mask"][1].tolist() == [0] * 7 + [1]
    answers = PaddingCollator(tokenizer)([{"input_ids": [5], "labels": [6, 7]}, {"input_ids": [5], "labels": [8]}])
    assert answers["labels"].tolist() == [[6, 7] + [-100] * 6, [8] + [-100] * 7]


def test_prompts_that_are_measured_are_those_that_train(byte_tokenizer: Any, tmp_path: Path) -> None:
    write_e2e(tmp_path)
    data = load("e2e", byte_tokenizer, tmp_path, max_new_tokens=30, sequence_length=128, pack=False)
    assert (len(data.measured), len(data.train), data.info["split"], data.max_new_tokens) == (8, 16, "test", 30)
    prompts = {tuple(row["input_ids"]) for row in data.measured}
    trained = {tuple(row["input_ids"][row["labels"] == -100].tolist()) for row in data.train}
    assert trained == prompts == {tuple(ids) for ids in data.prompts(99)}
    assert all(prompt[0] == byte_tokenizer.bos_token_id for prompt in prompts)
    answers = {byte_tokenizer.decode(row["input_ids"][row["labels"] != -100]) for row in data.train}
    assert answers == {f"{text}[EOS]" for texts in data.references for text in texts}


def test_a_long_source_loses_its_end_and_leaves_room_for_the_answer(byte_tokenizer: Any, tmp_path: Path) -> None:
    rows = [
        {"dialogue": f"start {'and so on ' * 200}", "summary": "Short."},
        {"dialogue": "brief", "summary": "Short."},
    ]
    for part in ("train", "test"):
        write(tmp_path / f"dialogsum.{part}.jsonl", *map(json.dumps, rows))
    data = load("dialogsum", byte_tokenizer, tmp_path, max_new_tokens=20, sequence_length=100)
    first = byte_tokenizer.decode(data.measured[0]["input_ids"])
    assert first.startswith("[BOS]start and so on")
    assert first.endswith("\nSummary:\n")
    assert 75 <= len(data.measured[0]["input_ids"]) <= 80
    assert data.info["validation"]["truncated_documents"] == 1
    with pytest.raises(ValueError, match=r"sequence_length must leave room for a source .*, got 5 for both"):
        load("dialogsum", byte_tokenizer, tmp_path, max_new_tokens=95, sequence_length=100)


def test_a_slow_tokenizer_cuts_no_sources() -> None:
    class Slow:
        is_fast = False

    with pytest.raises(ValueError, match="tokenizer must be a fast one to cut sources, got a slow one"):
        fit_sources(["w1"], "{source}", Slow(), 8)


def test_an_encoder_decoder_reads_the_source_and_learns_the_answer_with_its_end(
    byte_tokenizer: Any, tmp_path: Path
) -> None:
    write_e2e(tmp_path)
    data = load("e2e", byte_tokenizer, tmp_path, encoder_decoder=True)
    assert {tuple(row["input_ids"]) for row in data.train} == {tuple(row["input_ids"]) for row in data.measured}
    assert {row["labels"][-1] for row in data.train} == {byte_tokenizer.eos_token_id}
    answers = {byte_tokenizer.decode(row["labels"][:-1]) for row in data.train}
    assert answers == {text for texts in data.references for text in texts}


def test_every_token_of_a_text_is_predicted_once(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    text = "\n".join(" ".join(f"w{10 * line + i}" for i in range(10)) + " " for line in range(5))
    for part in ("train", "valid", "test"):
        write(tmp_path / f"wiki.{part}.raw", text)
    data = load("wikitext2", tokenizer, tmp_path, sequence_length=8)
    predicted = [token for row in data.measured for token in row["labels"][1:].tolist()]
    assert predicted == [*range(8, 57), tokenizer.eos_token_id]
    for before, row in zip(data.measured, list(data.measured)[1:], strict=False):
        assert row["input_ids"][0] == before["input_ids"][-1]
        assert row["labels"][0] == -100
    # 50 words and 5 ends of lines.
    assert data.num_words == 55
    limited = load("wikitext2", tokenizer, tmp_path, sequence_length=8, limit=2, train_split=None)
    assert (len(limited.measured), limited.num_words, limited.train) == (2, None, None)


def test_chats_are_held_out_whole_and_train_on_answers(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    tokenizer.chat_template = TEMPLATE
    rows = [{"instruction": f"w{i}", "input": "", "output": f"w{i + 100}"} for i in range(40)]
    write(tmp_path / "lima.jsonl", *map(json.dumps, rows))
    data = load("lima", tokenizer, tmp_path, sequence_length=32, validation_fraction=0.25)
    parts = [
        {token for row in part for token in row["labels"].tolist() if token > 6} for part in (data.train, data.measured)
    ]
    assert not parts[0] & parts[1]
    assert parts[0] | parts[1] == set(range(107, 147))
    assert len(parts[1]) == data.info["validation"]["examples"] == 10
    with pytest.raises(ValueError, match="split must be one of train, validation, got split='test'"):
        load("lima", tokenizer, tmp_path, split="test")


def test_mnli_measures_both_dev_sets(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    for name, label in (("train", "neutral"), ("dev_matched", "entailment"), ("dev_mismatched", "contradiction")):
        write(tmp_path / f"{name}.tsv", "index\tsentence1\tsentence2\tgold_label", f"0\tw1\tw2\t{label}")
    data = load("mnli", tokenizer, tmp_path)
    assert [row["labels"] for row in data.measured] == [0]
    assert [row["labels"] for row in data.further["mismatched"]] == [2]
    assert not load("mnli", tokenizer, tmp_path, split="validation_mismatched").further


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task": "sst3"}, r"got task='sst3' \(did you mean sst2"),
        ({"task": "sst2", "limit": 0}, "limit must be at least 1, got limit=0"),
        ({"data_dir": "here"}, "task must be given with data_dir, got data_dir=here and no task; add --task"),
    ],
)
def test_settings_that_do_not_fit_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TaskConfig(**options)


def test_rows_longer_than_the_model_takes_are_refused(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="sequence_length must be at most 64 for this model"):
        load_task_data(get_task("sst2"), tokenizer, max_length=64)
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="tokenizer must have an end-of-text token"):
        load("e2e", tokenizer, tmp_path)
