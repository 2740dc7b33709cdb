from __future__ import annotations

import hashlib
import importlib.util
import json
import math
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lte.files import write_json_atomic
from lte.records import FIELDS as FIELD_NAMES
from lte.records import (
    REQUIRED_FIELDS,
    ResultRecord,
    environment,
    find_record,
    git_commit,
    hardware,
    load_record,
    load_records,
    pack_numbers,
    read_folder,
    read_json,
    result_record,
    unpack_numbers,
    versions,
    write_record,
)
from lte.report.inputs import load_inputs
from lte.settings import documented_attributes
from tests.report.sample_records import measurement

RESULTS = Path(__file__).parents[1] / "results"

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


def test_a_record_is_a_mapping_of_all_its_fields() -> None:
    record = result_record(**FIELDS, label="ours", answers=3)
    assert (record.label, record["label"], record.group, record["group"]) == ("ours", "ours", None, None)
    assert (record.extra, record["answers"], record.get("missing")) == ({"answers": 3}, 3, None)
    assert list(record) == [*FIELD_NAMES, "answers"]
    assert ResultRecord.from_dict(dict(record)) == record
    changed = record.with_fields(label="theirs", answers=4)
    assert dict(changed) == {**record, "label": "theirs", "answers": 4}
    with pytest.raises(ValueError, match=r"a result record must hold a share in \[0, 1\] in sparsity, got sparsity=2"):
        record.with_fields(sparsity=2)


def test_every_field_is_documented() -> None:
    documented = set(documented_attributes(ResultRecord)) - {"ValueError"}
    assert documented == {*FIELD_NAMES, "extra", "source"}


@pytest.mark.parametrize("tokens", [1, 7, 21723, 303104])
def test_packed_numbers_are_the_same_bit_for_bit(tokens: int) -> None:
    counts = np.random.default_rng(tokens).integers(0, tokens + 1, (3, 5))
    values = (counts / (5 * tokens)).tolist()
    packed = pack_numbers(values, tokens, 5 * tokens)
    assert packed["shape"] == [3, 5]
    assert repr(unpack_numbers(json.loads(json.dumps(packed)))) == repr(values)


@pytest.mark.parametrize(
    "values", [[0.1, None], [[0.5], [0.25, 0.5]], [], [math.pi], ["a"], [-0.0], [1], [1e300], [float("nan")]], ids=repr
)
def test_numbers_that_would_not_come_back_stay_as_they_are(values: list[Any]) -> None:
    assert pack_numbers(values, 4, 10) is values


def test_a_written_record_is_packed_and_reads_as_it_was(tmp_path: Path) -> None:
    measured = measurement().to_dict()
    history = {"step": [1, 2], "stage": [1, 2], "active_fraction": [[0.1234, 1.0], [0.5, 0.0]]}
    record = result_record(**FIELDS, measurement=measured, layer_history=history)
    write_record(tmp_path / "a.json", record)
    plain = json.loads((tmp_path / "a.json").read_text())
    assert set(plain["measurement"]["expert_use"]) == {"packed", "shape", "per"}
    assert plain["measurement"]["active_fraction"] == measured["active_fraction"]
    found = load_record(tmp_path / "a.json")
    assert repr(dict(found)) == repr(dict(record))
    assert found.source == str(tmp_path / "a.json")


@pytest.fixture
def pack() -> Any:
    """The script that packs folders."""
    spec = importlib.util.spec_from_file_location("pack", RESULTS / "pack.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_packed_runs_are_read_as_their_files_were(tmp_path: Path, pack: Any) -> None:
    folder = tmp_path / "runs"
    for name, seed in (("b", 1), ("a", 0)):
        write_record(
            folder / f"{name}.json", result_record(**{**FIELDS, "seed": seed}, measurement=measurement().to_dict())
        )
    write_json_atomic(folder / "rows.json", {"rows": [{"ms": 1.5, "name": '"row 1"'}, {"ms": 2}], "gpu": "none"})
    (before, rows), inputs = (load_records(folder, "[ab].json"), read_json(folder / "rows.json")), load_inputs([folder])
    pack.pack(folder)
    assert sorted(path.name for path in folder.iterdir()) == ["records.jsonl", "rows.json"]
    assert load_records(folder, "[ab].json") == load_records(tmp_path, "**/[ab].json") == before
    assert load_records(tmp_path, "*.json") == []
    assert [record.source for record in load_inputs([folder]).records] == [record.source for record in inputs.records]
    assert read_json(folder / "rows.json") == rows
    assert find_record(folder / "a.json") == before[0]
    assert find_record(folder / "c.json") is None
    for paths in ([folder / "a.json", folder / "b.json"], [folder / "[ab].json"], [folder / "records.jsonl"]):
        assert load_inputs(paths).records == before
    # A run that was done again comes before its line, and takes its place when it is packed.
    again = before[0].with_fields(value=1.0)
    write_record(folder / "a.json", again)
    assert load_records(folder, "[ab].json") == [again, before[1]]
    pack.pack(folder)
    assert load_records(folder, "[ab].json") == [again, before[1]]
    assert not (folder / "a.json").exists()


@pytest.mark.parametrize("line", ["{", "[1]", '{"task": "lm"}', '{"file": 3}'])
def test_a_line_that_is_no_record_is_named(tmp_path: Path, line: str) -> None:
    (tmp_path / "records.jsonl").write_text(f'{{"file": "a.json"}}\n{line}\n')
    with pytest.raises(ValueError, match=r"line 2 of .*records.jsonl must be a JSON object with file, got "):
        find_record(tmp_path / "b.json")


def test_the_tracked_records_are_all_read() -> None:
    records = load_inputs([RESULTS]).records
    files = {record.source for record in records}
    assert len(files) >= 857
    assert all(record.git_commit and record.versions["torch"] for record in records)


def test_the_tracked_records_are_the_files_that_the_runs_wrote() -> None:
    # Of the files before they were packed.
    digest = hashlib.sha256()
    for path, content in read_folder(RESULTS / "wikipedia" / "exploration").items():
        digest.update(json.dumps([path.name, content], sort_keys=True).encode())
    assert digest.hexdigest() == "51c0b57ed62796e1b3e561de01a2946c84e56bd9ff23761eb43bf65ecac1fd2f"
