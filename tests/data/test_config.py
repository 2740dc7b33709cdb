"""Reading documents, splitting off held-out ones, and what is said of bad data and settings."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
from pathlib import Path
from typing import Any

import datasets
import pandas
import pyarrow
import pytest

from lte.data.rows import DataConfig, read_documents
from tests.data.text_samples import DOCUMENTS, labelled, load, write_jsonl


def write_zst(path: Path) -> str:
    with pyarrow.output_stream(str(path), compression="zstd") as file:
        file.write("\n".join(json.dumps({"text": text}) for text in DOCUMENTS).encode())
    return str(path)


class TestReading:
    @pytest.mark.parametrize("ending", ["jsonl", "json", "csv", "parquet", "txt", "jsonl.gz", "jsonl.bz2", "txt.xz"])
    def test_every_format_gives_the_same_documents(self, tmp_path, ending):
        path, table = tmp_path / f"texts.{ending}", pandas.DataFrame({"text": DOCUMENTS})
        if ending == "csv":
            table.to_csv(path, index=False)
        elif ending == "parquet":
            table.to_parquet(path)
        else:
            opener: Any = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}.get(path.suffix, open)
            with opener(path, "wt") as file:
                if ending == "json":
                    json.dump([{"text": text} for text in DOCUMENTS], file)
                else:
                    texts = DOCUMENTS if "txt" in ending else [json.dumps({"text": text}) for text in DOCUMENTS]
                    file.write("\n".join(texts))
        assert read_documents(str(path), DataConfig()) == (["\n".join(DOCUMENTS)] if "txt" in ending else DOCUMENTS)

    def test_zst_needs_no_package(self, tmp_path):
        assert read_documents(write_zst(tmp_path / "texts.jsonl.zst"), DataConfig()) == DOCUMENTS

    @pytest.mark.parametrize("ending", ["jsonl.gz", "txt.gz", "csv.gz", "jsonl.bz2", "jsonl.xz"])
    @pytest.mark.parametrize("damage", ["cut off", "not packed"])
    def test_a_damaged_packed_file_is_a_clear_error(self, tmp_path, ending, damage):
        path = tmp_path / f"texts.{ending}"
        content = "\n".join(json.dumps({"text": text}) for text in DOCUMENTS).encode()
        pack: Any = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}[path.suffix]
        path.write_bytes(pack(content)[:-20] if damage == "cut off" else content)
        with pytest.raises(ValueError, match=r"must be readable as \w+, got .*texts.*; mend the file"):
            read_documents(str(path), DataConfig())

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
        ({"train": "{dir}/lists.jsonl"}, "lists.jsonl, line 1: the field 'text' must hold text, got a list"),
        ({"train": "{dir}/texts.jsonl", "sequence_length": 4096}, "train data must fill at least one row"),
        ({"train": "{dir}/blank.jsonl"}, "at least one document"),
        ({"train": "{dir}/empty.jsonl"}, "got the empty file"),
        ({"train": "{dir}/broken.jsonl"}, "must be readable as jsonl, got .*broken.jsonl: JSON parse error"),
        ({"train": "{dir}/odd.xyz"}, "format must be given for files that end in .xyz"),
        ({"train": "{dir}/odd.jsonl.rar"}, "end in .rar: .* packed files may end in .gz, .bz2, .xz, .zst"),
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
        "odd.jsonl.rar": "a",
    }
    contents |= {"short.txt": "a", "same.jsonl": '{"text": "a"}\n' * 4, "lists.jsonl": '{"text": ["a"]}'}
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
