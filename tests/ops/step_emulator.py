"""The CUDA kernel of a decoding step compiled by g++ and run on the CPU, a fiber for each thread."""

from __future__ import annotations

import ctypes
import hashlib
import itertools
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from lte.ops.step.compile import SOURCE, definitions
from lte.ops.step.cuda import Launch, Machine


@dataclass(frozen=True, kw_only=True)
class Emulator(Machine):
    """A machine for `CudaEngine`; each launch has another order of threads.

    Attributes:
        folder: for the compiled kernels.
        seeds: of the orders.
    """

    folder: Path
    seeds: itertools.count[int] = field(default_factory=itertools.count)

    def load(self, macros: Mapping[str, int]) -> Launch:
        options = definitions(macros)
        library = self.folder / f"{hashlib.sha256(repr(options).encode()).hexdigest()[:20]}.so"
        if not library.exists():
            flags = ["-O1", "-fno-strict-aliasing", "-std=c++17", "-shared", "-fPIC", "-w", "-x", "c++"]
            command = ["g++", *flags, "-DLTE_ON_CPU", *options, "-o", str(library), str(SOURCE)]
            done = subprocess.run(command, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
        kernel = ctypes.CDLL(str(library))

        def launch(args: ctypes.Structure) -> None:
            if not kernel.launch(ctypes.byref(args), self.blocks, next(self.seeds)):
                raise RuntimeError("the kernel hangs")

        return launch
