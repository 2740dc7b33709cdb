"""Compiles the kernels of prompt lookup as `compile_kernels` does those of FFNs; run by `test_lookup_kernels`."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch

from lte.ops import lookup_kernels
from lte.ops.lookup import LookupText
from tests.ops.compile_kernels import compile_variants

NAMES = ("propose_kernel", "keep_kernel")


def variants() -> Iterator[dict[str, Any]]:
    """Tokens proposed, and of the longest match."""
    for arch in (80, 90):
        for proposed, gram in ((1, 4), (5, 4), (7, 4), (7, 10)):
            yield {"arch": arch, "proposed": proposed, "gram": gram}


def launch_variant(v: dict[str, Any]) -> None:
    """Runs a pass on meta tensors."""

    def numbers(count: int) -> torch.Tensor:
        return torch.zeros(count, dtype=torch.int64, device="meta")

    text = LookupText(numbers(100), numbers(1), v["proposed"], v["gram"], 200, numbers(2))
    text.propose()
    text.keep(numbers(v["proposed"] + 1))


if __name__ == "__main__":
    none = SimpleNamespace()  # no tiles and no multiprocessors to choose by
    compile_variants(NAMES, variants(), launch_variant, kernels=lookup_kernels, entry=none, tiles=none)
