"""Reading every original form, packed or not, and what is said of files that are not there or of another kind."""

from __future__ import annotations

import gzip
import hashlib
import json
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest

from lte.data.tasks import TASKS, get_task
from lte.data.tasks.files import find_file, read_split
from tests.data.tasks.made_up import write, write_e2e


def examples(name: str, split: str, folder: Path | None) -> list[dict[str, Any]]:
    task = get_task(name)
    found = read_split(task, split, folder)
    return task.examples(found.rows, found.origin)


def test_quotation_marks_of_glue_are_text(tmp_path: Path) -> None:
    write(tmp_path / "SST-2" / "train.tsv", "sentence\tlabel", '"half a quote\t1', 'a "whole" one\t0', '""\t1')
    found = examples("sst2", "train", tmp_path)
    assert [(row["text"], row["label"]) for row in found] == [('"half a quote', 1), ('a "whole" one', 0), ('""', 1)]


def test_the_byte_order_mark_of_mrpc_is_no_part_of_its_header(tmp_path: Path) -> None:
    write(
        tmp_path / "dev.tsv", "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String", '1\t7\t8\tHe said "no.\tNo "he said.'
    )
    assert examples("mrpc", "validation", tmp_path) == [
        {"text": 'He said "no.', "text_pair": 'No "he said.', "label": 1}
    ]


def test_cola_has_no_header_but_in_its_test_file(tmp_path: Path) -> None:
    write(tmp_path / "glue" / "CoLA" / "dev.tsv", "gj04\t1\t\tWe sailed.", "gj04\t0\t*\tSailed we the.")
    write(tmp_path / "glue" / "CoLA" / "test.tsv", "index\tsentence", "0\tBill whistled.")
    found = examples("cola", "validation", tmp_path)
    assert [(row["text"], row["label"]) for row in found] == [("We sailed.", 1), ("Sailed we the.", 0)]
    with pytest.raises(
        ValueError, match=r"test.tsv must have a column label for task=cola, got the columns index, sent"
    ):
        examples("cola", "test", tmp_path)


def test_labels_are_names_numbers_or_scores(tmp_path: Path) -> None:
    write(
        tmp_path / "RTE" / "dev.tsv",
        "index\tsentence1\tsentence2\tlabel",
        "0\ta\tb\tnot_entailment",
        "1\ta\tb\tentailment",
    )
    assert [row["label"] for row in examples("rte", "validation", tmp_path)] == [1, 0]
    write(tmp_path / "STS-B" / "dev.tsv", "index\tsentence1\tsentence2\tscore", "0\ta\tb\t3.750")
    assert [row["label"] for row in examples("stsb", "validation", tmp_path)] == [3.75]
    # Pairs whose annotators disagree have no label.
    rows = [{"gold_label": label, "sentence1": "a", "sentence2": "b"} for label in ("neutral", "-", "contradiction")]
    write(tmp_path / "snli_1.0" / "snli_1.0_dev.jsonl", *map(json.dumps, rows))
    assert [row["label"] for row in examples("snli", "validation", tmp_path)] == [1, 2]


@pytest.mark.parametrize(
    ("name", "label", "wanted"), [("rte", "maybe", "one of entailment, not"), ("stsb", "x", "a number")]
)
def test_another_label_is_refused(tmp_path: Path, name: str, label: str, wanted: str) -> None:
    write(tmp_path / "dev.tsv", "index\tsentence1\tsentence2\tlabel", f"0\ta\tb\t{label}")
    with pytest.raises(ValueError, match=f"label must be {wanted}.*, got label='{label}' in"):
        examples(name, "validation", tmp_path)


@pytest.mark.parametrize(("ending", "pack"), [("gz", gzip.compress), ("xz", lzma.compress), ("", bytes)])
def test_references_of_one_meaning_belong_together_in_packed_files_too(
    tmp_path: Path, ending: str, pack: Callable[[bytes], bytes]
) -> None:
    plain = (write_e2e(tmp_path / "plain") / "testset_w_refs.csv").read_bytes()
    path = tmp_path / ("testset_w_refs.csv" + (f".{ending}" if ending else ""))
    path.write_bytes(pack(plain))
    found = examples("e2e", "test", tmp_path)
    assert len(found) == 8
    assert found[0]["source"] == "name[The Vaults], eatType[pub]"
    assert found[0]["references"] == ["The Vaults, the pub.", 'The Vaults, the pub, called "nice".']
    assert read_split(get_task("e2e"), "test", tmp_path).sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_summaries_with_several_references(tmp_path: Path) -> None:
    summaries = {f"summary{i}": f"They meet {i}." for i in (1, 2, 3)}
    write(tmp_path / "dialogsum.test.jsonl", json.dumps({"dialogue": "#Person1#: Hi", **summaries, "topic1": "x"}))
    write(tmp_path / "dialogsum.dev.jsonl", json.dumps({"dialogue": "#Person1#: Hi", "summary": "They meet."}))
    assert examples("dialogsum", "test", tmp_path)[0]["references"] == ["They meet 1.", "They meet 2.", "They meet 3."]
    assert examples("dialogsum", "validation", tmp_path)[0]["references"] == ["They meet."]
    write(tmp_path / "test.jsonl", json.dumps({"source": ["One.", "Two."], "target": ["Short. ", "Brief."]}))
    assert examples("scitldr", "test", tmp_path) == [{"source": "One. Two.", "references": ["Short.", "Brief."]}]


