"""The `lte` command, see `lte_cli.commands`; here is what must be there before anything else is loaded."""

from __future__ import annotations

import io
import logging
import os
import sys
from importlib import import_module
from typing import Any

# Whether this process is the command; `import lte` then loads torch and transformers when they are needed.
is_running = False


def main() -> None:
    """Runs the `lte` command."""
    global is_running
    is_running = True
    sys.stdout, sys.stderr = _forgiving(sys.stdout, 1), _forgiving(sys.stderr, 2)
    # transformers loads torchao and bitsandbytes where they are installed, which then name their kernels that fit no
    # GPU or CPU here.
    for name in ("torchao", "torch.utils._pytree", "bitsandbytes"):
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        import_module("lte_cli.commands").app(prog_name="lte")
    except KeyboardInterrupt:
        print("Interrupted: stopped by Ctrl-C", file=sys.stderr)
        sys.exit(130)


def __getattr__(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module("lte_cli.commands"), name)


class _LossyFile(io.FileIO):
    """The terminal, or what stands for it: where nobody reads any more, or nothing can be written, output is lost.

    A training of hours must not end because of what it says.
    """

    def write(self, data: Any) -> int:
        try:
            return super().write(data) or 0
        except BlockingIOError:
            raise
        except OSError:
            return memoryview(data).nbytes


def _forgiving(stream: Any, descriptor: int) -> Any:
    """A standard stream that never raises: it escapes the characters that it cannot show."""
    if stream is None:
        # It was closed. Its number must not become that of another file.
        return open(os.devnull, "w", encoding="utf-8")  # noqa: PTH123
    try:
        is_file = stream.fileno() == descriptor and os.name != "nt"
    except (OSError, ValueError):
        is_file = False
    if not is_file:
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
        return stream
    raw = _LossyFile(descriptor, "w", closefd=False)
    line_buffering = descriptor == 2 or raw.isatty()
    return io.TextIOWrapper(io.BufferedWriter(raw), stream.encoding, "backslashreplace", line_buffering=line_buffering)
