"""A comparison that also measures each model with rounded weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lte.runs.runner import execute_all
from lte.runs.settings import read_comparison
from tests.runs.conftest import records_of, runner_of, write_comparison

TEXT = {"train": "pydoc-topics", "max_train_tokens": 1024, "max_validation_tokens": 512}


def comparison(folder: Path, model: Path, **content: Any) -> Path:
    methods = content.pop("methods", ["dense", "lte", "wanda"])
    return write_comparison(
        folder / "text.yaml",
        model=str(model),
        methods=methods,
        **content,
        defaults={**TEXT, **content.get("defaults", {})},
    )


def test_each_model_has_a_record_more_for_each_format(llama: Path, tmp_path: Path) -> None:
    pytest.importorskip("torchao")
    methods = ["dense", {"method": "lte", "keep": True}, "wanda"]
    file = comparison(tmp_path, llama, methods=methods, weights=["int8", "int4-32"])
    runner, lines = runner_of(file, tmp_path)
    assert execute_all([runner]) == []
    records = records_of(tmp_path)
    ends = ("", "-int8", "-int4-32")
    names = {label: [f"{label}{end}-{target}-seed0" for end in ends] for label, target in (("dense", 0), ("lte", 0.5))}
    # Pruned weights are not rounded, as their zeros would go.
    assert set(records) == {*names["dense"], *names["lte"], "wanda-0.5-seed0"}
    assert (tmp_path / "records" / "lte-0.5-seed0-int8.json").exists()
    for label, each_name in names.items():
        native, *rounded = (records[name] for name in each_name)
        assert native["weights"] == "native"
        assert native["label"] == label
        assert [each["weights"] for each in rounded] == ["int8", "int4-32"]
        assert [each["label"] for each in rounded] == [f"{label}-int8", f"{label}-int4-32"]
        sizes = [each["bytes_per_token"] for each in (native, *rounded)]
        assert sizes == sorted(sizes, reverse=True)
        memory = [each["weights_memory_bytes"] for each in (native, *rounded)]
        assert memory[0] > memory[1] > memory[2]
        assert len({each["value"] for each in (native, *rounded)}) == 3
        assert len({each["config"]["fingerprint"] for each in (native, *rounded)}) == 1
    assert any(line.startswith("lte-0.5-seed0 in int8: perplexity") for line in lines)
    again, lines = runner_of(file, tmp_path)
    assert execute_all([again]) == []
    assert not lines
    # The record of a model that is still there can be made anew by itself.
    (tmp_path / "records" / "lte-0.5-seed0-int8.json").unlink()
    again, lines = runner_of(file, tmp_path)
    assert execute_all([again]) == []
    assert [line.partition(":")[0] for line in lines if "perplexity" in line] == ["lte-0.5-seed0 in int8"]
    assert records_of(tmp_path)["lte-int8-0.5-seed0"]["value"] == records["lte-int8-0.5-seed0"]["value"]


def test_a_format_that_does_not_fit_leaves_the_model_its_record(llama: Path, tmp_path: Path) -> None:
    pytest.importorskip("torchao")
    runner, lines = runner_of(comparison(tmp_path, llama, methods=["dense"], weights=["int4"]), tmp_path)
    assert execute_all([runner]) == []
    records = records_of(tmp_path)
    assert set(records) == {"dense-0-seed0", "dense-int4-0-seed0"}
    assert records["dense-0-seed0"]["value"] > 1
    failed = records["dense-int4-0-seed0"]
    assert failed["value"] is None
    assert "weights must have groups that divide the 32 inputs of a layer" in failed["failure"]
    assert any(line.startswith("dense-0-seed0 in int4: FAILED ValueError: weights must have groups") for line in lines)


def test_unknown_formats_are_refused(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        ValueError, match="weights must be one of native, int8, int4, int4-64, int4-32, got weights='int2'"
    ):
        read_comparison(comparison(tmp_path, llama, weights=["int2"]))
    with pytest.raises(ValueError, match=r"weights must be a list of formats, got weights=8 in .*text.yaml"):
        read_comparison(comparison(tmp_path, llama, weights=8))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="torchao must be installed for weights=int8, got none: pip install torchao"):
        read_comparison(comparison(tmp_path, llama, weights="int8"))