def test_wikitext_takes_the_original_words_where_they_are(tmp_path: Path) -> None:
    text = " \n = Title = \n \n A word . \n"
    write(tmp_path / "wiki.test.tokens", " \n = <unk> = \n")
    assert "<unk>" in examples("wikitext2", "test", tmp_path)[0]["text"]
    (tmp_path / "wiki.test.raw").write_text(text)
    assert examples("wikitext2", "test", tmp_path) == [{"text": text}]


def test_all_splits_have_one_form(tmp_path: Path) -> None:
    task = get_task("wikitext2")
    for name in ("wiki.train.tokens", "wiki.valid.raw", "wiki.test.tokens", "wiki.test.raw"):
        write(tmp_path / name, "text")
    # No form has all three: each split's first one.
    assert [find_file(task, split, tmp_path).name for split in task.files] == [
        "wiki.train.tokens",
        "wiki.valid.raw",
        "wiki.test.raw",
    ]
    write(tmp_path / "wiki.valid.tokens", "text")
    assert {find_file(task, split, tmp_path).suffix for split in task.files} == {".tokens"}
    write(tmp_path / "wiki.train.raw", "text")
    assert {find_file(task, split, tmp_path).suffix for split in task.files} == {".raw"}


@pytest.mark.parametrize(
    "row",
    [
        {"instruction": "Add.", "input": "1 and 1", "output": "2"},
        {"messages": [{"role": "user", "content": "Add.\n\n1 and 1"}, {"role": "assistant", "content": "2"}]},
        {"conversations": ["Add.\n\n1 and 1", "2"], "source": "x"},
    ],
)
def test_chats_are_messages_conversations_or_instructions(tmp_path: Path, row: dict[str, Any]) -> None:
    write(
        tmp_path / "lima.jsonl", json.dumps(row), json.dumps({**row, "output": "", "messages": [], "conversations": []})
    )
    wanted = [{"role": "user", "content": "Add.\n\n1 and 1"}, {"role": "assistant", "content": "2"}]
    assert examples("lima", "train", tmp_path) == [{"messages": wanted}]


def test_a_mixture_is_the_chats_of_its_parts(tmp_path: Path) -> None:
    write(tmp_path / "instruct" / "lima.jsonl", json.dumps({"conversations": ["Add.", "2"]}))
    write(tmp_path / "instruct" / "alpaca_subset.jsonl", json.dumps({"instruction": "Halve.", "output": "1"}))
    parts = [examples(name, "train", tmp_path) for name in ("lima", "alpaca")]
    assert examples("instruct", "train", tmp_path) == [*parts[0], *parts[1]]
    found = read_split(get_task("instruct"), "train", tmp_path)
    assert found.origin == f"{tmp_path}/instruct/lima.jsonl, {tmp_path}/instruct/alpaca_subset.jsonl"
    sums = [read_split(get_task(name), "train", tmp_path).sha256 for name in ("lima", "alpaca")]
    assert found.sha256 == hashlib.sha256("\n".join(sums).encode()).hexdigest()
    (tmp_path / "instruct" / "lima.jsonl").unlink()
    with pytest.raises(ValueError, match="data_dir must hold the train split of lima"):
        read_split(get_task("instruct"), "train", tmp_path)


