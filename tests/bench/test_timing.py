from __future__ import annotations

import time

import pytest
import torch

from lte.bench import timing
from lte.bench.rows import timed_row, with_ratios
from lte.bench.timing import Times, copy_gb_per_s, interleaved_times

CPU = torch.device("cpu")


def test_percentiles() -> None:
    times = Times.of([5.0, 1.0, 2.0, 4.0, 3.0])
    assert (times.median_ms, times.p20_ms, times.p80_ms) == (3.0, pytest.approx(1.8), pytest.approx(4.2))
    assert Times.of([7.0]) == Times(7.0, 7.0, 7.0)


def test_functions_take_turns_after_warming_up() -> None:
    order: list[str] = []
    runs = {"a": lambda: order.append("a"), "b": lambda: order.append("b")}
    times = interleaved_times(runs, CPU, repeats=4, before=lambda name: order.append(f"before {name}"))
    assert order[:4] == ["before a", "a", "before b", "b"]
    assert len(order) == 4 * (4 + timing.WARM_UP)
    assert [len(found) for found in times.values()] == [4, 4]


def test_the_sleep_of_a_function_is_in_its_time() -> None:
    times = interleaved_times({"slow": lambda: time.sleep(0.01), "fast": lambda: None}, CPU, repeats=3)
    assert min(times["slow"]) >= 10
    assert min(times["fast"]) < 10


def test_slow_functions_are_repeated_less(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "SECONDS", 0.0)
    assert len(interleaved_times({"a": lambda: None}, CPU, repeats=50)["a"]) == timing.LEAST_REPEATS


def test_memory_is_copied_at_some_speed() -> None:
    assert 0.01 < copy_gb_per_s(CPU) < 10_000


def test_a_row_and_its_ratio() -> None:
    dense = [timed_row([time], 8e6, 10.0, provider=f"dense {time}") for time in (4.0, 2.0)]
    ours = timed_row([1.0], 4e6, 10.0, provider="lte")
    assert ours["gb_per_s"] == 4.0
    assert ours["share_of_copy"] == 0.4
    assert ours["bandwidth_ms"] == 0.4
    assert [row["ratio_to_dense"] for row in with_ratios([*dense, ours])] == [2.0, 1.0, 0.5]
    assert {row["dense_ms"] for row in with_ratios([*dense, ours])} == {2.0}
    assert with_ratios([ours])[0]["ratio_to_dense"] is None
