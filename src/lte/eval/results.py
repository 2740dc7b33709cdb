"""Result files: one JSON object per run, with all that is needed to repeat and to trust it."""

from __future__ import annotations

import json
import math
import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

REQUIRED_FIELDS = (
    "task", "model", "method", "seed", "target_sparsity", "sparsity", "metric", "value", "split", "flops_per_token",
    "bytes_per_token", "tokens_trained", "wall_time_s", "git_commit", "hardware", "versions", "config",
)  # fmt: skip


def hardware() -> str:
    """The GPUs, or the CPU and its cores."""
    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        name = names[0] if names else name
    return f"{name}, {os.cpu_count()} cores"


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide a result."""
    found = {"python": platform.python_version()}
    for package in ("lte", "torch", "transformers", "accelerate", "triton"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def git_commit() -> str | None:
    """The commit of the source tree that runs, with `-dirty` after it if files differ; `None` outside a checkout."""
    folder = Path(__file__).resolve().parent
    try:
        commit = _git(folder, "rev-parse", "HEAD")
        return f"{commit}-dirty" if _git(folder, "status", "--porcelain", "--untracked-files=no") else commit
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def environment() -> dict[str, Any]:
    """What every result file says of where it was made."""
    return {"git_commit": git_commit(), "hardware": hardware(), "versions": versions()}


def result_record(**fields: Any) -> dict[str, Any]:
    """One run as a JSON-ready dict: the given fields and the environment.

    Raises:
        ValueError: if a field of `REQUIRED_FIELDS` is neither given nor part of the environment.
    """
    record = {**environment(), **fields}
    missing = [name for name in REQUIRED_FIELDS if name not in record]
    if missing:
        raise ValueError(f"a result record must hold {', '.join(REQUIRED_FIELDS)}; missing: {', '.join(missing)}")
    return record


def write_json_atomic(path: str | Path, data: Any) -> None:
    """Writes JSON beside `path` and renames it into place; NaN and infinity become null."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(_finite(data), indent=1, allow_nan=False) + "\n")
    partial.replace(path)


def _finite(data: Any) -> Any:
    if isinstance(data, float):
        return data if math.isfinite(data) else None
    if isinstance(data, dict):
        return {key: _finite(value) for key, value in data.items()}
    return [_finite(value) for value in data] if isinstance(data, list | tuple) else data


def load_results(folder: str | Path) -> list[dict[str, Any]]:
    """All result records below a folder, by file name.

    Raises:
        ValueError: for a file that is no JSON object or lacks a required field.
    """
    records = []
    for path in sorted(Path(folder).rglob("*.json")):
        try:
            record = json.loads(path.read_text())
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} must hold JSON, got {error}") from error
        missing = [name for name in REQUIRED_FIELDS if not isinstance(record, dict) or name not in record]
        if missing:
            raise ValueError(f"{path} must be a result record, got one without {', '.join(missing)}")
        records.append(record)
    return records