def test_the_hub_gives_rows_of_the_same_form(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def load_dataset(path: str, name: str | None, split: str, **options: Any) -> datasets.Dataset:
        asked.append((path, name, split, options))
        if path == "Salesforce/wikitext":
            return datasets.Dataset.from_list([{"text": text} for text in ("", " = Title = \n", "", " A word . \n")])
        return datasets.Dataset.from_list([{"premise": "a", "hypothesis": "b", "label": label} for label in (2, -1)])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert examples("mnli", "validation", None) == [{"text": "a", "text_pair": "b", "label": 2}]
    assert examples("wikitext2", "test", None) == [{"text": " \n = Title = \n \n A word . \n"}]
    assert asked[0] == ("nyu-mll/glue", "mnli", "validation_matched", {})
    assert asked[1][:3] == ("Salesforce/wikitext", "wikitext-2-raw-v1", "test")


def test_what_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data_dir must be an existing folder, got data_dir=.*nowhere"):
        read_split(get_task("sst2"), "train", tmp_path / "nowhere")
    (tmp_path / "SST-2").mkdir()
    message = r"data_dir must hold the train split of sst2, train.tsv \(also with .gz, .*, .zst\), got none in .*/SST-2"
    with pytest.raises(ValueError, match=message):
        read_split(get_task("sst2"), "train", tmp_path)
    with pytest.raises(ValueError, match="data_dir must be given for task=text"):
        read_split(get_task("text"), "train", None)
    with pytest.raises(ValueError, match=r"nyu-mll/glue must be on the hub for task=sst2, got .*give --data-dir"):
        read_split(get_task("sst2"), "train", None)


def test_damaged_and_foreign_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "train.tsv.gz").write_bytes(gzip.compress(b"sentence\tlabel\n" * 99)[:20])
    with pytest.raises(ValueError, match=r"train.tsv.gz must be readable as tsv, got EOFError"):
        read_split(get_task("sst2"), "train", tmp_path)
    write(tmp_path / "dev.tsv", "sentence\tlabel", "a\t1")
    with pytest.raises(
        ValueError, match=r"must have a column sentence1 for task=rte, got the columns sentence, label; is"
    ):
        examples("rte", "validation", tmp_path)
    write(tmp_path / "lima.jsonl", "{")
    with pytest.raises(ValueError, match=r"lima.jsonl must be readable as jsonl, got JSON parse error in line 2"):
        read_split(get_task("lima"), "train", tmp_path)
    write(tmp_path / "dialogsum.dev.jsonl", json.dumps({"dialogue": "Hi", "summary": ""}))
    with pytest.raises(ValueError, match=r"must hold examples of dialogsum, got 1 rows without any"):
        examples("dialogsum", "validation", tmp_path)


def test_a_wrong_name_is_answered_with_the_nearest() -> None:
    assert {"sst2", "mnli", "snli", "e2e", "xsum", "wikitext103", "tulu"} <= set(TASKS)
    assert all(task.name == name for name, task in TASKS.items())
    with pytest.raises(ValueError, match=r"task must be one of .*, got task='sst-2' \(did you mean sst2"):
        get_task("sst-2")
    with pytest.raises(ValueError, match="split must be one of train, validation, test, got split='dev'"):
        get_task("e2e").check_split("dev")


def test_rows_that_shift_or_hold_no_text_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "dev.tsv", "sentence\tlabel", "a fine\tfilm\t1")
    with pytest.raises(ValueError, match=r"dev.tsv must be readable as tsv, got line 2 has 3 values in 2 columns"):
        read_split(get_task("sst2"), "validation", tmp_path)
    # A tab at the end is no value, and a row that ends early has no label.
    write(tmp_path / "dev.tsv", "sentence\tlabel", "a film\t1\t", "another")
    assert examples("sst2", "validation", tmp_path) == [{"text": "a film", "text_pair": None, "label": 1}]
    write(tmp_path / "dialogsum.dev.jsonl", json.dumps({"dialogue": 3.0, "summary": 7}))
    assert examples("dialogsum", "validation", tmp_path) == [{"source": "3.0", "references": ["7"]}]
    write(tmp_path / "dialogsum.dev.jsonl", "", json.dumps({"dialogue": "Hi", "summary": {"a": 1}}))
    with pytest.raises(ValueError, match=r"dialogsum.dev.jsonl, row 1: it must hold text, got an object \({'a': 1}\)"):
        examples("dialogsum", "validation", tmp_path)
    write(tmp_path / "lima.jsonl", json.dumps({"messages": [{"role": "user", "content": "a"}, None]}))
    with pytest.raises(ValueError, match=r"lima.jsonl, row 1: message 2 of 2: it must be an object .*, got null"):
        examples("lima", "train", tmp_path)
    with pytest.raises(ValueError, match=r"label must be one of .*, got label=\[1\]"):
        get_task("sst2").examples([{"sentence": "a", "label": [1]}], "memory")
