"""Files that are never half written, and checksums that find what was lost or changed."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from lte.files import (
    STRIDE,
    WHOLE_BYTES,
    check_place,
    checksums,
    damage,
    replaced_atomically,
    sampled_sha256,
    write_text_atomic,
)


def test_a_failing_writer_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    write_text_atomic(tmp_path / "kept.txt", "old")

    def fail() -> None:
        with replaced_atomically(tmp_path / "kept.txt") as partial:
            partial.write_text("ne")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        fail()

    assert [path.name for path in tmp_path.iterdir()] == ["kept.txt"]
    assert (tmp_path / "kept.txt").read_text() == "old"


def test_checksums_find_each_kind_of_damage(tmp_path: Path) -> None:
    for name in ("gone", "cut", "flipped", "whole", "deep/one", ".hidden"):
        write_text_atomic(tmp_path / name, "abcd")
    written = checksums(tmp_path)
    assert list(written) == ["cut", "deep/one", "flipped", "gone", "whole"]
    assert damage(tmp_path, written) == []

    (tmp_path / "gone").unlink()
    (tmp_path / "cut").write_text("abc")
    (tmp_path / "flipped").write_text("abcE")

    assert damage(tmp_path, written) == [
        "cut has 3 bytes where 4 were written",
        "flipped has changed since it was written (its SHA-256 differs)",
        "gone is missing",
    ]
    assert len(damage(tmp_path, written, contents=False)) == 2


def test_checksums_read_the_named_files_alone(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    (tmp_path / "other").write_text("x")

    empty = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    assert checksums(tmp_path, ["empty"]) == {"empty": {"bytes": 0, "sha256": empty}}


def test_a_text_that_utf8_cannot_hold_is_escaped(tmp_path: Path) -> None:
    write_text_atomic(tmp_path / "text", "caf\u00e9 \ud800")
    assert (tmp_path / "text").read_bytes() == b"caf\xc3\xa9 \\ud800"


@pytest.mark.parametrize(
    ("place", "folder", "reason"),
    [
        ("", False, "is a folder; name a file"),
        ("file/below.json", False, "lies below"),
        ("file", True, "is a file; name a folder"),
        ("a" * 300, False, "File name too long"),
        ("/dev/null", False, "is a device or a pipe"),
        ("/proc/nothing/here.json", False, "No such file"),
    ],
)
def test_places_that_cannot_be_written(tmp_path: Path, place: str, folder: bool, reason: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=f"json must be a place that can be written, got json=.*{reason}"):
        check_place("json", tmp_path / place, folder=folder)


def test_a_place_is_not_made_by_the_check(tmp_path: Path) -> None:
    check_place("json", tmp_path / "new" / "deep.json")
    check_place("output", tmp_path / "new" / "deep", folder=True)
    assert list(tmp_path.iterdir()) == []


def test_every_text_file_is_opened_with_an_encoding() -> None:
    """The language of a machine must not decide how files are read; the linter misses paths in variables."""
    root, found = Path(__file__).parents[1], []
    for path in (file for name in ("src", "benchmarks", "examples") for file in (root / name).rglob("*.py")):
        for call in (
            node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)
        ):
            name = getattr(call.func, "attr", getattr(call.func, "id", ""))
            modes = [arg.value for arg in call.args if isinstance(arg, ast.Constant)]
            binary = any(isinstance(mode, str) and "b" in mode for mode in modes)
            if name not in ("read_text", "write_text", "open") or (
                name == "open" and (binary or "os.O_" in ast.unparse(call))
            ):
                continue
            keywords = {keyword.arg for keyword in call.keywords}
            # lte.bench.text and lte.report.inputs have functions of these names, which take no encoding.
            if isinstance(call.func, ast.Attribute) and not keywords & {"encoding", None}:
                found.append(f"{path.relative_to(root)}:{call.lineno}")
    assert found == []


def test_a_sampled_checksum_sees_another_matrix_in_a_long_file(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    path.write_bytes(bytes(3 * STRIDE))
    before = sampled_sha256(path)
    assert sampled_sha256(path) == before
    for start, size in ((0, 1), (WHOLE_BYTES + 10_000, STRIDE)):
        with path.open("r+b") as file:
            file.seek(start)
            file.write(b"1" * size)
        changed = sampled_sha256(path)
        assert changed != before
        before = changed
    path.write_bytes(path.read_bytes() + b"0")
    assert sampled_sha256(path) != before
