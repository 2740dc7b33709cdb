"""What all tests share: seeds, no network, the families in turn, and the error measure."""

from __future__ import annotations

import gc
import importlib
import os
import sys
import time

# Read when the libraries are imported, so they come first.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# The libraries and what a test starts get the core of one worker.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

# Triton reads it when it decorates a kernel, its own library included, so it comes before all that may import it.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest
from torch import Tensor
from transformers.utils import logging

from tests.tiny_models import MODEL_TYPES, VOCAB, is_causal

# The models are tiny: one thread each is fastest, and the test command runs two workers.
torch.set_num_threads(1)
logging.disable_progress_bar()


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--faults`: how many processes the fault injection kills; `--every-engine`: whether vLLM serves all there is."""
    parser.addoption("--faults", type=int, default=16, help="kills of the fault injection (tests/faults)")
    parser.addoption("--every-engine", action="store_true", help="all families and ways of serving (tests/vllm)")


class Collections:
    """Keeps collections of garbage short, which every training asks for several times.

    Torch, transformers and the tests are a million objects, through which each would look in half a second. They are
    frozen once the tests are collected, and what comes later, such as torch's compiler, after the test in which a
    collection of all took long.
    """

    SHORT_S = 0.05

    def __init__(self) -> None:
        self.began, self.are_long = 0.0, True
        gc.callbacks.append(self.note)
        # Nothing that is imported or collected is garbage.
        gc.disable()

    def note(self, phase: str, info: dict[str, int]) -> None:
        if info["generation"] == 2:
            now = time.process_time()
            self.are_long |= phase == "stop" and now - self.began > self.SHORT_S
            self.began = now

    def shorten(self) -> None:
        gc.collect()
        gc.freeze()
        self.are_long = False


collections = Collections()


def pytest_collection_finish() -> None:
    gc.enable()
    collections.shorten()


def pytest_runtest_logfinish() -> None:
    if collections.are_long:
        collections.shorten()


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def relative_rms() -> Callable[[Tensor, Tensor], float]:
    """RMS of the error over RMS of the reference; an all-zero reference must be met exactly."""

    def measure(actual: Tensor, reference: Tensor) -> float:
        assert actual.shape == reference.shape
        error = (actual.double() - reference.double()).square().mean().sqrt()
        scale = reference.double().square().mean().sqrt()
        return error.item() if scale == 0 else (error / scale).item()

    return measure


@pytest.fixture(params=MODEL_TYPES)
def model_type(request: pytest.FixtureRequest) -> str:
    """Every `model_type` of the family table in turn, and its variants."""
    return request.param


@pytest.fixture(params=[model_type for model_type in MODEL_TYPES if is_causal(model_type)])
def causal_type(request: pytest.FixtureRequest) -> str:
    """Every `model_type` whose own head predicts the next token."""
    return request.param


@pytest.fixture
def tokens() -> Tensor:
    """Token ids [2, 7] without special ones."""
    return torch.randint(3, VOCAB, (2, 7), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Imports a script of benchmarks/ by name."""
    scripts, before = Path(__file__).parents[1] / "benchmarks", set(sys.modules)
    monkeypatch.syspath_prepend(str(scripts))
    yield importlib.import_module
    for name in set(sys.modules) - before:
        file = getattr(sys.modules[name], "__file__", None)
        if file and scripts in Path(file).parents:
            del sys.modules[name]
