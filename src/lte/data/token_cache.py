"""Rows of tokens in files that are made once, found again by what they were made of, and shared by all processes.

A folder of the cache holds an Arrow file for each part, which is mapped into memory and not loaded, and `info.json`
with the checksums of these files.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lte.files import checksums, damage, explained_write_errors, sync, write_json_atomic

if TYPE_CHECKING:
    import datasets

FORMAT = 1
"""Of the files; those of another are made anew."""

INFO_FILE = "info.json"


def cache_folder(given: str | None) -> Path:
    """The folder of all caches: the given one, or that of the user."""
    if given is not None:
        return Path(given).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "lte" / "tokens"


def key_of(made_of: Mapping[str, Any]) -> str:
    """The name of what was made of this: 32 hexadecimal digits."""
    text = json.dumps({"format": FORMAT, **made_of}, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def tokenizer_digest(tokenizer: Any) -> str:
    """A checksum of all of a tokenizer that decides about tokens."""
    fast = getattr(tokenizer, "backend_tokenizer", None)
    vocabulary = tokenizer.get_vocab() if fast is None else json.loads(fast.to_str())
    if fast is not None:
        # What its last call asked for, or its file; the next one says it anew.
        vocabulary |= {"truncation": None, "padding": None}
    special = [tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.chat_template]
    text = json.dumps([type(tokenizer).__name__, vocabulary, special], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


class RowFile:
    """An Arrow file of rows that is written some rows at a time.

    Args:
        path: of the file.

    Attributes:
        rows: written so far.
        trained_tokens: of these, those with a label.
    """

    def __init__(self, path: Path):
        self.path, self.rows, self.trained_tokens = path, 0, 0
        self._writer: Any = None
        self._digests: dict[str, Any] = {}

    def write(self, columns: Mapping[str, np.ndarray], offsets: np.ndarray) -> None:
        """Adds rows: row i holds the values from `offsets[i]` to `offsets[i + 1]` of each column."""
        import pyarrow

        if len(offsets) < 2:
            return
        bounds = pyarrow.array(offsets.astype(np.int32))
        lists = [pyarrow.ListArray.from_arrays(bounds, pyarrow.array(values)) for values in columns.values()]
        batch = pyarrow.record_batch(lists, names=list(columns))
        if self._writer is None:
            self._writer = pyarrow.ipc.new_stream(str(self.path), batch.schema)
        self._writer.write_batch(batch)
        self.rows += batch.num_rows
        self.trained_tokens += int((columns["labels"] != -100).sum())
        for name, values in columns.items():
            self._digests.setdefault(name, hashlib.sha256()).update(values)

    def close(self) -> str:
        """Brings the file to the disk and returns a checksum of its rows."""
        if self._writer is not None:
            self._writer.close()
            sync(self.path)
        found = {name: digest.hexdigest() for name, digest in self._digests.items()}
        return hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Waits until no other process makes the same rows."""
    from filelock import FileLock

    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path):
        yield


def cached(folder: Path, key: str, make: Callable[[Path], dict[str, Any]]) -> tuple[Path, dict[str, Any]]:
    """The folder of a key, made if it is not there or damaged, and what its `make` returned.

    One process makes it, the others wait. The first process of a machine reads all files for their checksums, the
    others look at sizes.

    Args:
        folder: of all caches.
        key: from `key_of`.
        make: writes the files into a folder and returns what is to be known of them, JSON-ready.

    Raises:
        OSError: if the files cannot be written.
    """
    place = folder / key
    # Somebody else's, who lets it be read alone: no lock can be made there, and nothing changes.
    if place.is_dir() and not os.access(folder, os.W_OK) and (known := _known(place)) is not None:
        return place, known["found"]
    remedy = "make room, or name another folder with token_cache"
    with explained_write_errors(folder, lambda: remedy), _locked(folder / f"{key}.lock"):
        known = _known(place)
        if known is not None:
            return place, known["found"]
        for partial in folder.glob(f".{key}.*.partial"):
            shutil.rmtree(partial)
        shutil.rmtree(place, ignore_errors=True)
        partial = folder / f".{key}.{os.getpid()}.partial"
        partial.mkdir()
        try:
            found = make(partial)
            write_json_atomic(partial / INFO_FILE, {"files": checksums(partial), "found": found})
            partial.replace(place)
            sync(folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        return place, found


def _known(place: Path) -> dict[str, Any] | None:
    """What is known of the files of a cache, if they are there and as they were written."""
    try:
        known: dict[str, Any] = json.loads((place / INFO_FILE).read_text(encoding="utf-8"))
        found = damage(place, known["files"], contents=os.environ.get("LOCAL_RANK", "0") == "0")
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        found = [f"{INFO_FILE} is damaged ({error})"]
    if found:
        warnings.warn(f"the tokens in {place} are made anew: {found[0]}", stacklevel=4)
        return None
    return known


def open_rows(path: Path) -> datasets.Dataset:
    """The rows of a file in torch format, mapped and not loaded."""
    import datasets

    rows = datasets.Dataset.from_file(str(path))
    rows.set_format("torch")
    return rows


def row_lengths(rows: datasets.Dataset) -> np.ndarray:
    """Tokens of each row, int64 [R], without reading them."""
    import pyarrow.compute

    lengths = pyarrow.compute.list_value_length(rows.data.column("input_ids")).to_numpy().astype(np.int64)
    indices = rows._indices
    return lengths if indices is None else lengths[indices.column(0).to_numpy()]
