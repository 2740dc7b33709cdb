"""Models whose experts are spread over processes by transformers' own plans compute what one process computes.

Two and four processes on CPUs; `LTE_TEST_BACKEND=nccl` takes as many GPUs as there are.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers.utils.versions import require_version

import lte
from lte.eval.sparsity import measure_sparsity
from lte.hf.families import FAMILIES
from lte.hf.threshold import set_threshold_
from lte.nn.sparse_ffn import check_expert_shares
from tests.processes import fitting, made_once, run_forked
from tests.tiny_models import (
    EXPERT_SIZE,
    VOCAB,
    logits_of,
    randomise_routers_,
    tiny_config,
    tiny_dense_model,
    tiny_sparse_model,
)

# The key heads of each process are whole, too, and transformers 5.17 wants to divide the vocabulary.
EVEN = {"num_key_value_heads": 4, "vocab_size": 100}
COUNTS = fitting((2, 4))
PLANNED = [name for name in FAMILIES if getattr(tiny_config(name), "base_model_tp_plan", None)]
NAMES = [*PLANNED, "opt", "low"]
# Gate and up of Phi-3 are one projection, of which a process has either.
REFUSED = {"phi3": "whose gate and up are one projection", "opt": "whose parts lie in its block"}
TOKENS = torch.arange(48).reshape(2, 24) % VOCAB


def _has_plans_in_dtensors() -> bool:
    try:
        require_version("transformers>=5.16")
    except ImportError:
        return False
    return True


needs_plans = pytest.mark.skipif(not _has_plans_in_dtensors(), reason="transformers before 5.16 is refused")


def model_of(name: str) -> Any:
    """A whole model; `low` has low-rank routers and biases in place of what experts that are off would add."""
    if name != "low":
        return tiny_sparse_model(name, **EVEN)
    config = lte.LteConfig(expert_size=EXPERT_SIZE, grouping="random", router_rank=4, dropped_bias=True)
    model = randomise_routers_(lte.sparsify_(tiny_dense_model(**EVEN), config))
    for ffn in lte.sparse_ffns(model).values():
        nn.init.normal_(ffn.part("down_proj").bias, generator=torch.Generator().manual_seed(0))
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of tiny models, and of each number of processes what they found."""

    def make(root: Path) -> None:
        for name in NAMES:
            model_of(name).save_pretrained(root / name)
        # 6 experts of 8 neurons.
        tiny_sparse_model("llama", intermediate_size=48, **EVEN).save_pretrained(root / "six")
        names = ",".join([*NAMES, "six"])
        run_forked(",".join(map(str, COUNTS)), "tests.hf.tensor_parallel_in_process", root, names)

    return made_once(tmp_path_factory, "parallel", make)


def test_some_families_have_a_plan() -> None:
    assert {"llama", "mistral", "qwen2", "qwen3", "gemma2", "phi3"} <= set(PLANNED)


@needs_plans
@pytest.mark.slow
@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("name", NAMES)
def test_processes_with_a_part_of_the_experts_each_compute_the_same(folder: Path, name: str, count: int) -> None:
    model = model_of(name)
    expected = {"logits": logits_of(model, TOKENS), "few": logits_of(model, TOKENS[:, :3])}
    answer = model.generate(TOKENS[:1, :4], max_new_tokens=8, do_sample=False)
    for rank in range(count):
        found = torch.load(folder / f"found{count}_{rank}.pt")[name]
        assert found["down"]
        assert not found["router"]
        for way in ("masked",) if name in REFUSED else ("masked", "kernels"):
            for key, logits in expected.items():
                torch.testing.assert_close(found[way][key], logits, rtol=1e-4, atol=1e-4)
            assert torch.equal(found[way]["answer"], answer)
        if name in REFUSED:
            rule = f"each process must hold whole experts, got an FFN {REFUSED[name]}; run the model without accelerate"
            assert rule in found["refused"]
        else:
            # The prompt, 7 tokens one by one, and the two passes, in both layers.
            assert found["calls"] == [tokens for tokens in (4, *[1] * 7, 48, 6) for _ in range(2)]


@needs_plans
@pytest.mark.slow
@pytest.mark.skipif(4 not in COUNTS, reason="needs four processes")
def test_experts_are_not_shared_by_processes(folder: Path) -> None:
    assert "error" not in torch.load(folder / "found2_0.pt")["six"]
    assert "num_experts=6 for 4 processes" in torch.load(folder / "found4_0.pt")["six"]["error"]


@needs_plans
@pytest.mark.slow
def test_kernels_in_parts_follow_all_changes(folder: Path) -> None:
    found, model = torch.load(folder / "found2_1.pt")["changed"], model_of("llama")
    for file in ("model.safetensors", "config.json"):
        assert (folder / "saved" / file).read_bytes() == (folder / "llama" / file).read_bytes()
    assert found["sparsity"] == measure_sparsity(model, [{"input_ids": TOKENS}]).sparsity
    torch.testing.assert_close(found["compiled"], logits_of(model, TOKENS[:, :3]), rtol=1e-4, atol=1e-4)
    assert found["compiled calls"] == [6, 6]
    assert found["undone"]
    assert found["contiguous"]
    assert found["failed native"]
    assert found["failed int8"]
    rule = "got up_proj.weight with placements=[Replicate()]; run the model without accelerate_, or load it whole"
    assert rule in found["other split"]
    whole = lte.accelerate_(model_of("llama"), "int8")
    # Each process rounds its columns of the down projection by a scale of their own.
    torch.testing.assert_close(found["int8"], logits_of(whole, TOKENS[:, :3]), rtol=0.05, atol=0.05)
    set_threshold_(model, 0.7)
    torch.testing.assert_close(found["threshold"], logits_of(model, TOKENS[:, :3]), rtol=1e-4, atol=1e-4)
    rounded = lte.densify_(lte.decelerate_(whole))
    torch.testing.assert_close(found["dense"], logits_of(rounded, TOKENS), rtol=0.05, atol=0.05)


def test_the_processes_must_divide_the_experts() -> None:
    check_expert_shares(8, 4)
    rule = (
        r"num_experts must be a multiple .*, got num_experts=6 for 4 processes; take a number of processes that divides"
    )
    with pytest.raises(ValueError, match=rule):
        check_expert_shares(6, 4)


def test_plans_that_split_without_saying_so_are_refused() -> None:
    ffn = next(iter(lte.sparse_ffns(tiny_sparse_model()).values()))
    ffn.check_shares()
    # As transformers 5.5 to 5.15 marks it.
    ffn.part("down_proj")._hf_tp_plan = "rowwise"
    with pytest.raises(ValueError, match=r"transformers must be 5\.16 or newer for tensor parallelism"):
        ffn.check_shares()
