"""Tokens per second of `generate`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from lte.eval import speed
from lte.eval.speed import LEAST_ROUNDS, TokenClock, interleaved_token_s
from tests.tiny_models import tiny_dense_model


class Inner:
    """A streamer that keeps what it gets."""

    def __init__(self) -> None:
        self.found: list[Any] = []

    def put(self, value: torch.Tensor) -> None:
        self.found.append(value.flatten().tolist())

    def end(self) -> None:
        self.found.append("end")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Time that passes when it is told to."""
    now = [0.0]
    monkeypatch.setattr(speed.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(speed.time, "monotonic", lambda: now[0])

    def wait(seconds: float) -> None:
        now[0] += seconds

    return wait


def test_the_prompt_is_not_part_of_the_time(clock: Callable[[float], None]) -> None:
    timer = TokenClock()
    for seconds in (0, 50, 1, 2, 4):  # the prompt, then four tokens
        clock(seconds)
        timer.put(None)
    timer.end()
    assert timer.token_s == [1, 2, 4]


@pytest.mark.parametrize("tokens", [1, 5])
def test_generate_tells_it_of_each_token(tokens: int) -> None:
    inner, ids = Inner(), torch.tensor([[5, 6, 7]])
    timer = TokenClock(inner)
    settings = {"max_new_tokens": tokens, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    output = tiny_dense_model().generate(ids, streamer=timer, **settings)[0].tolist()
    assert inner.found == [[5, 6, 7], *([token] for token in output[3:]), "end"]
    assert len(timer.token_s) == tokens - 1
    assert all(seconds > 0 for seconds in timer.token_s)


def test_models_take_turns_and_the_first_turn_is_not_counted(clock: Callable[[float], None]) -> None:
    order: list[str] = []

    def run(name: str, seconds: float) -> Callable[[TokenClock], None]:
        def write(timer: TokenClock) -> None:
            order.append(name)
            timer.put(None)
            timer.put(None)
            clock(seconds if len(order) > 2 else 1000.0)
            timer.put(None)

        return write

    runs = {"slow": run("slow", 3.0), "fast": run("fast", 2.0)}
    assert interleaved_token_s(runs, rounds=2, seconds=1e9) == {"slow": [3.0, 3.0], "fast": [2.0, 2.0]}
    assert order == ["slow", "fast"] * 3
    # The time is over in the first round; some are timed nevertheless.
    assert len(interleaved_token_s(runs, rounds=50, seconds=1.0)["slow"]) == LEAST_ROUNDS
