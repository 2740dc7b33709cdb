"""What the tests of the benchmarks share: tiny models, quick timing, and a run that is done once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lte.bench import timing
from lte.bench.models import ModelPair, model_pair
from lte.bench.rows import ResultFile
from lte.bench.run import run_benchmarks
from lte.bench.session import Session
from lte.bench.settings import BenchSettings
from tests.tiny_models import VOCAB, tiny_dense_model, tiny_sparse_model

ENVIRONMENT = {"git_commit": "abc", "hardware": "some CPU", "versions": {"torch": "2"}}
CONTEXT = 16


@pytest.fixture(autouse=True)
def _small_sweep(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "SWEEP_BYTES", 1 << 12)


def settings(**given: Any) -> BenchSettings:
    """Settings of a run of a second."""
    values: dict[str, Any] = {"sparsities": (0.5,), "batches": (1,), "lengths": (7,), "repeats": 2}
    values |= {"context_length": CONTEXT, "compile": False}
    return BenchSettings(**{**values, **given})


def dense_pair(**overrides: Any) -> ModelPair:
    """A pair made of a dense model."""
    return model_pair(tiny_dense_model(**overrides))


def trained_pair(**overrides: Any) -> ModelPair:
    """A pair made of an LTE model with random routers."""
    return model_pair(tiny_sparse_model(**overrides))


def random_texts(count: int = 8, length: int = CONTEXT) -> Tensor:
    return torch.randint(3, VOCAB, (count, length), generator=torch.Generator().manual_seed(3))


@pytest.fixture
def session() -> Callable[..., Session]:
    """A session without files; `lines` of its report are kept in it."""

    def make(pair: ModelPair, **given: Any) -> Session:
        results = ResultFile(None, ENVIRONMENT, {})
        return Session("tiny", pair, settings(**given), results, 10.0, random_texts(), lambda line: None)

    return make


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., Session]:
    """A whole run that writes its files to `tmp_path / "out"`."""

    def start(pair: ModelPair, **given: Any) -> Session:
        return run_benchmarks("tiny", pair, settings(**given), random_texts(), tmp_path / "out", lambda line: None)

    return start
