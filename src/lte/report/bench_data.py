"""What a page shows of a file of `lte bench`. JSON-ready."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lte.bench.rows import is_dense
from lte.report.inputs import Bench

_ROW_FIELDS = ("provider", "setting", "sparsity", "median_ms", "p20_ms", "p80_ms", "bandwidth_ms", "gb_per_s")
_TITLES = {"ffn": "FFN of one layer", "decode": "decoding step"}
_VARIANTS = ("dtype", "routing", "attention", "settings")


def bench_data(bench: Bench) -> dict[str, Any]:
    """One file.

    Returns:
        `name`; `source`; `latency`, a group for each benchmark and batch with its `rows`; `break_even` and `union`, as
        the file has them; `settings`, how it was measured.
    """
    content = bench.content
    name = bench_name(bench)
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for row in content["rows"]:
        if (title := _title(row)) is not None:
            groups.setdefault(title, []).append(row)
    return {
        "name": name,
        "source": bench.source,
        "latency": [
            {"title": f"{title}: {name}", "rows": [_row(row, _provider(row, rows)) for row in rows]}
            for title, rows in groups.items()
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
    dtypes = dict.fromkeys(row["dtype"] for row in rows)
    parts = [content.get("model") or first.get("model") or content.get("shape"), " and ".join(map(str, dtypes))]
    parts += [f"{weights} weights"] if weights not in (None, "native") else []
    parts += [content.get("hardware") or first.get("hardware")]
    return f"{', '.join(str(part) for part in parts if part)} ({Path(bench.source).name})"


def _whole(rows: Any, fields: Sequence[str]) -> list[Any]:
    """The rows that have all fields."""
    found = rows if isinstance(rows, list) else []
    return [row for row in found if isinstance(row, Mapping) and all(name in row for name in fields)]


def _title(row: Mapping[str, Any]) -> str | None:
    """What a row timed; rows with the same title share a picture, those without one are in none."""
    if row["benchmark"] == "prefill":
        # lte bench times whole prompts, benchmarks/prefill.py the FFN of one layer.
        return f"prompt of {row['tokens']} tokens" if row.get("scope") == "model" else f"FFN, {row['tokens']} tokens"
    title = _TITLES.get(row["benchmark"])
    return None if title is None else f"{title}, batch {row['batch']}"


def _provider(row: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> str:
    """The provider, and what tells its rows apart where a setting and sparsity come twice."""
    own = [each for each in rows if each["provider"] == row["provider"]]
    if len({(each.get("setting"), each["sparsity"]) for each in own}) == len(own):
        return str(row["provider"])
    differing = [name for name in _VARIANTS if len({each.get(name) for each in own}) > 1]
    texts = [f"{row.get(name)} routing" if name == "routing" else str(row.get(name)) for name in differing]
    return ", ".join([str(row["provider"]), *texts])


def _row(row: Mapping[str, Any], provider: str) -> dict[str, Any]:
    return {**{name: row.get(name) for name in _ROW_FIELDS}, "provider": provider, "is_dense": is_dense(dict(row))}
