"""What modules get, by their keys."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lte.nn.hooks import before_each_call


def test_each_call_is_seen_under_its_key_and_none_after_the_block() -> None:
    modules = {"first": nn.Linear(2, 3), "second": nn.Linear(3, 2)}
    x, seen = torch.rand(4, 2), []

    def look(key: str, args: tuple[Any, ...]) -> None:
        seen.append((key, tuple(args[0].shape)))

    with before_each_call(modules, look):
        modules["second"](modules["first"](x))
    modules["first"](x)
    assert seen == [("first", (4, 2)), ("second", (4, 3))]

    def fails() -> None:
        with before_each_call(modules, look):
            raise KeyError

    with pytest.raises(KeyError):
        fails()
    modules["first"](x)
    assert len(seen) == 2
