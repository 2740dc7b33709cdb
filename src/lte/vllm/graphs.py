"""Up to how many tokens a step of a deployment is a CUDA graph.

Beyond its graphs the host launches each kernel of a step, and a sparse FFN has more of them than a dense one. vLLM
captures graphs of up to 512 tokens; where a model is so small that the GPU then waits for the host, LTE folders have it
capture longer prompts (docs/serving.md).
"""

from __future__ import annotations

from typing import Any

MOST_TOKENS = 2048
# Tokens times D times F of an FFN up to which an H200 waits for its host: 2,048 of a model of 1.5B.
WAITS = 2048 * 1536 * 8960
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
    off = vllm_config.model_config.enforce_eager or (mode is not None and mode.name == "NONE")
    settle = getattr(vllm_config, "_set_cudagraph_sizes", None)  # vLLM has no hook after it
    if given or off or settle is None:
        return
    settle()
    own = list(compilation.cudagraph_capture_sizes or ())
    most = min(longest_prompt(hidden, neurons), vllm_config.scheduler_config.max_num_batched_tokens)
    longer = [size for size in range(STEP, most + 1, STEP) if own and size > own[-1]]
    # Without a limit of its own the list counts as it is.
    compilation.cudagraph_capture_sizes, compilation.max_cudagraph_capture_size = [*own, *longer] or None, None
