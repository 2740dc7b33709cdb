"""What is left of a run when the next one begins."""

from __future__ import annotations

import weakref

import pytest
import torch

from lte.runs.memory import free_memory


def test_modules_that_an_optimiser_in_8_bits_keeps_are_let_go() -> None:
    optim = pytest.importorskip("bitsandbytes.optim")
    manager, module = optim.GlobalOptimManager.get_instance(), torch.nn.Embedding(4, 2)
    manager.register_module_override(module, "weight", {"optim_bits": 32})
    manager.index2config[0, 0] = {"optim_bits": 32}
    kept = weakref.ref(module)
    del module
    free_memory(compiled=False)
    assert kept() is None
    assert not manager.index2config
