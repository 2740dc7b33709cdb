"""Result records: one typed class, one reader, one writer.

A run writes its record as a JSON file. A folder of finished runs may hold their records as lines of `records.jsonl`
(`results/pack.py` makes it), each with the name of the file that it was in `FILE_KEY`; readers take both alike. Long
lists of shares are packed as `pack_numbers` says, and reading gives each number back bit for bit.
"""

from __future__ import annotations

import base64
import json
import os
import platform
import subprocess
import zlib
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, fields
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np

from lte.files import write_json_atomic

PACKED_FILE, FILE_KEY = "records.jsonl", "file"
_PACKED_KEYS = {"packed", "shape", "per"}
_TEXTS = ("task", "model", "method", "metric", "split")
_SHARES = ("target_sparsity", "sparsity")
_NUMBERS = (*_SHARES, "value", "flops_per_token", "bytes_per_token", "tokens_trained", "wall_time_s")


@dataclass(frozen=True, kw_only=True, eq=False)
class ResultRecord(Mapping[str, Any]):
    """What one run made and measured, with all that is needed to repeat and to trust it.

    A record is also a mapping from the names in its file, which include those of `extra`. A number that was not finite
    is `None`, and so is a field that says nothing of this run.

    Attributes:
        task: name of the data or benchmark.
        model: what the run started from.
        method: `dense`, `lte`, or another method's name.
        seed: of the run.
        target_sparsity: asked for, a share in [0, 1].
        sparsity: measured, the share of FFN neurons not computed per token, mean over layers, in [0, 1].
        metric: name of the main metric.
        value: its value.
        split: of the data that was measured on.
        flops_per_token: of the block linears, routers included.
        bytes_per_token: of weights read at batch size 1.
        tokens_trained: by the run and what it started from.
        wall_time_s: seconds of training or fitting.
        git_commit: of the code, `None` outside a git checkout.
        hardware: GPUs, or CPU and cores.
        versions: of Python and the packages that decide a result.
        config: all settings.
        metrics: all metrics by name.
        tokens_evaluated: how many tokens were measured on.
        weight_sparsity: share of the weights of the block linears that are not read per token.
        method_config: settings of the method.
        measurement: routing statistics, see `lte.eval.sparsity.Measurement`.
        layer_history: each layer's active fraction over training, see `lte.train.summary.TrainingSummary`.
        log: entries of the training log.
        eta: weight of the efficiency loss at the end.
        label: name of the setting in a comparison.
        group: settings that share a curve.
        command: that repeats the run.
        data_sha256: checksums of the rows, by part.
        peak_memory_bytes: the most memory at once.
        latency_ms: median decoding step at batch size 1.
        latency_p20_ms: its 20th percentile.
        latency_p80_ms: its 80th percentile.
        latency_dense_ms: the median of the dense model timed beside it.
        latency_sparsity: share of FFN neurons not computed in these steps.
        latency_note: how it was timed, or why not.
        harness: scores of question sets, by name.
        harness_note: why there are none.
        failure: why the run failed.
        extra: all other fields of the file, as they are.
        source: the file that the record was read from; no part of the mapping.

    Raises:
        ValueError: for a field of a wrong type, or a share outside [0, 1].
    """

    task: str
    model: str
    method: str
    seed: Any
    target_sparsity: float | None
    sparsity: float | None
    metric: str
    value: float | None
    split: str
    flops_per_token: float | None
    bytes_per_token: float | None
    tokens_trained: float | None
    wall_time_s: float | None
    git_commit: str | None
    hardware: str
    versions: Mapping[str, str]
    config: dict[str, Any]
    metrics: Mapping[str, float | None] | None = None
    tokens_evaluated: int | None = None
    weight_sparsity: float | None = None
    method_config: Mapping[str, Any] | None = None
    measurement: Mapping[str, Any] | None = None
    layer_history: Mapping[str, Any] | None = None
    log: list[Any] | None = None
    eta: float | None = None
    label: str | None = None
    group: str | None = None
    command: str | None = None
    data_sha256: Mapping[str, str | None] | None = None
    peak_memory_bytes: int | None = None
    latency_ms: float | None = None
    latency_p20_ms: float | None = None
    latency_p80_ms: float | None = None
    latency_dense_ms: float | None = None
    latency_sparsity: float | None = None
    latency_note: str | None = None
    harness: Mapping[str, Any] | None = None
    harness_note: str | None = None
    failure: str | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)
    source: str = ""

    def __post_init__(self) -> None:
        fault = _fault(self)
        if fault:
            raise ValueError(f"a result record must {fault}")

    def __getitem__(self, name: str) -> Any:
        return getattr(self, name) if name in FIELDS else self.extra[name]

    def __iter__(self) -> Iterator[str]:
        yield from FIELDS
        yield from self.extra

    def __len__(self) -> int:
        return len(FIELDS) + len(self.extra)

    @classmethod
    def from_dict(cls, data: Any, source: str = "", hint: str = "") -> ResultRecord:
        """The record in a JSON object; fields that are not known go to `extra`.

        Args:
            data: the object.
            source: its file.
            hint: what the message about a faulty one ends with.

        Raises:
            ValueError: if a required field is missing, or a field is of a wrong type.
        """
        fault = _fault(data)
        if fault:
            name = f"{source} must be a result record, which" if source else "a result record"
            raise ValueError(f"{name} must {fault}{hint}")
        known = {name: data[name] for name in FIELDS if name in data}
        extra = {name: value for name, value in data.items() if name not in FIELDS}
        return cls(**known, extra=extra, source=source)

    def with_fields(self, **changes: Any) -> ResultRecord:
        """The record with other values; a field that is not known goes to `extra`."""
        return ResultRecord.from_dict({**self, **changes}, self.source)


