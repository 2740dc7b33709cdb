"""Files that are never half written, and what a folder of them must hold.

A file is written beside its place, brought to the disk, and renamed; a folder's checksums, written last, say that all
of it is there and as it was.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import shutil
import socket
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

Checksums = dict[str, dict[str, Any]]
GGUF_MAGIC = b"GGUF"
LOCK_FILE = ".lte.lock"
WHOLE_BYTES, STRIDE, SAMPLED = 2**22, 2**22, 2**12
"""How much `sampled_sha256` reads: of 13.5 GB 18 MB."""


def check_place(name: str, path: str | Path, *, folder: bool = False) -> None:
    """Refuses a place where no file, or with `folder` no folder, can be written; makes none.

    Args:
        name: what the message calls the path.
        path: of the file or folder, which may not exist yet, nor those above it.
        folder: whether it is a folder.

    Raises:
        ValueError: says why not.
    """
    try:
        place = Path(path).expanduser().absolute()
        above = place.parent if not folder else place
        while not _exists(above):
            above = above.parent
        if not folder and place.is_dir():
            raise ValueError("is a folder; name a file")
        if not folder and place.exists() and not place.is_file():
            raise ValueError("is a device or a pipe; name a file")
        if not above.is_dir():
            raise ValueError("is a file; name a folder" if above == place else f"lies below {above}, which is a file")
        with tempfile.TemporaryFile(dir=above):
            pass
    except (OSError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"{name} must be a place that can be written, got {name}={path}: {reason}") from error
    except ValueError as error:
        raise ValueError(f"{name} must be a place that can be written, got {name}={path}, which {error}") from error


def _exists(path: Path) -> bool:
    """As `Path.exists`, which hides names that are too long and folders that may not be entered."""
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def write_json_atomic(path: str | Path, data: Any) -> None:
    """Writes JSON beside `path` and renames it into place, so that a reader never sees half a file.

    NaN and infinity, which JSON does not have, become null; tensors and arrays become lists, paths become
    text.

    Raises:
        TypeError: for other objects that JSON does not have; nothing is then written.
    """
    write_text_atomic(path, json.dumps(json_ready(data), indent=1, allow_nan=False) + "\n")


def write_text_atomic(path: str | Path, text: str) -> None:
    """Writes a text as UTF-8 beside `path` and renames it into place; what UTF-8 cannot hold is escaped."""
    with replaced_atomically(path) as partial:
        partial.write_text(text, encoding="utf-8", errors="backslashreplace")


@contextmanager
def replaced_atomically(path: str | Path) -> Iterator[Path]:
    """Gives a new file's path beside `path`, which becomes `path` when the block ends, and goes if it fails."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        sync(partial)
        partial.replace(path)
        sync(path.parent)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def explained_write_errors(path: str | Path, remedy: Callable[[], str] = lambda: "make room there") -> Iterator[None]:
    """Turns what any library raises when it cannot write into one sentence.

    Args:
        path: of what is written in the block.
        remedy: what to do, asked for when it fails.

    Raises:
        OSError: it names the path and the free space, says what failed, and what to do.
    """
    try:
        yield
    except Exception as error:
        # PyTorch's writer raises a RuntimeError, safetensors an error of its own, neither with an `errno`. An upload
        # that fails is an OSError, too, of a kind of its own.
        texts = "PytorchStreamWriter", "inline_container", "file write failed"
        torch_writer = isinstance(error, RuntimeError) and any(text in str(error) for text in texts)
        system = isinstance(error, OSError) and type(error).__module__ == "builtins"
        system = system and not isinstance(error, ConnectionError | TimeoutError)
        if not (system or torch_writer or type(error).__name__ == "SafetensorError"):
            raise
        number = error.errno if isinstance(error, OSError) else None
        reason = " ".join(str(error).split())
        raise OSError(
            number or errno.EIO,
            f"{path} could not be written ({free_bytes(path) / 1e6:.1f} MB are free there): {reason}; {remedy()}",
        ) from error


def free_bytes(path: str | Path) -> int:
    """Free space where a path lies, or will lie."""
    path = Path(path).absolute()
    return shutil.disk_usage(next(each for each in (path, *path.parents) if each.exists())).free


