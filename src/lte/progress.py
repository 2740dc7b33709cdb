"""Bars for work that takes a while, where a caller asks for them: deep functions say what they go through, no more."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

Item = TypeVar("Item")
# The console of rich on which bars are shown, `None` for none.
_CONSOLE: ContextVar[Any] = ContextVar("progress_console", default=None)


@contextmanager
def shown_on(console: Any) -> Iterator[None]:
    """Shows the bars of what runs in the block on a console of rich."""
    token = _CONSOLE.set(console)
    try:
        yield
    finally:
        _CONSOLE.reset(token)


def tracked(items: Iterable[Item], what: str) -> Iterator[Item]:
    """Goes through items with a bar, and leaves a line that says how long they took.

    Without `shown_on` it only goes through them.

    Args:
        items: with a length if the bar is to know its end.
        what: is done with them, as the start of a line: "Grouping neurons".
    """
    console = _CONSOLE.get()
    if console is None:
        yield from items
        return
    from rich.progress import track  # `import lte` does without

    start = time.monotonic()
    # Into a file a bar would be a line of nothing.
    yield from track(items, what, console=console, transient=True) if console.is_terminal else items
    console.print(f"{what}: {duration(time.monotonic() - start)}.", highlight=False, markup=False)


def duration(seconds: float) -> str:
    """Seconds as people say them: 40 s, 12 min, 3 h 5 min."""
    if seconds < 99.5:
        return f"{seconds:.0f} s" if seconds >= 9.95 else f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    if minutes < 100:
        return f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60} min"