FIELDS = tuple(each.name for each in fields(ResultRecord) if each.name not in ("extra", "source"))
REQUIRED_FIELDS = FIELDS[: FIELDS.index("config") + 1]


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
        if record[name] is None:
            continue
        if not isinstance(record[name], Real) or isinstance(record[name], bool):
            return f"hold a number in {name}, got {name}={record[name]!r}"
        if name in _SHARES and not 0 <= record[name] <= 1:
            return f"hold a share in [0, 1] in {name}, got {name}={record[name]}"
    return None


def result_record(**found: Any) -> ResultRecord:
    """The record of a run: the given fields, and the environment where it is not given.

    Raises:
        ValueError: if a required field is missing, or a field is of a wrong type.
    """
    given = {"git_commit", "hardware", "versions"} <= set(found)
    return ResultRecord.from_dict(found if given else {**environment(), **found})


# Where a record is made.


def environment() -> dict[str, Any]:
    """What every result file says of where it was made: `git_commit`, `hardware`, and `versions`."""
    return {"git_commit": git_commit(), "hardware": hardware(), "versions": versions()}


def hardware() -> str:
    """The GPUs and their number, or the CPU and the cores that this process may use."""
    import torch  # slow to load, and not needed to read records

    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines() if cpuinfo.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    cpu = next(names, platform.processor() or platform.machine())
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{cpu}, {cores} cores"


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide a result; what is not installed is left out."""
    import torch

    from lte import __version__  # which imports this file

    found = {"python": platform.python_version(), "lte": __version__, "torch": str(torch.__version__)}
    if torch.version.cuda:
        found["cuda"] = torch.version.cuda
    for package in ("transformers", "accelerate", "triton", "numba"):
        with suppress(PackageNotFoundError):
            found[package] = version(package)
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
    place = Path(folder) if folder is not None else Path(__file__).resolve().parent
    with suppress(OSError, subprocess.SubprocessError):
        if _git(place, "ls-files"):
            commit = _git(place, "rev-parse", "HEAD")
            changed = _git(place, "status", "--porcelain", "--untracked-files=no")
            return f"{commit}-dirty" if changed or _git(place, "status", "--porcelain", ".") else commit
    return os.environ.get("LTE_GIT_COMMIT")


def _git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=30).stdout.strip()


# Packed numbers.


def pack_numbers(values: list[Any], *units: int) -> Any:
    """A list of numbers, or of equally long lists of them, as an object that `read_json` turns back into it.

    The object holds `packed`, whole numbers of 4 bytes (all lowest bytes first, then all next ones; deflated, as
    base64), their `shape`, and `per`: each number is a whole one divided by it.

    Args:
        values: numbers; those that do not fit stay as they are.
        units: numbers to divide by; the first that gives each number back exactly is taken.
    """
    try:
        array = np.array(values, dtype=np.float64)
    except (TypeError, ValueError):
        return values
    if not array.size or not np.isfinite(array).all():
        return values
    for per in units:
        if np.abs(array * per).max() < 2**31:
            whole = np.rint(array * per).astype("<i4")
            # Texts, since -0.0 and 1 are equal to numbers that they are not.
            if repr((whole / per).tolist()) == repr(values):
                planes = whole.view(np.uint8).reshape(-1, 4).T.tobytes()
                text = base64.b64encode(zlib.compress(planes, 9)).decode("ascii")
                return {"packed": text, "shape": list(array.shape), "per": per}
    return values


def unpack_numbers(data: Mapping[str, Any]) -> list[Any]:
    """The numbers that `pack_numbers` packed."""
    planes = np.frombuffer(zlib.decompress(base64.b64decode(data["packed"])), np.uint8).reshape(4, -1)
    whole = np.ascontiguousarray(planes.T).view("<i4").reshape(data["shape"])
    return (whole / data["per"]).tolist()


def packed_record(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record with its histograms, the use of its experts and its layers' history packed.

    The first are counts over the tokens, or over the scores of all experts; the history has four decimals.
    """
    found = dict(record)
    measurement, history = found.get("measurement"), found.get("layer_history")
    if isinstance(measurement, Mapping) and measurement.get("expert_use"):
        tokens, experts = measurement["tokens"], len(measurement["expert_use"][0])
        packed = {
            name: pack_numbers(measurement[name], tokens, tokens * experts)
            for name in ("expert_use", "score_histogram", "near_threshold")
            if name in measurement
        }
        found["measurement"] = {**measurement, **packed}
    if isinstance(history, Mapping):
        found["layer_history"] = {**history, "active_fraction": pack_numbers(history["active_fraction"], 10_000)}
    return found


