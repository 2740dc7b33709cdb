"""Files of `lte bench` that the tests of the report layer share."""

from __future__ import annotations

from typing import Any

from lte.report.inputs import Bench


def bench_row(provider: str, setting: str | None, sparsity: float, median_ms: float, **changes: Any) -> dict[str, Any]:
    """A row of the decoding step at batch 1."""
    fields: dict[str, Any] = {
        "benchmark": "decode",
        "provider": provider,
        "dtype": "bfloat16",
        "batch": 1,
        "tokens": 1,
        "setting": setting,
        "sparsity": sparsity,
        "median_ms": median_ms,
        "p20_ms": median_ms * 0.9,
        "p80_ms": median_ms * 1.2,
        "bytes": 1000,
        "gb_per_s": 10.0,
        "bandwidth_ms": 1.0 - sparsity / 2,
        "hardware": "1 x GPU",
        "versions": {},
        "git_commit": None,
    }
    return {**fields, **changes}


def bench_content(**changes: Any) -> dict[str, Any]:
    """Dense and sparse decoding with the union of experts and a break-even batch of 4."""
    rows = [
        bench_row("dense eager", None, 0.0, 4.0),
        bench_row("lte", "0.5", 0.5, 3.0),
        bench_row("lte", "0.8", 0.8, 2.0),
    ]
    fields: dict[str, Any] = {
        "model": "tiny",
        "hardware": "1 x GPU",
        "kernels": {"weights": "int8"},
        "rows": rows,
        "union": [
            {"batch": 1, "union": 0.25, "independent": 0.25, "groups": 4},
            {"batch": 4, "union": 0.5, "independent": 0.68, "groups": 1},
        ],
        "break_even": [
            {"benchmark": "decode", "setting": "0.5", "batches": [1, 4], "ratios": [0.75, 1.1], "break_even": 4},
            {"benchmark": "decode", "setting": "0.8", "batches": [1, 4], "ratios": [0.5, 0.9], "break_even": None},
        ],
    }
    return {**fields, **changes}


def bench(**changes: Any) -> Bench:
    """The same, as it is read."""
    return Bench(bench_content(**changes), "bench/tiny.json")
