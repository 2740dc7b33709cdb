"""What a page shows of a file of `lte bench`. JSON-ready."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lte.report.inputs import Bench

_ROW_FIELDS = ("provider", "setting", "sparsity", "median_ms", "p20_ms", "p80_ms", "bandwidth_ms", "gb_per_s")
_TITLES = {"ffn": "FFN of one layer", "decode": "decoding step"}


def bench_data(bench: Bench) -> dict[str, Any]:
    """One file.

    Returns:
        `name`; `source`; `latency`, a group for each benchmark and batch with its `rows`; `break_even` and `union`, as
        the file has them; `settings`, how it was measured.
    """
    content = bench.content
    rows = content["rows"]
    name = bench_name(bench)
    keys = dict.fromkeys((row["benchmark"], row["batch"]) for row in rows if row["benchmark"] in _TITLES)
    return {
        "name": name,
        "source": bench.source,
        "latency": [
            {
                "title": f"{_TITLES[benchmark]}, batch {batch}: {name}",
                "rows": [_row(row) for row in rows if (row["benchmark"], row["batch"]) == (benchmark, batch)],
            }
            for benchmark, batch in keys
        ],
        "break_even": _whole(content.get("break_even"), ("benchmark", "setting", "batches", "ratios", "break_even")),
        "union": _whole(content.get("union"), ("batch", "union")),
        "details": {
            "command": content.get("command"),
            "hardware": content.get("hardware"),
            "git_commit": content.get("git_commit"),
            "versions": content.get("versions"),
            "settings": content.get("settings"),
        },
    }


def bench_name(bench: Bench) -> str:
    """Model, number format, machine, and the file."""
    rows, content = bench.content["rows"], bench.content
    first = rows[0] if rows else {}
    kernels = content.get("kernels") or {}
    weights = kernels.get("weights") if isinstance(kernels, Mapping) else None
    parts = [content.get("model") or first.get("model"), first.get("dtype")]
    parts += [f"{weights} weights"] if weights not in (None, "native") else []
    parts += [content.get("hardware") or first.get("hardware")]
    return f"{', '.join(str(part) for part in parts if part)} ({Path(bench.source).name})"


def _whole(rows: Any, fields: Sequence[str]) -> list[Any]:
    """The rows that have all fields."""
    found = rows if isinstance(rows, list) else []
    return [row for row in found if isinstance(row, Mapping) and all(name in row for name in fields)]


def _row(row: Mapping[str, Any]) -> dict[str, Any]:
    return {**{name: row.get(name) for name in _ROW_FIELDS}, "is_dense": row.get("setting") is None}
