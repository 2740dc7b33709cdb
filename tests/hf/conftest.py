"""What the tests of models on the kernels share."""

from __future__ import annotations

from typing import Any

import pytest
from torch import Tensor

from lte.ops import dispatch


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of tokens of every call of the kernels' dispatcher."""
    seen: list[int] = []
    call = dispatch.FfnRunner.__call__

    def record(self: Any, x: Tensor, *given: Any) -> Tensor:
        seen.append(len(x))
        return call(self, x, *given)

    monkeypatch.setattr(dispatch.FfnRunner, "__call__", record)
    return seen
