"""Runs in vLLM's environment: asks vLLM for an engine's configuration, which is where folders are checked.

The argument is a list of {"name", "folder", "options"}; a line `RESULT json` says for each what vLLM resolved, or the
error. With `"import_lte": true` lte is imported first, as a program of its own might. With `"on_gpu": true` the plug-in
takes the machine for one with a GPU, and the result has the sizes of CUDA graphs that vLLM settles then.
"""

import contextlib
import json
import sys
import unittest.mock
from collections.abc import Iterator
from typing import Any


def configure(job: dict[str, Any]) -> dict[str, Any]:
    """The architecture and dtype that vLLM resolves."""
    if job.get("import_lte"):
        import lte  # noqa: F401
    from vllm.engine.arg_utils import EngineArgs

    found = dict[str, Any]()
    with graphs_of_a_gpu(found) if job.get("on_gpu") else contextlib.nullcontext():
        arguments = EngineArgs(model=job["folder"], skip_tokenizer_init=True, **job.get("options", {}))
        config = arguments.create_engine_config()
    return {"architecture": config.model_config.architecture, "dtype": str(config.model_config.dtype), **found}


@contextlib.contextmanager
def graphs_of_a_gpu(found: dict[str, Any]) -> Iterator[None]:
    """Notes the sizes of graphs by vLLM itself, and those after the plug-in; later vLLM sees that there is no GPU."""
    from vllm.config import VllmConfig

    from lte.vllm import checks

    settle, capture = VllmConfig._set_cudagraph_sizes, checks.capture_prompts

    def noted(config: Any, *shape: int) -> None:
        compilation = config.compilation_config
        settle(config)
        found["own"] = compilation.cudagraph_capture_sizes
        compilation.cudagraph_capture_sizes = compilation.max_cudagraph_capture_size = None
        capture(config, *shape)
        settle(config)
        found["settled"] = [compilation.cudagraph_capture_sizes, compilation.max_cudagraph_capture_size]

    with unittest.mock.patch.multiple(checks, on_gpu=lambda: True, capture_prompts=noted):
        yield


def main() -> None:
    """Configures each job."""
    from vllm import ModelRegistry
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    if "lte.vllm" in sys.modules:
        from lte.vllm import models, refused
        from lte.vllm.architectures import REFUSED, SERVED

        # Their inspection would take a process each.
        for name in SERVED:
            ModelRegistry.register_model(name, getattr(models, name))
        for name in REFUSED:
            ModelRegistry.register_model(name, refused.RefusedModel)
    for job in json.loads(sys.argv[1]):
        try:
            result = configure(job)
        except Exception as error:
            result = {"error": f"{type(error).__name__}: {error}"}
        print("RESULT " + json.dumps({"name": job["name"], **result}), flush=True)


if __name__ == "__main__":
    main()
