"""Serving LTE folders in vLLM: `vllm serve FOLDER`, once lte is installed beside vLLM.

vLLM finds `register` by the entry point `vllm.general_plugins` and calls it in each of its processes. The parts:

- `architectures`: which families are served, and by which class of vLLM.
- `checks`: what a folder and a deployment must be, before an engine starts; the settings of a deployment.
- `graphs`: up to how many tokens a step is a CUDA graph.
- `models`: vLLM's own model class with every FFN replaced.
- `ffn`: the FFN, one custom operation over the kernels of `lte.ops`.
- `meter`: what the routing saves, as Prometheus metrics beside vLLM's own.

Inside vLLM a config names the architecture `Lte...` (see `lte.hf.loading`), which vLLM refuses without the plug-in.
"""

from __future__ import annotations


def register() -> None:
    """Makes LTE folders known to vLLM in this process; may be called any number of times, and touches no device."""
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    import lte.hf.loading  # registers the configs of LTE folders with transformers
    from lte.vllm.architectures import REFUSED, SERVED
    from lte.vllm.checks import LteChecks, RefusedArchitecture, keep_dtype_of_folders

    del lte
    keep_dtype_of_folders()
    for name in SERVED:
        ModelRegistry.register_model(name, f"lte.vllm.models:{name}")
        MODELS_CONFIG_MAP[name] = LteChecks
    for name in REFUSED:
        ModelRegistry.register_model(name, "lte.vllm.refused:RefusedModel")
        MODELS_CONFIG_MAP[name] = RefusedArchitecture
