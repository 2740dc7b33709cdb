"""Runs a module in several processes forked from this one, which has imported it: an import for all, not one for each.

    python -m tests.forked 2,4 module arguments

As `torchrun` does, it runs them with what PyTorch needs to connect them, here first 2 and then 4 of them, and ends all
if one fails.
"""

from __future__ import annotations

import gc
import importlib
import os
import runpy
import signal
import sys
import traceback
from datetime import timedelta

import torch.distributed as dist
import tqdm

HOST = "127.0.0.1"


def run_rank(rank: int, count: int, port_reader: int) -> None:
    """One process: the program, once the port is known; leaves with its exit code."""
    code = 1
    try:
        ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "GROUP_RANK": 0}
        place = {"GROUP_WORLD_SIZE": 1, "MASTER_ADDR": HOST, "MASTER_PORT": os.read(port_reader, 16).decode()}
        os.environ.update({name: str(value) for name, value in {**ranks, **place}.items()})
        # The process that forked this one holds the store.
        os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def run_ranks(count: int) -> int:
    """All processes; returns 0, or the status of the first that failed."""
    children = []
    pipes = [os.pipe() for _ in range(count)]
    for rank, (reader, _) in enumerate(pipes):
        child = os.fork()
        if child == 0:
            run_rank(rank, count, reader)
        children.append(child)
    # It has threads, so it comes after the forks.
    store = dist.TCPStore(HOST, 0, is_master=True, wait_for_workers=False, timeout=timedelta(minutes=2))
    for reader, writer in pipes:
        os.write(writer, str(store.port).encode())
        os.close(writer)
        os.close(reader)
    failed = 0
    for _ in range(count):
        child, status = os.wait()
        children.remove(child)
        if status and not failed:
            failed = status
            for other in children:
                os.kill(other, signal.SIGKILL)
    return failed


def main() -> None:
    counts, name = sys.argv[1], sys.argv[2]
    sys.argv = sys.argv[2:]
    # Its thread would be missing in the children.
    tqdm.tqdm.monitor_interval = 0
    importlib.import_module(name)
    # Else each child would copy all of it in its first collection.
    gc.freeze()
    for count in map(int, counts.split(",")):
        if run_ranks(count):
            sys.exit(1)


if __name__ == "__main__":
    main()
