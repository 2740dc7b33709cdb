"""Up to how many tokens a step of a deployment is a CUDA graph.

Beyond its graphs the host launches each kernel of a step, and a sparse FFN has more of them than a dense one. vLLM
captures graphs of up to 512 tokens; where a model is so small that the GPU then waits for the host, LTE folders have it
capture longer prompts (docs/serving.md).
"""

from __future__ import annotations

from typing import Any

MOST_TOKENS = 2048
# Tokens times D times F of an FFN up to which graphs are captured: all of them at Qwen2.5-1.5B's widths, where sparse
# prompts of 2,048 tokens without graphs were slower than dense ones. A bound by choice: other sizes were not measured.
WAITS = MOST_TOKENS * 1536 * 8960
# A prompt is filled up to the next size: by 6% at most, and vLLM has half as many sizes to capture as by its own steps.
STEP = 32


def longest_prompt(hidden: int, neurons: int) -> int:
    """Tokens of a prompt up to which there are graphs by D and F of an FFN on one rank, beyond those of vLLM itself."""
    return min(MOST_TOKENS, WAITS // (hidden * neurons))


def capture_prompts(vllm_config: Any, hidden: int, neurons: int) -> None:
    """Adds longer prompts to the graphs that vLLM captures by itself, where the deployment does not choose them.

    Args:
        vllm_config: of vLLM, before it settles the sizes.
        hidden: D.
        neurons: F of an FFN on one rank.
    """
    compilation, mode = vllm_config.compilation_config, vllm_config.compilation_config.cudagraph_mode
    given = compilation.max_cudagraph_capture_size is not None or compilation.cudagraph_capture_sizes is not None
    # By these modes no prompt is a graph.
    off = vllm_config.model_config.enforce_eager or (mode is not None and mode.name in ("NONE", "FULL_DECODE_ONLY"))
    settle = getattr(vllm_config, "_set_cudagraph_sizes", None)  # vLLM has no hook after it
    if given or off or settle is None:
        return
    compiled = compilation.compile_sizes  # may name all sizes, which are not known yet
    settle()
    compilation.compile_sizes = compiled
    own = list(compilation.cudagraph_capture_sizes or ())
    most = min(longest_prompt(hidden, neurons), vllm_config.scheduler_config.max_num_batched_tokens)
    longer = [size for size in range(STEP, most + 1, STEP) if own and size > own[-1]]
    # Without a limit of its own the list counts as it is.
    compilation.cudagraph_capture_sizes, compilation.max_cudagraph_capture_size = [*own, *longer] or None, None


def largest_graph(compilation: Any) -> int:
    """Tokens of the largest graph of prompts by vLLM's settled compilation config, 0 for none."""
    mode, sizes = compilation.cudagraph_mode, compilation.cudagraph_capture_sizes
    return 0 if mode is None or not sizes or mode.mixed_mode().name == "NONE" else max(sizes)
