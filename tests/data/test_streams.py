"""Streamed text: rows on the disk that are found again, shared, checked, and those of a mix in their shares."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.data_loader import prepare_data_loader, skip_first_batches
from torch.utils.data import DataLoader, RandomSampler

from lte.data import encoding, streams
from lte.data.config import DataConfig
from lte.data.mixing import load_mix
from lte.data.rows import LmDatasets, load_lm_datasets
from lte.data.token_cache import row_lengths
from tests.data.text_samples import write_jsonl

TEXTS = [f"w{i} w{i + 1} w{i + 2}" for i in range(200)]


@pytest.fixture
def settings(tmp_path: Path) -> dict[str, Any]:
    source = write_jsonl(tmp_path / "many.jsonl", [{"text": text} for text in TEXTS])
    return {"train": source, "sequence_length": 16, "stream": True, "token_cache": str(tmp_path / "cache")}


def load(tokenizer: Any, settings: dict[str, Any], **changes: Any) -> LmDatasets:
    return load_lm_datasets(DataConfig(**{**settings, **changes}), tokenizer, progress=False)


def ids(rows: Any) -> list[list[int]]:
    return [row["input_ids"].tolist() for row in rows]


def documents(rows: Any) -> set[tuple[int, ...]]:
    """The whole documents in packed rows; [EOS] is 1."""
    found, current = set(), []
    for token in (token for row in rows for token in row["labels"].tolist() if token != -100):
        if token == 1:
            found.add(tuple(current))
            current = []
        else:
            current.append(token)
    return found


def test_calls_of_the_tokenizer_leave_the_tokens_found(tokenizer: Any, settings: dict[str, Any]) -> None:
    load(tokenizer, settings)
    tokenizer.pad_token = tokenizer.eos_token
    folders = []
    for options in ({}, {"truncation": True, "max_length": 3, "padding": "max_length"}):
        tokenizer(["w1 w2 w3 w4"], **options)
        load(tokenizer, settings)
        folders.append({path.name for path in Path(settings["token_cache"]).iterdir() if path.is_dir()})
    assert folders[0] == folders[1]
    assert len(folders[0]) == 2  # Another token for padding is another tokenizer.


def test_tokens_that_may_be_read_alone_are_used(
    tokenizer: Any, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = load(tokenizer, settings)
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK and access(path, mode))
    monkeypatch.setattr("lte.data.token_cache._locked", lambda path: pytest.fail("a lock is a file"))
    assert load(tokenizer, settings).info == first.info


def test_the_kind_is_that_of_the_training_text(tokenizer: Any, pairs: str, settings: dict[str, Any]) -> None:
    data = load(tokenizer, settings, train=pairs, calibration=settings["train"])
    assert data.info["kind"] == "completion"
    assert ["kind completion" in line for line in data.announcements] == [True, False]


def test_a_file_with_the_name_of_a_built_in_text_is_read_again(
    tokenizer: Any, settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    changes = {"train": "pydoc-topics", "format": "text", "validation": "held.txt"}
    Path("held.txt").write_text(" ".join(TEXTS), encoding="utf-8")
    found = []
    for count in (100, 200):
        Path("pydoc-topics").write_text(" ".join(TEXTS[:count]), encoding="utf-8")
        found.append(load(tokenizer, settings, **changes).info["train"]["tokens"])
    assert found[1] > found[0]


@pytest.mark.parametrize("batch_chars", [50, 1 << 21])
def test_rows_are_those_of_the_text_in_its_order(
    batch_chars: int, tokenizer: Any, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoding, "BATCH_CHARS", batch_chars)
    data = load(tokenizer, settings, validation=settings["train"])
    expected = [token for i in range(200) for token in (i + 7, i + 8, i + 9, 1)]
    assert ids(data.train) == np.array(expected).reshape(-1, 16).tolist()
    assert ids(data.validation) == ids(data.train)
    assert all((row["labels"] == row["input_ids"]).all() for row in data.train)
    info = data.info["train"]
    assert (info["documents"], info["tokens"], info["rows"], info["trained_tokens"]) == (200, 800, 50, 800)
    assert data.train.cache_files
    assert data.announcements[0].startswith(f"{settings['train']}: 200 documents of kind text (text);")


def test_the_hash_of_a_document_decides_whether_it_is_held_out(tokenizer: Any, settings: dict[str, Any]) -> None:
    twice = {**settings, "validation_fraction": 0.2}
    write_jsonl(Path(settings["train"]), [{"text": text} for text in [*TEXTS, *TEXTS]])
    data = load(tokenizer, twice)
    held_out, trained = documents(data.validation), documents(data.train)
    assert 20 <= len(held_out) <= 60
    assert not held_out & trained
    assert data.info["train"]["documents"] + data.info["validation"]["documents"] == 400
    write_jsonl(Path(settings["train"]), [{"text": text} for text in TEXTS[50:]])
    assert documents(load(tokenizer, twice).validation) <= held_out
    assert documents(load(tokenizer, twice, data_seed=1).validation) != documents(load(tokenizer, twice).validation)
    with pytest.raises(ValueError, match=r"validation data must fill at least one row .* give validation, or raise"):
        load(tokenizer, settings, validation_fraction=1e-6)


def test_limits_and_rests(tokenizer: Any, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoding, "BATCH_CHARS", 50)
    data = load(tokenizer, settings, validation=settings["train"], max_train_tokens=100, max_validation_tokens=40)
    info = data.info
    assert (info["train"]["rows"], info["train"]["tokens"], info["train"]["dropped_tokens"]) == (6, 96, 4)
    # Held-out tokens are each in one row.
    assert (len(data.validation), info["validation"]["tokens"], info["validation"]["trained_tokens"]) == (3, 40, 40)
    assert info["train"]["documents"] < 50


@pytest.mark.parametrize("pack", [True, False])
def test_completions_and_chats(pack: bool, tokenizer: Any, settings: dict[str, Any], pairs: str, chats: str) -> None:
    for source in (pairs, chats):
        streamed = load(tokenizer, settings, train=source, validation=source, pack=pack)
        whole = load(tokenizer, settings, train=source, validation=source, pack=pack, stream=False)
        for part in ("rows", "tokens", "trained_tokens", "documents"):
            assert streamed.info["validation"][part] == whole.info["validation"][part]
        assert ids(streamed.validation) == ids(whole.validation)
        assert streamed.validation.column_names == whole.validation.column_names


def test_what_was_tokenised_is_found_again(
    tokenizer: Any, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = load(tokenizer, settings)
    with monkeypatch.context() as patch:
        patch.setattr(streams, "_write", None)
        again = load(tokenizer, settings)
    assert (ids(again.train), again.info, again.announcements) == (ids(first.train), first.info, first.announcements)
    calls = []
    write = streams._write
    monkeypatch.setattr(streams, "_write", lambda *args: calls.append(args) or write(*args))
    load(tokenizer, settings, sequence_length=8)
    tokenizer.add_tokens(["w1 w2"])
    load(tokenizer, settings)
    write_jsonl(Path(settings["train"]), [{"text": text} for text in TEXTS[1:]])
    load(tokenizer, settings)
    assert len(calls) == 3


@pytest.mark.parametrize("harm", ["bit", "cut", "gone", "info"])
def test_damaged_tokens_are_made_anew(harm: str, tokenizer: Any, settings: dict[str, Any]) -> None:
    first = ids(load(tokenizer, settings).train)
    (place,) = (path for path in Path(settings["token_cache"]).iterdir() if path.is_dir())
    file = place / "train.arrow"
    if harm == "gone":
        file.unlink()
    elif harm == "info":
        (place / "info.json").write_text("[", encoding="utf-8")
    else:
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content[: -8 if harm == "cut" else None])
    with pytest.warns(UserWarning, match=r"the tokens in .* are made anew"):
        assert ids(load(tokenizer, settings).train) == first
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load(tokenizer, settings)


def _of_process(tokenizer: Any, settings: dict[str, Any], results: Any) -> None:
    write = streams._write
    made: list[int] = []
    streams._write = lambda *args: made.append(1) or write(*args)
    data = load(tokenizer, settings)
    results.put((len(made), json.dumps(ids(data.train))))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_processes_share_what_one_of_them_makes(tokenizer: Any, settings: dict[str, Any]) -> None:
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    children = [context.Process(target=_of_process, args=(tokenizer, settings, results)) for _ in range(3)]
    for child in children:
        child.start()
    found = [results.get(timeout=60) for _ in children]
    for child in children:
        child.join()
    assert sum(made for made, _ in found) == 1
    assert len({rows for _, rows in found}) == 1


def batches(tokenizer: Any, settings: dict[str, Any], processes: int, index: int, skipped: int = 0) -> list[Any]:
    """What one of several processes trains on, as Trainer and accelerate deal out rows: eight of each step in all."""
    rows = load(tokenizer, settings).train
    sampler = RandomSampler(rows, generator=torch.Generator().manual_seed(5))
    loader = DataLoader(rows, batch_size=8 // processes, sampler=sampler, drop_last=True)
    mine = prepare_data_loader(loader, num_processes=processes, process_index=index, put_on_device=False)
    return [batch["input_ids"] for batch in skip_first_batches(mine, skipped)]


def test_the_order_is_that_of_any_number_of_processes_and_resumes(tokenizer: Any, settings: dict[str, Any]) -> None:
    alone = batches(tokenizer, settings, 1, 0)
    assert len(alone) == 5
    several = zip(*(batches(tokenizer, settings, 4, index) for index in range(4)), strict=True)
    assert all(torch.equal(step, torch.cat(parts)) for step, parts in zip(alone, several, strict=True))
    resumed = zip(*(batches(tokenizer, settings, 2, index, skipped=2) for index in range(2)), strict=True)
    assert all(torch.equal(step, torch.cat(parts)) for step, parts in zip(alone[2:], resumed, strict=True))


def test_what_a_killed_process_left_is_no_cache(tokenizer: Any, settings: dict[str, Any]) -> None:
    first = ids(load(tokenizer, settings).train)
    folder = Path(settings["token_cache"])
    (place,) = (path for path in folder.iterdir() if path.is_dir())
    (place / "info.json").unlink()
    shutil.copytree(place, folder / f".{place.name}.1.partial")
    assert ids(load(tokenizer, settings).train) == first
    assert not list(folder.glob(".*.partial"))


def test_a_mix_of_streams_is_that_of_loaded_text(tokenizer: Any, settings: dict[str, Any], tmp_path: Path) -> None:
    write_jsonl(tmp_path / "few.jsonl", [{"text": f"w{i} w5"} for i in range(200, 240)])
    (tmp_path / "mix.yaml").write_text(
        f"many: {{train: {settings['train']}, validation: {settings['train']}, weight: 3}}\n"
        f"few: {{train: {tmp_path / 'few.jsonl'}, validation: {tmp_path / 'few.jsonl'}}}\n",
        encoding="utf-8",
    )
    shared = {"mix": str(tmp_path / "mix.yaml"), "max_train_tokens": 640, "sequence_length": 16}
    cache = settings["token_cache"]
    streamed = load_mix(DataConfig(**shared, stream=True, token_cache=cache), tokenizer, progress=False)
    loaded = load_mix(DataConfig(**shared), tokenizer, progress=False)
    for part in ("rows", "tokens", "rows_of_kinds"):
        assert streamed.info["train"][part] == loaded.info["train"][part]
    # Every document of the few holds w5.
    kinds = [row.count(12) > 3 for row in ids(streamed.train)]
    assert kinds == [row.count(12) > 3 for row in ids(loaded.train)]
    assert sum(kinds) == streamed.info["train"]["rows_of_kinds"]["few"]
    assert row_lengths(streamed.train).tolist() == [16] * len(streamed.train)
    assert streamed.train.cache_files
    again = load_mix(DataConfig(**shared, stream=True, token_cache=cache), tokenizer, progress=False)
    assert ids(again.train) == ids(streamed.train)
    assert set(streamed.kinds) == {"many", "few"}


def test_a_file_with_other_words_at_the_same_size_and_time_is_read_anew(
    tokenizer: Any, settings: dict[str, Any]
) -> None:
    path, first = Path(settings["train"]), load(tokenizer, settings)
    before, text = path.stat(), path.read_text(encoding="utf-8")
    path.write_text(text.replace("w1", "w2"), encoding="utf-8")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_size == before.st_size
    assert ids(load(tokenizer, settings).train) != ids(first.train)
    # The same words at another time are those that were read first.
    path.write_text(text, encoding="utf-8")
    assert ids(load(tokenizer, settings).train) == ids(first.train)
