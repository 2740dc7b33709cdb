"""Result rows of a benchmark, written as JSON and CSV after every group, so that a run that is cut off leaves them."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lte.files import write_json_atomic, write_text_atomic

REQUIRED_FIELDS = (
    "benchmark",
    "provider",
    "dtype",
    "batch",
    "tokens",
    "sparsity",
    "median_ms",
    "p20_ms",
    "p80_ms",
    "bytes",
    "gb_per_s",
    "hardware",
    "versions",
    "git_commit",
)
Row = dict[str, Any]
DENSE_STEP = "dense whole step"
"""The provider that is no PyTorch baseline, but our own decoding step with all experts on and no router."""


def timed_row(samples_ms: list[float], size: float, copy_gb_per_s: float, **fields: Any) -> Row:
    """One provider's row: times, bytes and the bandwidth that follows from both.

    Args:
        samples_ms: its times.
        size: bytes that it must read and write.
        copy_gb_per_s: what this machine reaches when it copies memory.
        fields: what else the row says.
    """
    from lte.bench.timing import Times  # loads torch, which reading rows does not need

    times = Times.of(samples_ms)
    reached = size / times.median_ms / 1e6
    return {
        **fields,
        **asdict(times),
        "bytes": int(size),
        "gb_per_s": reached,
        "share_of_copy": reached / copy_gb_per_s,
        "bandwidth_ms": size / copy_gb_per_s / 1e6,
    }


def with_ratios(rows: list[Row]) -> list[Row]:
    """Adds `dense_ms`, the median of the fastest dense provider among these rows, and `ratio_to_dense`, over it.

    A dense provider is one whose name starts with "dense", but for the dense whole step, which is ours: where it is
    among the rows, `ratio_to_dense_step` is over it. Without any dense provider both are `None`.
    """
    dense = min((row["median_ms"] for row in rows if is_dense(row) and row["provider"] != DENSE_STEP), default=None)
    ours = next((row["median_ms"] for row in rows if row["provider"] == DENSE_STEP), None)
    added = [{"dense_ms": dense, "ratio_to_dense": None if dense is None else row["median_ms"] / dense} for row in rows]
    if ours is not None:
        added = [{**new, "ratio_to_dense_step": row["median_ms"] / ours} for row, new in zip(rows, added, strict=True)]
    return [{**row, **new} for row, new in zip(rows, added, strict=True)]


def is_dense(row: Row) -> bool:
    """Whether a row is that of a dense baseline."""
    return str(row["provider"]).startswith("dense")


class ResultFile:
    """The rows of a run, by group, and the files that hold them.

    Args:
        prefix: path without ending; `None` writes nothing.
        environment: hardware, versions, git_commit; every row carries them.
        header: what the JSON file says besides: the settings, the copy bandwidth.
    """

    def __init__(self, prefix: Path | None, environment: dict[str, Any], header: dict[str, Any]):
        self.prefix, self.environment, self.header = prefix, environment, dict(header)
        self.groups: dict[Any, list[Row]] = {}

    @property
    def rows(self) -> list[Row]:
        """All rows, each with the environment."""
        return [{**row, **self.environment} for group in self.groups.values() for row in group]

    def put(self, group: Any, rows: list[Row]) -> None:
        """Sets the rows of a group, in place of those that it had, and writes the files.

        Raises:
            ValueError: if a row lacks one of `REQUIRED_FIELDS`.
        """
        for row in rows:
            missing = [name for name in REQUIRED_FIELDS if name not in row and name not in self.environment]
            if missing:
                raise ValueError(f"a row must hold {', '.join(REQUIRED_FIELDS)}, got one without {', '.join(missing)}")
        self.groups[group] = rows
        self.write()

    def note(self, **facts: Any) -> None:
        """Adds facts to the header of the JSON file."""
        self.header |= facts
        self.write()

    def path(self, ending: str) -> Path | None:
        """The file of that ending: `out/ffn` gives `out/ffn.json`."""
        return None if self.prefix is None else self.prefix.with_name(f"{self.prefix.name}.{ending}")

    def write(self) -> None:
        """Writes JSON and CSV."""
        json_path, csv_path = self.path("json"), self.path("csv")
        if json_path is None or csv_path is None:
            return
        write_json_atomic(json_path, {**self.header, **self.environment, "rows": self.rows})
        write_text_atomic(csv_path, csv_text(self.rows))


def csv_text(rows: Sequence[Row], first: Sequence[str] = REQUIRED_FIELDS) -> str:
    """Rows as CSV, the `first` columns before all others; what is no number or text becomes JSON."""
    columns = [*first, *sorted({name for row in rows for name in row} - set(first))]
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({k: json.dumps(v) if isinstance(v, dict | list) else v for k, v in row.items()})
    return text.getvalue()
