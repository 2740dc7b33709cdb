"""What vLLM writes for an LTE folder is what transformers with lte writes, for every family and way of serving."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import pytest
from torch import nn

import lte
from tests.vllm.environment import needs_vllm, run_program
from tests.vllm.folders import FAMILIES, prompts, save, served_model
from tests.vllm.references import Reference, differences, reference

pytestmark = [pytest.mark.slow, needs_vllm]
TOKENS = 16


def with_dropped_bias(**settings: Any) -> Any:
    model = served_model(dropped_bias=True, **settings)
    for ffn in lte.sparse_ffns(model).values():
        nn.init.normal_(ffn.part("down_proj").bias, std=0.3)
    return model


# How else a folder may be made: the model, and what changes for transformers.
VARIANTS = {
    "low rank": lambda: served_model(router_rank=4),
    "dropped bias": with_dropped_bias,
    "biases": lambda: served_model(mlp_bias=True),
}


# How else the same folder may be served.
DEPLOYMENTS: dict[str, dict[str, Any]] = {
    "chunked prefill": {"options": {"max_num_batched_tokens": 16, "enable_chunked_prefill": True}},
    "prefix caching": {"options": {"enable_prefix_caching": True, "block_size": 32}, "rounds": 2},
    "n-gram drafts": {  # together with both of the above
        "options": {
            "speculative_config": {
                "method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 2, "prompt_lookup_min": 1
            },
            "max_num_seqs": 4, "max_num_batched_tokens": 16, "enable_chunked_prefill": True,
            "enable_prefix_caching": True, "block_size": 32,
        },
        "rounds": 2,
    },
    "compiled": {"options": {"enforce_eager": False}},
    "threshold": {"options": {"hf_overrides": {"lte_threshold": 0.7}}},
    "int8": {"options": {"hf_overrides": {"lte_weights": "int8"}}},
}  # fmt: skip


# An engine takes seven seconds: without --every-engine those whose code differs most.
QUICK = (
    "llama", "gemma3_text", "phi3", "dropped bias", "chunked prefill", "prefix caching", "n-gram drafts", "threshold"
)  # fmt: skip


def references_of(model: Any) -> list[Reference]:
    return [reference(model, prompt, TOKENS) for prompt in prompts()]


@pytest.fixture(scope="module")
def served(
    tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> tuple[dict[str, Any], dict[str, list[Reference]]]:
    """What vLLM gave for each job, by its name, and what transformers wrote."""
    root = tmp_path_factory.mktemp("served")
    every = request.config.getoption("--every-engine")
    jobs, expected = [], {}

    def add(name: str, model: Any, folder: str | None = None, **job: Any) -> str:
        place = folder or save(model, root / name.replace(" ", "_"))
        jobs.append({"name": name, "folder": place, "prompts": prompts(), "tokens": TOKENS, **job})
        expected[name] = references_of(model)
        return place

    def wanted(names: Any) -> list[str]:
        return [name for name in names if every or name in QUICK]

    places = {name: add(name, served_model(name), single=True) for name in wanted(FAMILIES)}
    for name in wanted(VARIANTS):
        add(name, VARIANTS[name]())
    for name in wanted(DEPLOYMENTS):
        job = DEPLOYMENTS[name]
        model = served_model()
        if name == "threshold":
            for ffn in lte.sparse_ffns(model).values():
                ffn.set_threshold(0.7)
        if name == "int8":
            lte.accelerate_(model, weights="int8")
        add(name, model, places["llama"], **copy.deepcopy(job))
    results = {result["name"]: result for result in run_program("offline.py", jobs, timeout_s=540)}
    print({name: round(result["seconds"], 1) for name, result in results.items()})
    return results, expected


def result_of(served: Any, name: str) -> tuple[dict[str, Any], list[Reference]]:
    results, expected = served
    if name not in results:
        pytest.skip("needs --every-engine")
    assert "error" not in results[name], results[name]["error"] + results[name]["trace"]
    return results[name], expected[name]


@pytest.mark.parametrize("name", [*FAMILIES, *VARIANTS, *DEPLOYMENTS])
def test_the_tokens_are_those_of_transformers(served: Any, name: str, record_property: pytest.RecordProperty) -> None:
    result, expected = result_of(served, name)
    alone = [] if result["alone"] is None else [result["alone"]]
    for written in (*result["rounds"], *alone):
        traced = differences(expected, written)
        record_property("differences", traced)
        assert len(traced) <= 1, traced


def test_random_folders_write_different_tokens(served: Any) -> None:
    """Else the comparison would see nothing: prompts, families and deployments must matter."""
    _, expected = served
    for name in set(FAMILIES) & set(expected):
        assert len({tuple(ref.tokens) for ref in expected[name]}) == len(expected[name]), name
    assert [r.tokens for r in expected["threshold"]] != [r.tokens for r in expected["llama"]]
    assert [r.tokens for r in expected["dropped bias"]] != [r.tokens for r in expected["llama"]]


def test_the_folder_keeps_its_dtype(served: Any) -> None:
    assert result_of(served, "llama")[0]["dtype"] == "torch.float32"


def test_prefixes_are_reused(served: Any) -> None:
    assert result_of(served, "prefix caching")[0]["metrics"]["vllm:prefix_cache_hits"] >= 32  # a block


def test_drafts_are_accepted(served: Any) -> None:
    metrics = result_of(served, "n-gram drafts")[0]["metrics"]
    assert metrics["vllm:spec_decode_num_accepted_tokens"] > 0
    assert metrics["vllm:prefix_cache_hits"] >= 32


def test_the_saving_is_counted(served: Any) -> None:
    """Prompts of 41 tokens go another way than a few requests' next tokens; about half of the experts are on."""
    saving = result_of(served, "llama")[0]["saving"]
    assert saving["lte:steps_total{'path': 'decode'}"] > 16
    assert saving["lte:steps_total{'path': 'masked'}"] >= 1


CPUS = sorted(os.sched_getaffinity(0))


@pytest.mark.skipif(len(CPUS) < 2, reason="two ranks of vLLM on CPUs want a core each")
def test_two_ranks_have_half_of_the_experts_each(tmp_path: Path) -> None:
    """Biases must count once, and a low-rank router's rows be split and its first matrix not."""
    model = with_dropped_bias(router_rank=4)
    job = {"name": "ranks", "folder": save(model, tmp_path / "folder"), "prompts": prompts(), "tokens": TOKENS}
    (result,) = run_program(
        "offline.py",
        [{**job, "options": {"tensor_parallel_size": 2}}],
        VLLM_CPU_OMP_THREADS_BIND="|".join(map(str, CPUS[:2])),
    )
    assert "error" not in result, result["error"] + result["trace"]
    traced = differences(references_of(model), result["rounds"][0])
    assert len(traced) <= 1, traced
