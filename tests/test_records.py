from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lte.records import (
    REQUIRED_FIELDS,
    environment,
    git_commit,
    hardware,
    load_records,
    result_record,
    versions,
    write_json_atomic,
)

FIELDS: dict[str, Any] = {
    "task": "lm",
    "model": "tiny",
    "method": "lte",
    "seed": 0,
    "target_sparsity": 0.5,
    "sparsity": 0.49,
    "metric": "perplexity",
    "value": 12.5,
    "split": "test",
    "flops_per_token": 1e9,
    "bytes_per_token": 2e9,
    "tokens_trained": 1000,
    "wall_time_s": 1.5,
    "config": {"lr": 1e-4},
}


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false"]
    command = ["git", "-C", str(folder), *identity, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    git(tmp_path, "init", "-q")
    package = tmp_path / "package"
    package.mkdir()
    (package / "code.py").write_text("x = 1\n")
    (tmp_path / ".gitignore").write_text(".venv\n")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-qm", "start")
    return tmp_path


def test_a_record_holds_all_fields_and_the_environment() -> None:
    record = result_record(**FIELDS, log=[1])
    assert set(REQUIRED_FIELDS) <= set(record)
    assert record["hardware"] == hardware()
    assert record["versions"] == versions()
    assert record["log"] == [1]
    json.dumps(dict(record))


def test_the_environment_can_be_given() -> None:
    record = result_record(**FIELDS, git_commit="abc", hardware="a GPU", versions={})
    assert (record["git_commit"], record["hardware"], record["versions"]) == ("abc", "a GPU", {})
    assert result_record(**FIELDS, git_commit=None)["git_commit"] is None


def test_the_environment_names_hardware_and_versions() -> None:
    found = environment()
    assert {"python", "lte", "torch", "transformers"} <= set(found["versions"])
    assert found["versions"]["torch"] == torch.__version__
    assert "cores" in found["hardware"] or " x " in found["hardware"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"task": None}, "a result record must hold text in task, got task=None"),
        ({"value": "12"}, "a result record must hold a number in value, got value='12'"),
        ({"sparsity": 50}, r"a result record must hold a share in \[0, 1\] in sparsity, got sparsity=50"),
        ({"flops_per_token": True}, "a result record must hold a number in flops_per_token"),
    ],
)
def test_fields_of_a_wrong_type_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        result_record(**{**FIELDS, **change})


def test_a_missing_field_is_refused() -> None:
    with pytest.raises(ValueError, match="missing: metric, value"):
        result_record(**{key: value for key, value in FIELDS.items() if key not in ("metric", "value")})


def test_the_commit_is_that_of_the_tree(repository: Path) -> None:
    package = repository / "package"
    commit = git(repository, "rev-parse", "HEAD")
    assert git_commit(package) == commit
    (repository / "results.json").write_text("{}")
    assert git_commit(package) == commit
    (package / "new.py").write_text("")
    assert git_commit(package) == f"{commit}-dirty"
    (package / "new.py").unlink()
    (repository / ".gitignore").write_text(".venv\n\n")
    assert git_commit(package) == f"{commit}-dirty"


def test_no_commit_outside_a_tree_or_in_somebody_elses(repository: Path, tmp_path_factory: Any) -> None:
    assert git_commit(tmp_path_factory.mktemp("plain")) is None
    installed = repository / ".venv" / "lte"
    installed.mkdir(parents=True)
    (installed / "code.py").write_text("")
    assert git_commit(installed) is None
    assert git_commit(repository / "missing") is None


def test_a_copy_without_history_can_be_told_its_commit(tmp_path, monkeypatch):
    monkeypatch.setenv("LTE_GIT_COMMIT", "abc")
    assert git_commit(tmp_path) == "abc"


def test_json_is_valid_whatever_the_numbers(tmp_path: Path) -> None:
    data = {
        "nan": float("nan"),
        "list": [float("inf"), (1.5, np.float32(0.5))],
        "tensor": torch.tensor([1.0, float("nan")]),
        "path": Path("a") / "b",
        3: np.int64(7),
    }
    path = tmp_path / "new" / "record.json"
    write_json_atomic(path, data)
    text = path.read_text()
    assert "NaN" not in text
    assert json.loads(text) == {
        "nan": None,
        "list": [None, [1.5, 0.5]],
        "tensor": [1.0, None],
        "path": "a/b",
        "3": 7,
    }
    assert [entry.name for entry in path.parent.iterdir()] == ["record.json"]


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "record.json"
    write_json_atomic(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json_atomic(path, {"a": object()})

    def fail(self: Path, *args: Any, **kwargs: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_json_atomic(path, {"a": 2})
    assert json.loads(path.read_text()) == {"a": 1}
    assert [entry.name for entry in tmp_path.iterdir()] == ["record.json"]


def test_records_come_back_in_the_order_of_their_names(tmp_path: Path) -> None:
    for name, seed in (("b.json", 1), ("a.json", 0), ("deep/c.json", 2)):
        write_json_atomic(tmp_path / name, result_record(**{**FIELDS, "seed": seed}))
    assert [record["seed"] for record in load_records(tmp_path)] == [0, 1, 2]
    assert len(load_records(tmp_path, "*.json")) == 2


def test_a_record_with_a_value_that_was_nan_loads(tmp_path: Path) -> None:
    write_json_atomic(tmp_path / "a.json", result_record(**{**FIELDS, "value": float("nan")}))
    assert load_records(tmp_path)[0]["value"] is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", r"bad\.json must hold JSON"),
        ("", r"bad\.json must hold JSON"),
        ("[1]", r"bad\.json must be a result record, which must be a JSON object, got list"),
        ('{"task": "lm"}', r"bad\.json must be a result record.* missing: model, method"),
        ('"\\ud800', r"bad\.json must hold JSON"),
    ],
)
def test_malformed_files_are_named(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "bad.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        load_records(tmp_path)


def test_a_binary_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "bad.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"bad\.json must hold JSON"):
        load_records(tmp_path)


def test_a_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="folder must be an existing folder"):
        load_records(tmp_path / "missing")
