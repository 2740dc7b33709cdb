"""Models whose experts are spread over processes by transformers' own plans compute what one process computes.

Two and four processes on CPUs; `LTE_TEST_BACKEND=nccl` takes as many GPUs as there are.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lte.hf.families import FAMILIES
from lte.nn.sparse_ffn import check_expert_shares
from tests.processes import fitting, made_once, run_forked
from tests.tiny_models import VOCAB, tiny_config, tiny_sparse_model

# The key heads of each process are whole, too, and transformers 5.17 wants to divide the vocabulary.
EVEN = {"num_key_value_heads": 4, "vocab_size": 100}
COUNTS = fitting((2, 4))
PLANNED = [name for name in FAMILIES if getattr(tiny_config(name), "base_model_tp_plan", None)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of tiny models, and of each number of processes what they found."""

    def make(root: Path) -> None:
        for name in PLANNED:
            tiny_sparse_model(name, **EVEN).save_pretrained(root / name)
        # 6 experts of 8 neurons.
        tiny_sparse_model("llama", intermediate_size=48, **EVEN).save_pretrained(root / "six")
        run_forked(",".join(map(str, COUNTS)), "tests.hf.tensor_parallel_in_process", root, ",".join([*PLANNED, "six"]))

    return made_once(tmp_path_factory, "parallel", make)


def test_some_families_have_a_plan() -> None:
    assert {"llama", "mistral", "qwen2", "qwen3", "gemma2", "phi3"} <= set(PLANNED)


@pytest.mark.slow
@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("name", PLANNED)
def test_processes_with_a_part_of_the_experts_each_compute_the_same(folder: Path, name: str, count: int) -> None:
    model = tiny_sparse_model(name, **EVEN)
    tokens = torch.arange(48).reshape(2, 24) % VOCAB
    with torch.no_grad():
        logits = model(tokens).logits
        answer = model.generate(tokens[:1, :4], max_new_tokens=8, do_sample=False)
    for rank in range(count):
        found = torch.load(folder / f"found{count}_{rank}.pt")[name]
        assert found["down"]
        assert not found["router"]
        torch.testing.assert_close(found["logits"], logits, rtol=1e-4, atol=1e-4)
        assert torch.equal(found["answer"], answer)


@pytest.mark.slow
@pytest.mark.skipif(4 not in COUNTS, reason="needs four processes")
def test_experts_are_not_shared_by_processes(folder: Path) -> None:
    assert "error" not in torch.load(folder / "found2_0.pt")["six"]
    assert "num_experts=6 for 4 processes" in torch.load(folder / "found4_0.pt")["six"]["error"]


@pytest.mark.slow
def test_kernels_are_for_whole_models(folder: Path) -> None:
    rule = "model must lie whole in this process to run on the kernels, got model.layers.0.mlp in parts"
    assert rule in torch.load(folder / "found2_0.pt")["llama"]["refused"]


def test_the_processes_must_divide_the_experts() -> None:
    check_expert_shares(8, 4)
    rule = (
        r"num_experts must be a multiple .*, got num_experts=6 for 4 processes; take a number of processes that divides"
    )
    with pytest.raises(ValueError, match=rule):
        check_expert_shares(6, 4)