# Reading.


def read_json(path: str | Path) -> Any:
    """What a JSON file holds, packed numbers unpacked.

    Raises:
        ValueError: for a file that is no JSON.
    """
    try:
        return parse_json(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} must hold JSON, got a file that does not: {error}") from error


def parse_json(text: str) -> Any:
    """What a JSON text holds, packed numbers unpacked."""
    return json.loads(text, object_hook=lambda each: unpack_numbers(each) if set(each) == _PACKED_KEYS else each)


def read_packed(path: Path) -> Mapping[Path, Any]:
    """What the lines of a `records.jsonl` hold, by the files that they were; empty where there is none.

    Raises:
        ValueError: for a line that is no JSON object with a file's name.
    """
    try:
        return _packed_lines(path, path.stat().st_mtime_ns)
    except FileNotFoundError:
        return {}


@lru_cache(maxsize=32)
def _packed_lines(path: Path, changed_ns: int) -> dict[Path, Any]:
    found = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            content = parse_json(line)
            found[path.with_name(content.pop(FILE_KEY))] = content
        except (ValueError, TypeError, AttributeError, KeyError) as error:
            raise ValueError(
                f"line {number} of {path} must be a JSON object with {FILE_KEY}, got {line[:40]!r}: {error}"
            ) from error
    return found


def find_record(path: Path) -> ResultRecord | None:
    """The record in a file, or in the line of the folder's `records.jsonl` that was this file; `None` without either.

    Raises:
        ValueError: for a file that is no JSON or no result record.
    """
    if path.exists():
        return load_record(path)
    content = read_packed(path.with_name(PACKED_FILE)).get(path)
    return None if content is None else ResultRecord.from_dict(content, str(path))


def load_record(path: str | Path) -> ResultRecord:
    """The result record in a file.

    Raises:
        ValueError: for a file that is no JSON or no result record.
    """
    return ResultRecord.from_dict(read_json(path), str(path))


def read_folder(folder: Path, pattern: str = "**/*.json") -> dict[Path, Any]:
    """What the JSON files below a folder hold, and those that were packed, in the order of their names.

    Hidden files are left out. The content of a file that is no JSON is its `ValueError`.

    Args:
        folder: where the files are.
        pattern: glob of the files, relative to `folder`.
    """
    found: dict[Path, Any] = {}
    for packed in folder.rglob(PACKED_FILE):
        found |= {path: content for path, content in read_packed(packed).items() if _matches(path, folder, pattern)}
    for path in folder.glob(pattern):
        if path.is_file():
            try:
                found[path] = read_json(path)
            except ValueError as error:
                found[path] = error
    shown = (path for path in found if not any(part.startswith(".") for part in path.relative_to(folder).parts))
    return {path: found[path] for path in sorted(shown)}


def _matches(path: Path, folder: Path, pattern: str) -> bool:
    """Whether `folder.glob(pattern)` would find a file; before Python 3.13 `match` takes `**` for one folder."""
    place, inner = path.relative_to(folder), pattern.removeprefix("**/")
    return place.match(inner) and (inner != pattern or len(place.parts) == len(Path(inner).parts))


def load_records(folder: str | Path, pattern: str = "**/*.json") -> list[ResultRecord]:
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
    found = []
    for path, content in read_folder(folder, pattern).items():
        if isinstance(content, ValueError):
            raise content
        found.append(ResultRecord.from_dict(content, str(path), hint=f"; narrow pattern={pattern!r}"))
    return found


# Writing.


def write_record(path: str | Path, record: ResultRecord) -> None:
    """Writes a record as a JSON file with its long lists packed."""
    write_json_atomic(path, packed_record(record))
