"""Reading the rows of a task's split, from a folder of files in their original form or from the hub."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from lte.data.files import OPENERS, UNREADABLE, csv_rows, json_rows, lines_of
from lte.data.tasks.task import ChatTask, Row, Task


@dataclass(frozen=True)
class SplitRows:
    """The rows of a split.

    Attributes:
        rows: as their source holds them.
        origin: the file, or the data set on the hub.
        sha256: of the file as it lies there, packed or not; of the rows where they are from the hub.
    """

    rows: list[Row]
    origin: str
    sha256: str


def read_split(task: Task, split: str, data_dir: str | Path | None = None) -> SplitRows:
    """The rows of one split of a task.

    Args:
        task: whose.
        split: a key of `task.files`.
        data_dir: folder with the files, or one that holds that folder; `None` takes the hub.

    Raises:
        ValueError: for a split that the task does not have, a file that is not there or cannot be read, or a data set
            that the hub does not give.
    """
    if isinstance(task, ChatTask) and task.parts:
        return _joined([read_split(part, split, data_dir) for part in task.parts])
    if data_dir is None:
        return _read_hub(task, split)
    path = find_file(task, split, Path(data_dir).expanduser())
    try:
        rows = read_rows(path, task.headerless.get(split))
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except UNREADABLE as error:
        reason = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        raise ValueError(f"{path} must be readable as {_format(path)}, got {reason}") from error
    return SplitRows(rows, str(path), digest)


def _joined(parts: list[SplitRows]) -> SplitRows:
    """The rows of several sources one after the other; the sha256 is that of theirs, one a line."""
    digest = hashlib.sha256("\n".join(part.sha256 for part in parts).encode()).hexdigest()
    return SplitRows([row for part in parts for row in part.rows], ", ".join(part.origin for part in parts), digest)


def find_file(task: Task, split: str, data_dir: Path) -> Path:
    """The file of a split in `data_dir` or in the task's folder below it, packed or not.

    Where a folder has files of several names for a split, WikiText's .raw and .tokens say, the first name counts that
    all its splits have: training on the one and measuring on the other would compare two texts.

    Raises:
        ValueError: if it is not there, saying what was looked for and where.
    """
    if not data_dir.is_dir():
        raise ValueError(f"data_dir must be an existing folder, got data_dir={data_dir}")
    folders = [folder for folder in (data_dir, *(data_dir / name for name in task.folders)) if folder.is_dir()]
    for folder in folders:
        by_split = {name: [_packed_or_not(folder, file) for file in files] for name, files in task.files.items()}
        if any(by_split[split]):
            # Of each form the files of the splits that the folder has at all.
            forms = list(zip(*(files for files in by_split.values() if any(files)), strict=False))
            complete = [path for path, form in zip(by_split[split], forms, strict=False) if all(form)]
            return next(filter(None, [*complete, *by_split[split]]))
    raise ValueError(
        f"data_dir must hold the {split} split of {task.name}, {' or '.join(task.files[split])} (also with "
        f"{', '.join(OPENERS)}), got none in {', '.join(map(str, folders))}"
        + (f"; folders below it may be called {', '.join(task.folders)}" if task.folders else "")
    )


def _packed_or_not(folder: Path, name: str) -> Path | None:
    paths = (folder / f"{name}{ending}" for ending in ("", *OPENERS))
    return next((path for path in paths if path.is_file()), None)


def read_rows(path: Path, header: tuple[str, ...] | None = None) -> list[Row]:
    """The rows of a .tsv, .csv, .json or .jsonl file; any other file is one row with its `text`.

    Args:
        path: a file, also with an ending of `OPENERS`.
        header: column names of a file without a header line.

    Raises:
        ValueError: for a file that is not of its form, with the line.
    """
    kind = _format(path)
    if kind == "text":
        return [{"text": "".join(lines_of(path, newline=""))}]
    if kind in ("json", "jsonl"):
        return [row for _, row in json_rows(lines_of(path))]
    # GLUE's quotation marks are text: they are neither escaped nor in pairs. Some of its rows end early.
    options = {"delimiter": "\t", "quoted": False, "cut_off": True} if kind == "tsv" else {"delimiter": ","}
    rows = csv_rows(lines_of(path, newline=""), header=header, **options)
    return [row for _, row in islice(rows, 1, None)]


def _format(path: Path) -> str:
    bare = path.with_suffix("") if path.suffix in OPENERS else path
    return bare.suffix[1:] if bare.suffix in (".tsv", ".csv", ".jsonl", ".json") else "text"


def _read_hub(task: Task, split: str) -> SplitRows:
    import datasets

    hub = task.hub
    if not hub.path:
        raise ValueError(f"data_dir must be given for task={task.name}, which is on no hub: a folder with its files")
    branch = {"revision": "refs/convert/parquet", "data_dir": hub.converted} if hub.converted else {}
    name = hub.splits.get(split, split)
    try:
        rows = datasets.load_dataset(hub.path, hub.name, split=name, **branch).to_list()
    except (*UNREADABLE, RuntimeError, datasets.exceptions.DatasetGenerationError) as error:
        raise ValueError(
            f"{hub.path} must be on the hub for task={task.name}, got {type(error).__name__} for name={hub.name}, "
            f"split={name}: {error}; give --data-dir with the original files"
        ) from error
    digest = hashlib.sha256("\n".join(json.dumps(row, default=str) for row in rows).encode()).hexdigest()
    return SplitRows(rows, f"{hub.path} {hub.name or ''} {name}", digest)
