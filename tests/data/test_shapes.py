"""Which columns are used and how: instructions, prompts made of columns, tokens, and the line that says so."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lte.data.announcement import announce, document_as_read
from lte.data.config import DataConfig, read_documents
from tests.data.text_samples import labelled, load, write_jsonl

ALPACA = [
    {"instruction": "Add.", "input": "1 and 1", "output": 2},
    {"instruction": "Greet.", "input": "", "output": "Hi"},
]


def read(path: Path, *rows: dict[str, Any], **options: Any) -> list[Any]:
    return list(read_documents(write_jsonl(path, list(rows)), DataConfig(**options)))


@pytest.mark.parametrize(
    ("pair", "field"),
    [
        ({"prompt": "Hi", "chosen": "Hello.", "rejected": "No."}, "completion_field"),
        ({name: [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": name}]
          for name in ("chosen", "rejected")}, "messages_field"),
    ],
)  # fmt: skip
def test_preferences_are_told_what_trains_on_them(tmp_path: Path, pair: dict[str, Any], field: str) -> None:
    with pytest.raises(ValueError, match=rf"pairs with chosen and rejected, .* give {field}=chosen to .*DPOTrainer"):
        read(tmp_path / "x.jsonl", pair)
    (found,) = read(tmp_path / "x.jsonl", pair, **{field: "chosen"})
    assert "chosen" in str(found) or "Hello." in str(found)
    assert "rejected" not in str(found)


class TestInstructions:
    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"kind": "completion"},
            {"kind": "completion", "prompt_field": "instruction", "completion_field": "output"},
        ],
    )
    def test_the_input_is_part_of_the_prompt(self, tmp_path, options):
        found = read(tmp_path / "x.jsonl", *ALPACA, **options)
        assert [tuple(row.values()) for row in found] == [("Add.\n1 and 1\n", "2"), ("Greet.\n", "Hi")]

    def test_as_chats(self, tmp_path):
        rows = [{**ALPACA[0], "system": "Be brief.", "history": [["Hi", "Hello"]]}]
        (chat,) = read(tmp_path / "x.jsonl", *rows, kind="chat")
        turns = [(message["role"], message["content"]) for message in chat["messages"]]
        assert turns == [
            *(("system", "Be brief."), ("user", "Hi"), ("assistant", "Hello")),
            *(("user", "Add.\n\n1 and 1"), ("assistant", "2")),
        ]
        with pytest.raises(ValueError, match="line 1: kind must be chat for rows with system"):
            read(tmp_path / "x.jsonl", *rows)

    def test_a_template_makes_prompts_of_columns(self, tmp_path):
        template = "### {instruction}\\n{{{input}}}\n"
        found = read(tmp_path / "x.jsonl", *ALPACA, prompt_template=template)
        assert [row["prompt"] for row in found] == ["### Add.\n{1 and 1}\n", "### Greet.\n{}\n"]
        with pytest.raises(
            ValueError, match=r"must name columns of the data, got {input} where .*x.jsonl has question, co"
        ):
            read(tmp_path / "x.jsonl", {"question": "a", "completion": "b"}, prompt_template="{question}{input}")

    @pytest.mark.parametrize("template", ["no column", "{}", "{a!r}", "{a:3}", "{a"])
    def test_a_template_without_columns_is_refused(self, template):
        with pytest.raises(ValueError, match=r"prompt_template must have columns as \{column\}"):
            DataConfig(prompt_template=template)

    def test_a_template_is_for_completions(self):
        with pytest.raises(ValueError, match="prompt_template must be given with kind=completion, got kind=chat"):
            DataConfig(prompt_template="{a}", kind="chat")

    def test_words_that_run_together_are_warned_of(self, tmp_path, tokenizer):
        rows = [{"prompt": f"w{i}", "completion": "w2"} for i in range(4)]
        path = write_jsonl(tmp_path / "x.jsonl", rows)
        with pytest.warns(UserWarning, match=r"4 of 4 prompts run into their completion without a space, 'w0w2' say"):
            load(tokenizer, train=path, pack=False)

    def test_zero_and_false_are_answers(self, tmp_path):
        rows = [{"prompt": "a", "completion": value} for value in (0, False, 0.0, "", None, "no")]
        assert [row["completion"] for row in read(tmp_path / "x.jsonl", *rows)] == ["0", "false", "0.0", "no"]

    def test_rejected_completions_and_pictures_do_not_train(self, tmp_path):
        rows = [{"prompt": "a", "completion": text, "label": text == "good"} for text in ("good", "bad")]
        assert [row["completion"] for row in read(tmp_path / "x.jsonl", *rows)] == ["good"]
        documents = read_documents(str(tmp_path / "x.jsonl"), DataConfig())
        assert documents.columns.used["label"] == "which rows train"
        assert documents.columns.left_out == {"marked label=False": 1}
        # Of plain text a label is another matter.
        assert read(tmp_path / "x.jsonl", {"text": "dull", "label": False}) == ["dull"]
        with pytest.raises(ValueError, match="rows must be text alone, got image"):
            read(tmp_path / "x.jsonl", {"prompt": "a", "completion": "b", "image": "x.png"})
        with pytest.raises(ValueError, match="got the mark <image>"):
            read(tmp_path / "x.jsonl", {"prompt": "<image>a", "completion": "b"})


class TestTokens:
    def test_rows_are_as_they_are(self, tmp_path, tokenizer):
        rows = [
            {"input_ids": [0, 0, 10, 11, 12], "attention_mask": [0, 0, 1, 1, 1], "labels": [-100, -100, -100, 11, 12]},
            {"input_ids": list(range(20, 29))},
            {"input_ids": [30, 31, 32], "completion_mask": [0, 0, 1]},
        ]
        path = write_jsonl(tmp_path / "x.jsonl", rows)
        found = load(tokenizer, train=path, validation=path, sequence_length=4, pack=False).validation
        # The last piece of the second row is one token, which nothing predicts.
        whole = [[10, 11, 12], [20, 21, 22, 23], [24, 25, 26, 27], [30, 31, 32]]
        assert [row["input_ids"].tolist() for row in found] == whole
        assert [row["labels"].tolist() for row in found][0::3] == [[-100, 11, 12], [-100, -100, 32]]
        packed = load(tokenizer, train=path, validation=path, sequence_length=8).validation
        assert packed[0]["position_ids"].tolist() == [0, 1, 2]
        assert packed[1]["position_ids"].tolist() == [0, 1, 2, 3, 4, 5, 6, 7]
        assert packed[1]["labels"].tolist() == [-100, *range(21, 28)]

    @pytest.mark.parametrize(
        ("row", "message"),
        [
            ({"input_ids": "abc"}, "Expecting value"),
            ({"input_ids": [1, 2.5]}, "input_ids must be a list of whole numbers"),
            ({"input_ids": [1, -1]}, "input_ids must be at least 0"),
            ({"input_ids": [1, 2], "labels": [1]}, "labels must be as long as input_ids, got 1 values for 2 tokens"),
            ({"input_ids": [1, 2, 3], "attention_mask": [1, 0, 1]}, "got zeros between tokens"),
            ({"input_ids": [1, 2, 3], "position_ids": [0, 1, 0]}, "position_ids must count up .*, got a packed row"),
            ({"input_ids": [1, 100_000]}, "input_ids must be of the model's tokenizer, below 307, got 100000"),
            ({"input_ids": [1, 2], "labels": [-100, -100]}, "must hold labels to train on, got 1 documents without"),
        ],
    )
    def test_other_rows_are_refused(self, tmp_path, tokenizer, row, message):
        path = write_jsonl(tmp_path / "x.jsonl", [row])
        with pytest.raises(ValueError, match=message):
            load(tokenizer, train=path, validation=path)


class TestAnnouncement:
    def test_says_what_is_used_and_what_is_not(self, tmp_path, tokenizer):
        rows = [{"prompt": f"w{i} ", "completion": "w2", "source": "web"} for i in range(8)]
        path = write_jsonl(tmp_path / "x.jsonl", [*rows, {"prompt": "w9", "completion": None, "n": 1}])
        found = load(tokenizer, train=path, pack=False)
        start = f"{path}: 8 documents of kind completion (completion, prompt); not used: n, source; "
        assert found.announcements[0].startswith(f"{start}left out: 1 rows without completion; trained is what")
        assert found.announcements[0].endswith("[[ w2 [EOS]]]")

    def test_a_document_without_a_tokenizer(self, tmp_path):
        rows = {
            "text": ({"text": "a\nb" + "c" * 200}, "[[a\\nb" + "c" * 57 + " ... " + "c" * 60 + "]]"),
            "completion": ({"prompt": "a ", "completion": "b"}, "a [[b]]"),
            "tokens": ({"input_ids": [1, 2], "labels": [-100, 2]}, "1[[2]]"),
            "chat": ({"messages": ["q", "a"]}, "user: q\\nassistant: [[a]]\\n"),
        }
        for kind, (row, shown) in rows.items():
            documents = read_documents(write_jsonl(tmp_path / "x.jsonl", [row]), DataConfig())
            assert documents.kind == kind
            assert announce(documents, document_as_read(documents[0], DataConfig())).endswith(f": {shown}")

    def test_json_text_in_tables_is_what_it_holds(self, tmp_path):
        path = tmp_path / "x.csv"
        messages = json.dumps([{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}])
        path.write_text('messages,n\n"' + messages.replace('"', '""') + '",1\n')
        (chat,) = read_documents(str(path), DataConfig())
        assert chat["messages"][1] == {"role": "assistant", "content": "a"}
        path.write_text('input_ids\n"[1, 2]"\n')
        assert read_documents(str(path), DataConfig())[0].ids.tolist() == [1, 2]


def test_the_same_tokens_train_as_before(tmp_path, tokenizer):
    """Columns beside the used ones, their order and the format do not change what trains."""
    rows = [{"text": f"w{i} w{i + 1}"} for i in range(20)]
    (tmp_path / "x.csv").write_text("n,text,\n" + "".join(f"{i},{row['text']},\n" for i, row in enumerate(rows)))
    sources = [write_jsonl(tmp_path / "x.jsonl", rows), str(tmp_path / "x.csv")]
    first, second = (load(tokenizer, train=source, sequence_length=8) for source in sources)
    assert labelled(first.train) == labelled(second.train)
    assert first.info["train"]["sha256"] == second.info["train"]["sha256"]
