"""Result files: one JSON object per run, with all that is needed to repeat and to trust it."""

from __future__ import annotations

import json
import math
import os
import platform
import subprocess
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from numbers import Real
from pathlib import Path
from typing import Any

import torch

from lte import __version__

REQUIRED_FIELDS = (
    "task",
    "model",
    "method",
    "seed",
    "target_sparsity",
    "sparsity",
    "metric",
    "value",
    "split",
    "flops_per_token",
    "bytes_per_token",
    "tokens_trained",
    "wall_time_s",
    "git_commit",
    "hardware",
    "versions",
    "config",
)
_TEXTS = ("task", "model", "method", "metric", "split")
_NUMBERS = (
    "target_sparsity",
    "sparsity",
    "value",
    "flops_per_token",
    "bytes_per_token",
    "tokens_trained",
    "wall_time_s",
)


def hardware() -> str:
    """The GPUs and their number, or the CPU and the cores that this process may use."""
    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    cpu = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text().splitlines()
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        cpu = names[0] if names else cpu
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{cpu}, {cores} cores"


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide a result; what is not installed is left out."""
    found = {"python": platform.python_version(), "lte": __version__, "torch": str(torch.__version__)}
    if torch.version.cuda:
        found["cuda"] = torch.version.cuda
    for package in ("transformers", "accelerate", "triton", "numba"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def git_commit(folder: str | Path | None = None) -> str | None:
    """The commit of a source tree, with `-dirty` after it if files differ from it.

    Files that are changed anywhere in the repository count, and untracked ones in `folder`.

    Args:
        folder: a folder of the tree; `None` takes that of the running lte package.

    Returns:
        The full hash, or `None` if `folder` is not tracked by git: an installed lte in an environment that
        lies in somebody else's repository is not of that repository's commit. The environment variable
        `LTE_GIT_COMMIT` says it where a copy of the tree came without its history.
    """
    place = Path(folder) if folder is not None else Path(__file__).resolve().parents[1]
    try:
        if not _git(place, "ls-files"):
            return os.environ.get("LTE_GIT_COMMIT")
        commit = _git(place, "rev-parse", "HEAD")
        changed = _git(place, "status", "--porcelain", "--untracked-files=no")
        return f"{commit}-dirty" if changed or _git(place, "status", "--porcelain", ".") else commit
    except (OSError, subprocess.SubprocessError):
        return os.environ.get("LTE_GIT_COMMIT")


def _git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=30).stdout.strip()


def environment() -> dict[str, Any]:
    """What every result file says of where it was made: `git_commit`, `hardware`, and `versions`."""
    return {"git_commit": git_commit(), "hardware": hardware(), "versions": versions()}


def result_record(**fields: Any) -> dict[str, Any]:
    """One run as a dict: the given fields, and the environment where it is not given.

    Units: `flops_per_token` in FLOPs, `bytes_per_token` in bytes, `wall_time_s` in seconds, `sparsity` and
    `target_sparsity` as shares in [0, 1]. More fields than the required ones are kept as they are.

    Raises:
        ValueError: if one of `REQUIRED_FIELDS` is missing or of a wrong type.
    """
    record = {**fields}
    if not {"git_commit", "hardware", "versions"} <= set(record):
        record = {**environment(), **fields}
    fault = _fault(record)
    if fault:
        raise ValueError(f"a result record must {fault}")
    return record


def _fault(record: Any) -> str | None:
    """What is wrong with a record, as the rule that it breaks; `None` if nothing is."""
    if not isinstance(record, Mapping):
        return f"be a JSON object, got {type(record).__name__}"
    missing = [name for name in REQUIRED_FIELDS if name not in record]
    if missing:
        return f"hold {', '.join(REQUIRED_FIELDS)}; missing: {', '.join(missing)}"
    for name in _TEXTS:
        if not isinstance(record[name], str):
            return f"hold text in {name}, got {name}={record[name]!r}"
    for name in _NUMBERS:
        # A file holds null for a number that was not finite.
        if record[name] is not None and (not isinstance(record[name], Real) or isinstance(record[name], bool)):
            return f"hold a number in {name}, got {name}={record[name]!r}"
    for name in ("target_sparsity", "sparsity"):
        if record[name] is not None and not 0 <= record[name] <= 1:
            return f"hold a share in [0, 1] in {name}, got {name}={record[name]}"
    return None


def write_json_atomic(path: str | Path, data: Any) -> None:
    """Writes JSON beside `path` and renames it into place, so that a reader never sees half a file.

    NaN and infinity, which JSON does not have, become null; tensors and arrays become lists, paths become
    text.

    Raises:
        TypeError: for other objects that JSON does not have; nothing is then written.
    """
    write_text_atomic(path, json.dumps(_json_ready(data), indent=1, allow_nan=False) + "\n")


def write_text_atomic(path: str | Path, text: str) -> None:
    """Writes a text as UTF-8 beside `path` and renames it into place."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _json_ready(data: Any) -> Any:
    if isinstance(data, Mapping):
        return {str(key): _json_ready(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [_json_ready(value) for value in data]
    if hasattr(data, "tolist"):
        return _json_ready(data.tolist())
    if isinstance(data, Path):
        return str(data)
    return None if isinstance(data, float) and not math.isfinite(data) else data


def load_results(folder: str | Path, pattern: str = "**/*.json") -> list[dict[str, Any]]:
    """All result records in a folder, in the order of their file names.

    Args:
        folder: where the files are.
        pattern: glob of the files, relative to `folder`.

    Raises:
        ValueError: for a folder that does not exist, or a file that is no JSON or no result record.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"folder must be an existing folder with result files, got folder={folder}")
    return [load_result(path, hint=f"; narrow pattern={pattern!r}") for path in sorted(folder.glob(pattern))]


def load_result(path: str | Path, hint: str = "") -> dict[str, Any]:
    """The result record in a file.

    Args:
        path: of the file.
        hint: what the message about a file without a record ends with.

    Raises:
        ValueError: for a file that is no JSON or no result record.
    """
    record = read_json(path)
    check_result(record, path, hint)
    return record


def read_json(path: str | Path) -> Any:
    """What a JSON file holds.

    Raises:
        ValueError: for a file that is no JSON.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} must hold JSON, got a file that does not: {error}") from error


def check_result(record: Any, path: str | Path, hint: str = "") -> None:
    """Raises a `ValueError` if what the file `path` holds is no result record; `hint` ends its message."""
    fault = _fault(record)
    if fault:
        raise ValueError(f"{path} must be a result record, which must {fault}{hint}")