@contextmanager
def folder_lock(folder: str | Path) -> Iterator[None]:
    """Holds a folder for this process alone, and makes it if need be; the system frees it when the process dies.

    Raises:
        ValueError: if another process has it, or another thread.
    """
    from filelock import FileLock, Timeout

    folder = Path(folder)
    is_new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / LOCK_FILE)
    try:
        # A process that was just killed may leave children, which end within moments.
        lock.acquire(timeout=2, poll_interval=0.2)
    except Timeout:
        raise ValueError(
            f"output folder must be that of one process, got {folder}, into which another one trains now; wait until "
            "it ends, stop it, or take another folder"
        ) from None
    except (OSError, NotImplementedError) as error:
        warnings.warn(f"{folder} could not be locked ({error}); let one process alone train into it", stacklevel=3)
    try:
        yield
    finally:
        if lock.is_locked:
            with suppress(OSError):  # Windows removes no open file.
                (folder / LOCK_FILE).unlink()
            lock.release()
        if is_new:
            with suppress(OSError):  # It holds something by now.
                folder.rmdir()


def sync(path: str | Path) -> None:
    """Brings a file, or a folder's list of files, from the memory to the disk."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except PermissionError:  # Windows opens no folders.
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def checksums(folder: str | Path, names: Iterable[str] | None = None) -> Checksums:
    """Size and SHA-256 of a folder's files.

    Args:
        folder: where they are.
        names: paths relative to it; `None` takes all files in it and below, hidden ones left out.

    Returns:
        By name, `bytes` and `sha256`.
    """
    folder = Path(folder)
    if names is None:
        paths = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
        names = sorted(path.as_posix() for path in paths if not any(part.startswith(".") for part in path.parts))
    names = list(names)
    sums = sha256s([folder / name for name in names])
    return {
        name: {"bytes": (folder / name).stat().st_size, "sha256": sha256}
        for name, sha256 in zip(names, sums, strict=True)
    }


def damage(folder: str | Path, expected: Checksums, *, contents: bool = True) -> list[str]:
    """What is not as `checksums` found it, a phrase for each file; nothing if all is.

    Args:
        folder: where the files are.
        expected: what `checksums` returned.
        contents: whether to read the files; otherwise only their sizes are compared.
    """
    paths = {name: Path(folder) / name for name in expected}
    found, as_long = {}, []
    for name, path in paths.items():
        if not path.is_file():
            found[name] = f"{name} is missing"
        elif path.stat().st_size != expected[name]["bytes"]:
            found[name] = f"{name} has {path.stat().st_size} bytes where {expected[name]['bytes']} were written"
        else:
            as_long.append(name)
    for name, sha256 in zip(as_long, sha256s([paths[name] for name in as_long]) if contents else (), strict=False):
        if sha256 != expected[name]["sha256"]:
            found[name] = f"{name} has changed since it was written (its SHA-256 differs)"
    return [found[name] for name in expected if name in found]


def sampled_sha256(path: str | Path) -> str:
    """Tells a file of weights from others without reading all of it: by its size and `SAMPLED` bytes in each `STRIDE`.

    Of a file that is no longer than `WHOLE_BYTES` all is read, of others that much of its beginning, where formats of
    weights keep their tables. A matrix of `STRIDE` bytes or more that is another one is seen; one number alone is not.
    """
    found = hashlib.sha256()
    with Path(path).open("rb", buffering=0) as file:
        size = file.seek(0, os.SEEK_END)
        found.update(str(size).encode())
        file.seek(0)
        found.update(file.read(WHOLE_BYTES))
        for start in range(WHOLE_BYTES, size, STRIDE):
            file.seek(start)
            found.update(file.read(SAMPLED))
    return found.hexdigest()


def sha256s(paths: list[Path]) -> list[str]:
    """Of each file, several at once: one core reads 1 to 2 GB/s, and a checkpoint may have tens of GB."""
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return list(pool.map(_sha256, paths))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def json_ready(data: Any) -> Any:
    """Data with null in place of numbers that JSON does not have, lists of tensors, and text of paths."""
    if isinstance(data, Mapping):
        return {str(key): json_ready(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [json_ready(value) for value in data]
    if hasattr(data, "tolist"):
        return json_ready(data.tolist())
    if isinstance(data, Path):
        return str(data)
    return None if isinstance(data, float) and not math.isfinite(data) else data


def is_gguf(name_or_path: str | Path) -> bool:
    """Whether this names a GGUF file, by its ending or, where another ending is used, its first bytes."""
    path = Path(name_or_path).expanduser()
    if path.suffix.lower() == ".gguf":
        return True
    if not path.is_file():
        return False
    with path.open("rb") as stream:
        return stream.read(4) == GGUF_MAGIC


def stay_offline_without_hub() -> None:
    """Has huggingface_hub look in its cache alone where its host has no address: it would try for half a minute.

    To be called before it is imported.
    """
    host = urlsplit(os.environ.get("HF_ENDPOINT", "https://huggingface.co")).hostname
    if "HF_HUB_OFFLINE" in os.environ or getproxies() or "huggingface_hub" in sys.modules:
        return
    try:
        socket.getaddrinfo(host, 443)
    except OSError:
        os.environ["HF_HUB_OFFLINE"] = "1"
