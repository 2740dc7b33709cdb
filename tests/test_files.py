"""Files that are never half written, and checksums that find what was lost or changed."""

from __future__ import annotations

from pathlib import Path

import pytest

from lte.files import checksums, damage, replaced_atomically, write_text_atomic


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
