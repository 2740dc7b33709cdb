"""Reading, splitting, packing and masking text."""

import gzip
import json

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lte.train.data import LmCollator, TokenRows, calibration_batches, load_lm_datasets, read_documents, token_mask
from lte.train.data_config import DataConfig

TEMPLATE = (
    "{% for m in messages %}{{ m.role }} : {{ m.content }} END {% endfor %}"
    "{% if add_generation_prompt %}assistant : {% endif %}"
)
DOCUMENTS = [f"w{i} w{i + 1} w{i + 2} w{i + 3} w{i + 4}" for i in range(0, 200, 5)]


@pytest.fixture
def tokenizer():
    words = ["[UNK]", "[EOS]", "user", "assistant", ":", "END", *(f"w{i}" for i in range(300))]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="[EOS]", unk_token="[UNK]")
    wrapped.chat_template = TEMPLATE
    return wrapped


@pytest.fixture
def jsonl(tmp_path):
    path = tmp_path / "texts.jsonl"
    path.write_text("\n".join(json.dumps({"text": text}) for text in DOCUMENTS))
    return path


def tokens_of(rows):
    return [token for row in rows.input_ids for token in row]


@pytest.mark.parametrize("ending", ["jsonl", "csv", "parquet", "txt", "jsonl.gz"])
def test_every_format_gives_the_same_documents(tmp_path, ending):
    import pandas

    path, table = tmp_path / f"texts.{ending}", pandas.DataFrame({"text": DOCUMENTS})
    if ending == "csv":
        table.to_csv(path, index=False)
    elif ending == "parquet":
        table.to_parquet(path)
    elif ending == "txt":
        path.write_text("\n".join(DOCUMENTS))
    else:
        opener = gzip.open if ending.endswith("gz") else open
        with opener(path, "wt") as file:
            file.write("\n".join(json.dumps({"text": text}) for text in DOCUMENTS))
    documents = read_documents(str(path), DataConfig())
    assert documents == (["\n".join(DOCUMENTS)] if ending == "txt" else DOCUMENTS)


def test_packing_loses_no_held_out_token_and_only_the_last_partial_training_row(jsonl, tokenizer):
    data = load_lm_datasets(DataConfig(train=str(jsonl), sequence_length=16, validation_fraction=0.25), tokenizer)
    assert data.info["train"]["documents"] == 30
    assert data.info["validation"]["documents"] == 10
    # Five words and the end-of-text token each.
    assert len(tokens_of(data.validation)) == 10 * 6
    assert len(tokens_of(data.train)) == 30 * 6 // 16 * 16
    assert {len(row) for row in data.train.input_ids} == {16}
    words = lambda rows: {token for token in tokens_of(rows) if token > 5}  # noqa: E731
    assert not words(data.train) & words(data.validation)


def test_the_same_settings_give_the_same_rows(jsonl, tokenizer):
    config = DataConfig(train=str(jsonl), sequence_length=16)
    first, second = load_lm_datasets(config, tokenizer), load_lm_datasets(config, tokenizer)
    assert tokens_of(first.train) == tokens_of(second.train)
    assert first.info == second.info
    other = load_lm_datasets(DataConfig(train=str(jsonl), sequence_length=16, data_seed=1), tokenizer)
    assert tokens_of(first.train) != tokens_of(other.train)


def test_a_single_text_is_cut_at_its_end(tmp_path, tokenizer):
    path = tmp_path / "one.txt"
    path.write_text(" ".join(f"w{i}" for i in range(200)))
    data = load_lm_datasets(DataConfig(train=str(path), sequence_length=8, validation_fraction=0.1), tokenizer)
    assert max(tokens_of(data.train)[:-1]) < max(tokens_of(data.validation))


def test_token_limits_hold(jsonl, tokenizer):
    config = DataConfig(train=str(jsonl), sequence_length=16, max_train_tokens=48, max_validation_tokens=16)
    data = load_lm_datasets(config, tokenizer)
    assert (len(tokens_of(data.train)), len(tokens_of(data.validation))) == (48, 12)


