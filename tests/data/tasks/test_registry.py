"""A task is one file: it is found, in an order that stays."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

from lte.data.tasks import TASKS
from lte.data.tasks.registry import find_tasks

FILE = """
from dataclasses import replace
from lte.data.tasks import get_task

TASKS = tuple(replace(get_task("sst2"), name=name) for name in {names!r})
"""


def package_of(folder: Path, monkeypatch: pytest.MonkeyPatch, **files: tuple[str, ...]) -> dict[str, object]:
    """The tasks of a package with these files, each with the names of its tasks."""
    package = folder / f"made_up_{folder.name}"
    package.mkdir()
    (package / "__init__.py").touch()
    for file, names in files.items():
        (package / f"{file}.py").write_text(FILE.format(names=names))
    monkeypatch.syspath_prepend(folder)
    return dict(find_tasks(importlib.import_module(package.name)))


def test_every_file_counts_in_the_order_of_their_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = package_of(tmp_path, monkeypatch, second=("b", "a"), first=("d", "c"))
    assert list(found) == ["d", "c", "b", "a"]
    kinds = [type(task).__name__ for task in TASKS.values()]
    assert list(dict.fromkeys(kinds)) == ["GenerationTask", "ClassificationTask", "ChatTask", "LanguageTask"]


def test_a_second_task_of_a_name_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="tasks must have names of their own, got a second a in two"):
        package_of(tmp_path, monkeypatch, one=("a",), two=("a",))
