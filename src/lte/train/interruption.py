"""SIGTERM in a training: it is written down at the end of the step, and the process ends.

Slurm and Kubernetes send it to a job that has to leave its node, some time before they kill it.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import FrameType
from typing import Any

EXIT_TERMINATED = 128 + signal.SIGTERM
# Slurm signals all processes of a step, launchers too, which pass the signal on: both are one request.
REPEATED_S = 5.0


class TrainingStopped(SystemExit):
    """A training ended early, after a SIGTERM, and wrote a checkpoint; a script that does not catch it exits with 143.

    Attributes:
        message: which checkpoint goes on from there.
    """

    def __init__(self, message: str):
        super().__init__(EXIT_TERMINATED)
        self.message = message


class EvaluationCutError(Exception):
    """Ends an evaluation inside a training after a SIGTERM, so that there is time for the checkpoint."""


class StopRequest:
    """Whether this process was asked to end."""

    def __init__(self) -> None:
        self.asked_at: float | None = None

    @property
    def asked(self) -> bool:
        """Whether the signal came."""
        return self.asked_at is not None

    def note(self, number: int, frame: FrameType | None) -> None:
        """The handler: one more signal, `REPEATED_S` or later after the first, ends the process at once."""
        now = time.monotonic()
        if self.asked_at is None:
            self.asked_at = now
        elif now - self.asked_at >= REPEATED_S:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)


@contextmanager
def noted_sigterm(request: StopRequest, listens: bool) -> Iterator[None]:
    """Notes a SIGTERM inside the block, if `listens` and nobody else handles it; otherwise it does what it did."""
    in_main = threading.current_thread() is threading.main_thread()
    if not (listens and in_main and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL):
        yield
        return
    signal.signal(signal.SIGTERM, request.note)
    try:
        yield
    finally:
        # Unless somebody put a handler of their own there meanwhile.
        if signal.getsignal(signal.SIGTERM) == request.note:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


def keep_workers(loader: Any) -> Any:
    """A data loader whose workers outlive a SIGTERM to all processes of a job: the last step may still read."""
    base = getattr(loader, "base_dataloader", loader)
    if getattr(base, "num_workers", 0):
        base.worker_init_fn = partial(_ignore_sigterm, getattr(base, "worker_init_fn", None))
    return loader


def _ignore_sigterm(first: Callable[[int], object] | None, worker: int) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if first is not None:
        first(worker)
