"""Runs in vLLM's environment: asks vLLM for an engine's configuration, which is where folders are checked.

The argument is a list of {"name", "folder", "options"}; a line `RESULT json` says for each what vLLM resolved, or the
error. With `"import_lte": true` lte is imported first, as a program of its own might.
"""

import json
import sys
from typing import Any


def configure(job: dict[str, Any]) -> dict[str, Any]:
    """The architecture and dtype that vLLM resolves."""
    if job.get("import_lte"):
        import lte  # noqa: F401
    from vllm.engine.arg_utils import EngineArgs

    config = EngineArgs(model=job["folder"], skip_tokenizer_init=True, **job.get("options", {})).create_engine_config()
    return {"architecture": config.model_config.architecture, "dtype": str(config.model_config.dtype)}


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
