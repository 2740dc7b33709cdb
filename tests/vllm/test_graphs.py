"""Up to how many tokens there are CUDA graphs, by stand-ins for vLLM's config; `test_refusals` has vLLM's own."""

from __future__ import annotations

from enum import Enum
from types import SimpleNamespace
from typing import Any

import pytest

from lte.vllm.graphs import capture_prompts, largest_graph

SMALL, LARGE = (1536, 8960), (4096, 11008)
Mode = Enum("Mode", ["NONE", "FULL", "FULL_DECODE_ONLY", "FULL_AND_PIECEWISE"])


def config(most_batched: int = 8192, own: int = 512, *, eager: bool = False, **compilation: Any) -> Any:
    """One that settles its sizes as vLLM does: what was given, or some up to `own`."""
    given = {"max_cudagraph_capture_size": None, "cudagraph_capture_sizes": None, "cudagraph_mode": None}
    given |= {"compile_sizes": ["cudagraph_capture_sizes"], **compilation}
    made = SimpleNamespace(
        model_config=SimpleNamespace(enforce_eager=eager),
        scheduler_config=SimpleNamespace(max_num_batched_tokens=most_batched),
        compilation_config=SimpleNamespace(**given),
    )

    def settle() -> None:
        sizes = made.compilation_config.cudagraph_capture_sizes or [1, 100, own]
        made.compilation_config.cudagraph_capture_sizes = sizes
        made.compilation_config.max_cudagraph_capture_size = sizes[-1]
        made.compilation_config.compile_sizes = sizes

    made._set_cudagraph_sizes = settle
    return made


@pytest.mark.parametrize(
    ("shape", "most_batched", "own", "expected"),
    [
        (SMALL, 8192, 512, [1, 100, 512, *range(544, 2049, 32)]),
        (SMALL, 1000, 512, [1, 100, 512, *range(544, 993, 32)]),
        (SMALL, 8192, 12, [1, 100, 12, *range(32, 2049, 32)]),
        (LARGE, 8192, 512, [1, 100, 512, 544, 576, 608]),
        ((8192, 28672), 8192, 512, [1, 100, 512]),
    ],
)
def test_longer_prompts_are_added_the_more_the_smaller_an_ffn_is(
    shape: tuple[int, int], most_batched: int, own: int, expected: list[int]
) -> None:
    made = config(most_batched, own)
    capture_prompts(made, *shape)
    assert made.compilation_config.cudagraph_capture_sizes == expected
    assert made.compilation_config.max_cudagraph_capture_size is None
    assert made.compilation_config.compile_sizes == ["cudagraph_capture_sizes"]
    made._set_cudagraph_sizes()
    assert made.compilation_config.cudagraph_capture_sizes == expected


@pytest.mark.parametrize(
    "given",
    [
        {"max_cudagraph_capture_size": 512},
        {"cudagraph_capture_sizes": [1, 8]},
        {"eager": True},
        {"cudagraph_mode": Mode.NONE},
        {"cudagraph_mode": Mode.FULL_DECODE_ONLY},
    ],
)
def test_what_the_deployment_says_counts(given: dict[str, Any]) -> None:
    made = config(**given)
    before = dict(vars(made.compilation_config))
    capture_prompts(made, *SMALL)
    assert vars(made.compilation_config) == before


def test_a_vllm_that_settles_them_otherwise_is_left_alone() -> None:
    made = config()
    del made._set_cudagraph_sizes
    capture_prompts(made, *SMALL)
    assert made.compilation_config.cudagraph_capture_sizes is None


def test_the_largest_graph_of_prompts() -> None:
    def compilation(mode: Any, mixed: str, sizes: list[int] | None) -> Any:
        made = None if mode is None else SimpleNamespace(mixed_mode=lambda: SimpleNamespace(name=mixed))
        return SimpleNamespace(cudagraph_mode=made, cudagraph_capture_sizes=sizes)

    assert largest_graph(compilation("some", "PIECEWISE", [1, 2048, 512])) == 2048
    assert largest_graph(compilation("some", "NONE", [1, 2048])) == 0
    assert largest_graph(compilation("some", "PIECEWISE", [])) == largest_graph(compilation(None, "", [1])) == 0
