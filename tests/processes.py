"""Starting test programs in one or several processes of their own: on CPUs, or with `LTE_TEST_BACKEND=nccl` on GPUs."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from filelock import FileLock

ROOT = Path(__file__).parents[1]
ON_GPUS = os.environ.get("LTE_TEST_BACKEND") == "nccl"


def run_processes(count: int, *arguments: object, timeout_s: float = 300) -> str:
    """Runs `python -m arguments` in `count` processes that find each other, by `torchrun`; returns what they print."""
    done = launch(count, "-m", *arguments, timeout_s=timeout_s)
    assert done.returncode == 0, done.stderr
    return done.stdout


def run_forked(counts: str, *arguments: object, timeout_s: float = 300) -> str:
    """As `run_processes`, in processes that import what they need once for all; of each of `counts`, in turn."""
    if ON_GPUS:
        # CUDA does not start in a process forked from one that has asked for its GPUs.
        return "".join(run_processes(int(count), *arguments, timeout_s=timeout_s) for count in counts.split(","))
    done = launch(1, "-m", "tests.forked", counts, *arguments, timeout_s=timeout_s)
    assert done.returncode == 0, done.stderr
    return done.stdout


def launch(count: int, *arguments: object, timeout_s: float) -> subprocess.CompletedProcess[str]:
    """Runs `python arguments` as `run_processes` does, and returns however it ended."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    launcher = launcher if count > 1 or ON_GPUS else []
    command = [sys.executable, *launcher, *map(str, arguments)]
    # What is on the path already stays: it may be the transformers version under test.
    path = os.pathsep.join(filter(None, [str(ROOT), str(ROOT / "src"), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    if not ON_GPUS:
        environment["CUDA_VISIBLE_DEVICES"] = ""  # all on the CPU, or one and two processes would differ in device
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout_s)


def connect(backend: str = "nccl") -> None:
    """In a process of a test: has it find the others, by gloo on the CPU; on GPUs by `backend` and on its own one."""
    if ON_GPUS:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        # Some tests hold runs together to the last bit.
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
        torch.use_deterministic_algorithms(True, warn_only=True)
    dist.init_process_group(backend if ON_GPUS else "gloo")


def fitting(counts: Iterable[int]) -> list[int]:
    """The numbers of processes that can run: all on CPUs, as many as there are GPUs with nccl."""
    return [count for count in counts if not ON_GPUS or count <= torch.cuda.device_count()]


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """A folder that `make` fills, in one of the workers among which pytest-xdist spreads the tests of a module."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        make(folder := factory.mktemp(name))
        return folder
    folder = factory.getbasetemp().parent / name
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            partial = factory.mktemp(name)
            make(partial)
            partial.rename(folder)
    return folder
