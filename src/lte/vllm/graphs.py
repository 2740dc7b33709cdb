"""Up to how many tokens a step of a deployment is a CUDA graph."""

from __future__ import annotations

from typing import Any

MOST_TOKENS = 2048
"""vLLM takes 512. Beyond its graphs the host launches each kernel, and a sparse FFN has more of them than a dense one:
with 1.5B parameters the GPU waits for the host up to about this length (docs/serving.md)."""


def capture_prompts(vllm_config: Any) -> int | None:
    """Has vLLM capture graphs for steps of up to `MOST_TOKENS` tokens, where the deployment does not say how many.

    Args:
        vllm_config: of vLLM, before it settles the sizes.

    Returns:
        Up to how many, `None` where nothing was changed: graphs are off or their sizes were given.
    """
    compilation = vllm_config.compilation_config
    given = compilation.max_cudagraph_capture_size is not None or compilation.cudagraph_capture_sizes is not None
    if given or vllm_config.model_config.enforce_eager:
        return None
    # vLLM warns of a limit that no step can reach.
    most = min(MOST_TOKENS, vllm_config.scheduler_config.max_num_batched_tokens)
    compilation.max_cudagraph_capture_size = most
    return most
