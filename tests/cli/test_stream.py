"""`lte train --stream`: the same text gives the same model, tokenised or found in the cache."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from pydoc_data import topics
from typing import Any

import pytest

from lte.data import streams
from tests.cli.conftest import SHORT


def test_trains_on_the_cache(
    dense_folder: Path, run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "topics.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in topics.topics.values()), encoding="utf-8")
    written, write = [], streams._write
    monkeypatch.setattr(streams, "_write", lambda *args: written.append(args) or write(*args))
    options = ["--train", source, "--stream", "--token-cache", tmp_path / "cache", *SHORT]
    weights, records = [], []
    for name in ("first", "again"):
        result = run("train", "--model", dense_folder, "--output", tmp_path / name, *options)
        assert result.exit_code == 0, result.output
        weights.append((tmp_path / name / "model.safetensors").read_bytes())
        records.append(json.loads((tmp_path / name / "result.json").read_text()))
    assert len(written) == 1
    assert weights[0] == weights[1]
    assert records[0]["perplexity_before"] == records[1]["perplexity_before"]
