"""How fast `generate` writes: tokens per second, of several models in turn."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any

from transformers.generation.streamers import BaseStreamer

ROUNDS, LEAST_ROUNDS, SECONDS = 6, 3, 20.0


class TokenClock(BaseStreamer):
    """A streamer that notes when each token comes.

    Args:
        inner: another streamer, which gets the tokens as well.
    """

    def __init__(self, inner: Any = None):
        self.inner = inner
        self._times: list[float] = []

    def put(self, value: Any) -> None:
        """Takes the prompt, and then token by token."""
        self._times.append(time.perf_counter())
        if self.inner is not None:
            self.inner.put(value)

    def end(self) -> None:
        """The end of the answer."""
        if self.inner is not None:
            self.inner.end()

    @property
    def token_s(self) -> list[float]:
        """Seconds from each token of the answer to the next; the prompt takes its own time."""
        return [later - earlier for earlier, later in pairwise(self._times[1:])]


def interleaved_token_s(
    runs: Mapping[str, Callable[[TokenClock], object]], rounds: int = ROUNDS, seconds: float = SECONDS
) -> dict[str, list[float]]:
    """Seconds of each token of several functions that write the same number of tokens; they take turns.

    Args:
        runs: by name; each calls `generate` with the streamer that it gets.
        rounds: turns of each after one that is not timed; fewer, but at least `LEAST_ROUNDS`, if they take too long.
        seconds: after which no further round begins.
    """
    end = time.monotonic() + seconds
    found: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds + 1):
        if number > LEAST_ROUNDS and time.monotonic() > end:
            break
        for name, run in runs.items():
            clock = TokenClock()
            run(clock)
            # The first turn compiles, and sets up memory and threads.
            found[name] += clock.token_s if number else []
    return found
