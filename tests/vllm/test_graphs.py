"""Up to how many tokens there are CUDA graphs; no vLLM needed."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from lte.vllm.graphs import MOST_TOKENS, capture_prompts


def config(most_batched: int = 8192, *, eager: bool = False, **compilation: Any) -> Any:
    return SimpleNamespace(
        model_config=SimpleNamespace(enforce_eager=eager),
        scheduler_config=SimpleNamespace(max_num_batched_tokens=most_batched),
        compilation_config=SimpleNamespace(
            **{"max_cudagraph_capture_size": None, "cudagraph_capture_sizes": None, **compilation}
        ),
    )


@pytest.mark.parametrize(("most_batched", "expected"), [(8192, MOST_TOKENS), (1000, 1000)])
def test_prompts_are_captured_by_default(most_batched: int, expected: int) -> None:
    made = config(most_batched)
    assert capture_prompts(made) == expected
    assert made.compilation_config.max_cudagraph_capture_size == expected
    assert made.compilation_config.cudagraph_capture_sizes is None  # vLLM lists them


@pytest.mark.parametrize(
    "given", [{"max_cudagraph_capture_size": 512}, {"cudagraph_capture_sizes": [1, 8]}, {"eager": True}]
)
def test_what_the_deployment_says_counts(given: dict[str, Any]) -> None:
    made, before = config(**given), config(**given)
    assert capture_prompts(made) is None
    assert made == before
