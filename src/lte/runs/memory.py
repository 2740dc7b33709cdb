"""Memory of the runs of a comparison, which follow each other in one process."""

from __future__ import annotations

import gc
import sys
from typing import Any

import torch


def free_memory(compiled: bool) -> None:
    """Forgets the models of earlier runs, what was compiled for them if anything was, and their peak of memory."""
    optimisers: Any = sys.modules.get("bitsandbytes.optim")
    if optimisers is not None:
        # It keeps each module that Trainer has its optimisers hold wide moments of, the embeddings, for all time.
        optimisers.GlobalOptimManager.get_instance().initialize()
    gc.collect()
    if compiled:
        torch.compiler.reset()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak_memory_bytes() -> int:
    """The most that PyTorch allocated on the GPU since `free_memory`, or that this process ever had on a CPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    import resource  # not on Windows

    # In KiB, but on macOS in bytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def others_fill_gpu() -> bool:
    """Whether other processes hold more than a tenth of the GPU, so that what does not fit now may fit later."""
    if not torch.cuda.is_available():
        return False
    free, total = torch.cuda.mem_get_info()
    return total - free - torch.cuda.memory_reserved() > total / 10