def test_only_completions_have_labels(tmp_path, tokenizer):
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": "w1 w2", "completion": "w3 w4"}) for _ in range(4)))
    row = load_lm_datasets(DataConfig(train=str(path), kind="completion"), tokenizer).train[0]
    assert tokenizer.decode(row["input_ids"]) == "w1 w2 w3 w4 [EOS]"
    assert row["labels"].tolist()[:2] == [-100, -100]
    assert row["labels"].tolist()[2:] == row["input_ids"].tolist()[2:]


def test_only_what_the_assistant_says_has_labels(tmp_path, tokenizer):
    turns = [("user", "w1"), ("assistant", "w2 w3"), ("user", "w4"), ("assistant", "w5")]
    path = tmp_path / "chats.jsonl"
    messages = [{"role": role, "content": content} for role, content in turns]
    path.write_text("\n".join(json.dumps({"messages": messages}) for _ in range(4)))
    row = load_lm_datasets(DataConfig(train=str(path), kind="chat"), tokenizer).train[0]
    assert tokenizer.decode(row["labels"][row["labels"] >= 0]) == "w2 w3 END w5 END"
    assert len(row["labels"]) == len(row["input_ids"])


def test_padding_and_ignored_labels_do_not_count():
    collate = LmCollator(pad_token_id=0)
    batch = collate([{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}, {"input_ids": [5], "labels": [5]}])
    assert token_mask(batch).tolist() == [[False, True, True], [True, False, False]]
    assert batch["input_ids"].tolist() == [[5, 6, 7], [5, 0, 0]]
    assert batch["labels"].tolist() == [[-100, 6, 7], [5, -100, -100]]
    even = collate([{"input_ids": [5, 6], "labels": [5, 6]}] * 2)
    assert "attention_mask" not in even
    assert token_mask(even).all()


def test_calibration_rows_spread_over_the_data():
    rows = TokenRows([[i] * 4 for i in range(100)], [[i] * 4 for i in range(100)])
    batches = list(calibration_batches(rows, 40, 5, LmCollator(0)))
    assert torch.cat([batch["input_ids"][:, 0] for batch in batches]).tolist() == list(range(0, 100, 10))


def test_the_built_in_text_needs_no_file():
    documents = read_documents("pydoc-topics", DataConfig())
    assert len(documents) > 50
    assert sum(map(len, documents)) > 300_000


def test_a_hub_name_goes_through_datasets(monkeypatch):
    import datasets

    seen = []

    def fake(*args, **kwargs):
        seen.append((args, kwargs))
        return datasets.Dataset.from_dict({"text": ["a", "b"]})

    monkeypatch.setattr(datasets, "load_dataset", fake)
    assert read_documents("owner/name", DataConfig(name="subset", split="validation")) == ["a", "b"]
    assert seen == [(("owner/name", "subset"), {"split": "validation"})]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train": "{dir}/text.jsonl"}, "matches nothing; near it are texts.jsonl"),
        ({"train": "{dir}/texts.jsonl", "text_field": "body"}, "must have a field 'body' .* got the fields text"),
        ({"train": "{dir}/texts.jsonl", "sequence_length": 4096}, "train data must fill at least one row"),
        ({"train": "{dir}/empty.jsonl"}, "at least one document"),
        ({"train": "{dir}/odd.xyz"}, "format must be given for files that end in .xyz"),
    ],
)
def test_bad_data_is_a_clear_error(jsonl, tokenizer, options, message):
    (jsonl.parent / "empty.jsonl").write_text(json.dumps({"text": " "}))
    (jsonl.parent / "odd.xyz").write_text("a")
    options = {k: v.format(dir=jsonl.parent) if isinstance(v, str) else v for k, v in options.items()}
    with pytest.raises(ValueError, match=message):
        load_lm_datasets(DataConfig(**options), tokenizer)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "chats"}, "did you mean chat"),
        ({"sequence_length": 1}, "sequence_length must be at least 2"),
        ({"validation_fraction": 0.0}, "validation_fraction must lie in"),
        ({"max_train_tokens": 3}, "max_train_tokens must be at least sequence_length"),
    ],
)
def test_bad_settings_are_clear_errors(options, message):
    with pytest.raises(ValueError, match=message):
        DataConfig(**options)


def test_rows_longer_than_the_model_takes_are_refused(jsonl, tokenizer):
    with pytest.raises(ValueError, match="sequence_length must be at most 8 for this model"):
        load_lm_datasets(DataConfig(train=str(jsonl), sequence_length=16), tokenizer, max_length=8)
