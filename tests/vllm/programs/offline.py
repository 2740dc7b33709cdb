"""Runs in vLLM's environment: an engine for each job, in a forked process of its own; a line `RESULT json` for each.

A job is {"folder", "options", "prompts", "tokens", "rounds", "single"}: `options` of `vllm.LLM`, prompts as token ids,
how many tokens to write, how many times to ask, and whether to ask for each prompt alone after that.
"""

import json
import os
import sys
import time
import traceback
from typing import Any

COUNTERS = ("prefix_cache_hits", "num_drafts", "num_accepted_tokens")


def run_job(job: dict[str, Any]) -> dict[str, Any]:
    """The tokens of each round, and what vLLM and the plug-in counted."""
    from vllm import LLM, SamplingParams

    from lte.vllm.meter import _collector

    defaults = {
        "skip_tokenizer_init": True,
        "max_model_len": 192,
        "enforce_eager": True,
        "max_num_seqs": 16,
        "kv_cache_memory_bytes": 64 << 20,
        "enable_prefix_caching": False,
        "disable_log_stats": False,
    }
    llm = LLM(job["folder"], **{**defaults, **job.get("options", {})})
    params = SamplingParams(temperature=0, max_tokens=job["tokens"], ignore_eos=True, detokenize=False)
    prompts = [{"prompt_token_ids": prompt} for prompt in job["prompts"]]

    def ask(asked: list[Any]) -> list[list[int]]:
        return [list(out.outputs[0].token_ids) for out in llm.generate(asked, params, use_tqdm=False)]

    rounds = [ask(prompts) for _ in range(job.get("rounds", 1))]
    alone = [ask([prompt])[0] for prompt in prompts] if job.get("single") else None
    metrics = {
        metric.name: metric.value
        for metric in llm.get_metrics()
        if any(name in metric.name for name in COUNTERS) and hasattr(metric, "value")
    }
    saving = {sample.name + str(sample.labels): sample.value for f in _collector().collect() for sample in f.samples}
    dtype = str(llm.llm_engine.vllm_config.model_config.dtype)
    return {"rounds": rounds, "alone": alone, "metrics": metrics, "saving": saving, "dtype": dtype}


def forked(job: dict[str, Any]) -> None:
    """Runs a job in a child and prints its result, or its error."""
    child = os.fork()
    if child:
        os.waitpid(child, 0)
        return
    start = time.monotonic()
    try:
        result = run_job(job)
    except BaseException as error:
        result = {"error": f"{type(error).__name__}: {error}", "trace": traceback.format_exc()[-3000:]}
    if "lte.vllm.meter" in sys.modules:
        sys.modules["lte.vllm.meter"]._collector()._remove()  # `_exit` leaves out what is registered to run
    print("RESULT " + json.dumps({"name": job["name"], "seconds": time.monotonic() - start, **result}), flush=True)
    os._exit(0)


def main() -> None:
    """Imports vLLM once, registers the classes themselves (inspecting each takes a process), and runs all jobs."""
    from vllm import ModelRegistry
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    from lte.vllm import models
    from lte.vllm.architectures import SERVED

    for name in SERVED:
        ModelRegistry.register_model(name, getattr(models, name))
    for job in json.loads(sys.argv[1]):
        forked(job)


if __name__ == "__main__":
    # Before the first import: an engine in the same process starts in seconds.
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    main()
