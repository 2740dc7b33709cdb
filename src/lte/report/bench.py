"""What is shown of `lte bench`: tables for the terminal, and the data of a page, JSON-ready."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

from rich.table import Table

from lte.bench.rows import is_dense
from lte.report.curves import field_value
from lte.report.inputs import Bench
from lte.report.tables import TextTable, percent

Row = dict[str, Any]


def latency_table(rows: Sequence[Row], copy_gb_per_s: float) -> Table:
    """All result rows; a line between groups of the same benchmark, batch and number of tokens."""
    table = Table(
        title=bench_title(rows) if rows else "no rows",
        caption="x dense: over the fastest dense PyTorch provider timed beside it; x step: over the dense whole step; "
        f"of copy: share of the {copy_gb_per_s:.0f} GB/s at which this machine copies memory; FFN times are per layer",
        title_justify="left",
        caption_justify="left",
    )
    texts = ("benchmark", "provider", "path", "time split")
    timed = ("benchmark", "batch", "tokens", "provider", "sparsity", "ms", "p20 - p80", "x dense", "x step")
    for name in (*timed, "MB", "GB/s", "of copy", "path", "time split"):
        table.add_column(name, justify="left" if name in texts else "right", no_wrap=name != "time split")
    for _, group in groupby(rows, itemgetter("benchmark", "batch", "tokens")):
        for row in group:
            table.add_row(*_cells(row))
        table.add_section()
    return table


def bench_title(rows: Sequence[Row]) -> str:
    """The model, the number format and the machine of rows that were timed together."""
    return f"{rows[0].get('model', 'model')}, {rows[0]['dtype']}, {rows[0]['hardware']}"


def _cells(row: Row) -> list[str]:
    phases = row.get("phase_ms") or {}
    ratios = (row.get("ratio_to_dense"), row.get("ratio_to_dense_step"))
    dense = row.get("setting") is None
    own = " own" if (row.get("setting") or "").startswith("own") else ""
    return [
        row["benchmark"],
        str(row["batch"]),
        str(row["tokens"]),
        row["provider"],
        "-" if dense else f"{100 * row['sparsity']:.1f}%{own}",
        f"{row['median_ms']:.4f}",
        f"{row['p20_ms']:.4f} - {row['p80_ms']:.4f}",
        *("" if ratio is None else f"{ratio:.3f}" for ratio in ratios),
        f"{row['bytes'] / 1e6:.1f}",
        f"{row['gb_per_s']:.0f}",
        f"{100 * row['share_of_copy']:.0f}%",
        row.get("path") or "",
        ", ".join(f"{name} {time:.4f}" for name, time in phases.items()),
    ]


def setting_words(setting: str) -> str:
    """A row's setting for readers: `50%`, `own routing`, `own routing at 80%`."""
    share = setting.removeprefix("own").removeprefix("@")
    if not share:
        return "own routing"
    percent = f"{100 * float(share):g}%"
    return percent if share == setting else f"own routing at {percent}"


def union_report(rows: Sequence[Row]) -> Table:
    """The share of experts that a batch needs, beside that of independent tokens."""
    shares = [(row["union"], row["independent"], 1 - row["union"]) for row in rows]
    cells = [(str(row["batch"]), *map(percent, found)) for row, found in zip(rows, shares, strict=True)]
    header = ("batch", "union", "if independent", "union sparsity")
    return TextTable(header, cells, 0, "Experts that at least one of a batch's tokens needs").rich()


def break_even_report(rows: Sequence[Row]) -> Table:
    """The batch from which the sparse path is not faster than the fastest dense provider."""
    cells = []
    for row in rows:
        pairs = zip(row["batches"], row["ratios"], strict=True)
        last = f"none up to {row['batches'][-1]}" if row["break_even"] is None else str(row["break_even"])
        ratios = ", ".join(f"{batch}: {ratio:.3f}" for batch, ratio in pairs)
        cells.append((row["benchmark"], setting_words(row["setting"]), ratios, last))
    return TextTable(
        ("benchmark", "sparsity", "latency over dense by batch", "break-even"), cells, 4, "Break-even batch"
    ).rich()


_ROW_FIELDS = ("sparsity", "median_ms", "p20_ms", "p80_ms", "bandwidth_ms")
_TITLES = {"ffn": "FFN of one layer", "decode": "decoding step"}
_VARIANTS = ("dtype", "routing", "attention", "settings")


def bench_data(bench: Bench) -> dict[str, Any]:
    """One file.

    Returns:
        `name`; `latency`, a group for each benchmark and batch with its `rows`; `break_even` and `union`, as the file
        has them, but for settings in words.
    """
    content, name = bench.content, bench_name(bench)
    groups: dict[str | None, list[Row]] = defaultdict(list)
    for row in content["rows"]:
        groups[_title(row)].append(row)
    groups.pop(None, None)
    return {
        "name": name,
        "latency": [
            {"title": f"{title}: {name}", "rows": [_row(row, rows) for row in rows]} for title, rows in groups.items()
        ],
        "break_even": [
            {**row, "setting": setting_words(row["setting"])}
            for row in _whole(content, "break_even", "benchmark", "setting", "batches", "ratios", "break_even")
        ],
        "union": _whole(content, "union", "batch", "union"),
    }


def bench_name(bench: Bench) -> str:
    """Model, number format, machine, and the file."""
    rows, content = bench.content["rows"], bench.content
    first = rows[0] if rows else {}
    weights = field_value(content, "kernels.weights")
    dtypes = dict.fromkeys(row["dtype"] for row in rows)
    parts = [content.get("model") or first.get("model") or content.get("shape"), " and ".join(map(str, dtypes))]
    parts += [f"{weights} weights"] if weights not in (None, "native") else []
    parts += [content.get("hardware") or first.get("hardware")]
    return f"{', '.join(str(part) for part in parts if part)} ({Path(bench.source).name})"


def _whole(content: Mapping[str, Any], name: str, *fields: str) -> list[Any]:
    """The rows of a list that have all fields."""
    rows = content.get(name)
    found = rows if isinstance(rows, list) else []
    return [row for row in found if isinstance(row, Mapping) and all(field in row for field in fields)]


def _title(row: Row) -> str | None:
    """What a row timed; rows with the same title share a picture, those without one are in none."""
    if row["benchmark"] == "prefill":
        # lte bench times whole prompts, benchmarks/prefill.py the FFN of one layer.
        return f"prompt of {row['tokens']} tokens" if row.get("scope") == "model" else f"FFN, {row['tokens']} tokens"
    title = _TITLES.get(row["benchmark"])
    return None if title is None else f"{title}, batch {row['batch']}"


def _provider(row: Row, rows: Sequence[Row]) -> str:
    """The provider, and what tells its rows apart where a setting and sparsity come twice."""
    own = [each for each in rows if each["provider"] == row["provider"]]
    if len({(each.get("setting"), each["sparsity"]) for each in own}) == len(own):
        return str(row["provider"])
    differing = [name for name in _VARIANTS if len({each.get(name) for each in own}) > 1]
    texts = [f"{row.get(name)} routing" if name == "routing" else str(row.get(name)) for name in differing]
    return ", ".join([str(row["provider"]), *texts])


def _row(row: Row, rows: Sequence[Row]) -> dict[str, Any]:
    setting = row.get("setting") or ""
    own = "dense" if is_dense(row) else setting_words(setting) if setting.startswith("own") else ""
    shown = {name: row.get(name) for name in _ROW_FIELDS}
    return {**shown, "provider": _provider(row, rows), "is_dense": is_dense(row), "own": own}
