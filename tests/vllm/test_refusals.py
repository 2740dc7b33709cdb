"""What vLLM must not serve is an error with the way out, before an engine starts; nothing runs dense."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.tiny_models import tiny_dense_model
from tests.vllm.environment import needs_vllm, run_program
from tests.vllm.folders import FAMILIES, save, served_model

pytestmark = [pytest.mark.slow, needs_vllm]


def edit_config(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def edit_settings(folder: Path, **changes: Any) -> None:
    edit_config(folder, lte={**json.loads((folder / "config.json").read_text())["lte"], **changes})


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def cut_short(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def without_a_router(tensors: dict[str, torch.Tensor]) -> None:
    del tensors["model.layers.1.mlp.router.weight"]


def with_a_wide_router(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.0.mlp.router.weight"] = torch.zeros(16, 65)


def with_integers(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.1.mlp.router.weight"] = tensors["model.layers.1.mlp.router.weight"].to(torch.int8)


FAULTS: dict[str, tuple[Callable[[Path], None], str]] = {
    "newer": (lambda folder: edit_settings(folder, version=3), "saved by a newer lte"),
    "cut short": (cut_short, "model.safetensors is corrupt or cut short"),
    "no router": (lambda folder: edit_weights(folder, without_a_router), "must hold a router.weight for each of its 2"),
    "wide router": (
        lambda folder: edit_weights(folder, with_a_wide_router),
        "router.weight must have shape [16, 64] by the config of",
    ),
    "integers": (
        lambda folder: edit_weights(folder, with_integers),
        "must hold weights in F64, F32, F16, BF16, got model.layers.1.mlp.router.weight in I8",
    ),
    "expert size": (lambda folder: edit_settings(folder, expert_size=4), "expert_size must be one of 8, 16, 32, 64"),
    "other method": (
        lambda folder: edit_config(folder, lte={"name": "teal", "version": 2}),
        "vLLM serves models of the method lte, got a folder of the method teal",
    ),
}
OPTIONS: dict[str, tuple[dict[str, Any], str]] = {
    "ranks": ({"tensor_parallel_size": 3}, "tensor_parallel_size must divide"),
    "lora": ({"enable_lora": True}, "enable_lora must be off for an LTE folder"),
    "fp8": ({"quantization": "fp8"}, "quantization must be left out for an LTE folder"),
    "no threshold": ({"hf_overrides": {"lte_threshold": 1.5}}, "lte_threshold must lie in (0, 1)"),
    "no curve": ({"hf_overrides": {"lte_target_sparsity": 0.5}}, "without; measure it once: `lte calibrate"),
    "both": (
        {"hf_overrides": {"lte_target_sparsity": 0.5, "lte_threshold": 0.5}},
        "lte_threshold or lte_target_sparsity must be given, not both",
    ),
    "int4": ({"hf_overrides": {"lte_weights": "int4"}}, "the kernels of 4 bits compute whole decoding steps"),
    "settings": ({"hf_overrides": {"lte": {"threshold": 0.4}}}, "hf-overrides must not replace the field lte"),
}
DTYPES = {"auto": "torch.float32", "bfloat16": "torch.bfloat16"}
# Of graphs: numbers of sequences that are not among the usual sizes, few, and many.
SEQUENCES, BATCHED = (20, 6, 1000), {"max_num_batched_tokens": 2048}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    """What vLLM made of each folder, by name."""
    root = tmp_path_factory.mktemp("refused")
    good = Path(save(served_model(), root / "good"))
    jobs: list[dict[str, Any]] = []
    for name, (damage, _) in FAULTS.items():
        folder = root / name.replace(" ", "_")
        shutil.copytree(good, folder)
        damage(folder)
        jobs.append({"name": name, "folder": str(folder)})
    jobs += [{"name": name, "folder": str(good), "options": options} for name, (options, _) in OPTIONS.items()]
    jobs += [{"name": dtype, "folder": str(good), "options": {"dtype": dtype}} for dtype in DTYPES]
    half = save(served_model().to(torch.bfloat16), root / "half")
    jobs.append({"name": "half", "folder": half})
    gemma = save(served_model("gemma2"), root / "gemma2")
    jobs.append({"name": "gemma", "folder": gemma, "options": {"dtype": "float16"}})
    jobs.append({"name": "opt", "folder": save(served_model("opt"), root / "opt")})
    jobs.append({"name": "backend", "folder": str(good), "options": {"model_impl": "transformers"}})
    dense = tiny_dense_model("llama", hidden_size=64, head_dim=32, num_attention_heads=2, num_key_value_heads=2)
    jobs.append({"name": "dense", "folder": save(dense, root / "dense")})
    for seqs in SEQUENCES:
        jobs.append({"name": seqs, "folder": str(good), "options": {"max_num_seqs": seqs, **BATCHED}, "on_gpu": True})
    return {result["name"]: result for result in run_program("configure.py", jobs)}


@pytest.mark.parametrize("name", [*FAULTS, *OPTIONS])
def test_it_is_refused_and_says_why(outcomes: dict[str, dict[str, str]], name: str) -> None:
    expected = {**FAULTS, **OPTIONS}[name][1]
    assert expected in outcomes[name].get("error", "no error"), outcomes[name]


@pytest.mark.parametrize("dtype", DTYPES)
def test_auto_is_the_folders_dtype_and_others_are_taken_as_asked(outcomes: Any, dtype: str) -> None:
    assert outcomes[dtype] == {"name": dtype, "architecture": "LteLlamaForCausalLM", "dtype": DTYPES[dtype]}
    assert outcomes["half"]["dtype"] == "torch.bfloat16"


def test_a_dense_folder_of_fp32_is_left_to_vllm(outcomes: dict[str, dict[str, str]]) -> None:
    assert outcomes["dense"]["architecture"] == "LlamaForCausalLM"
    assert outcomes["dense"]["dtype"] != "torch.float32"


def test_gemma_in_fp16_is_refused_as_the_dense_model_is(outcomes: dict[str, dict[str, str]]) -> None:
    assert "'gemma2' does not support float16" in outcomes["gemma"]["error"]


def test_other_families_are_refused_with_the_list_of_those_that_work(outcomes: dict[str, dict[str, str]]) -> None:
    error = outcomes["opt"]["error"]
    assert "architectures must be one of LlamaForCausalLM, MistralForCausalLM," in error
    assert "got OPTForCausalLM" in error
    assert error.count("ForCausalLM") + error.count("LMHeadModel") == len(FAMILIES) + 1


def test_the_transformers_backend_is_refused(outcomes: dict[str, dict[str, str]]) -> None:
    """It gave other tokens with tensor parallelism, without a word."""
    assert "LteLlamaForCausalLM" in outcomes["backend"]["error"]


def test_without_the_plugin_vllm_refuses_the_folder(tmp_path: Path) -> None:
    folder = save(served_model(), tmp_path / "folder")
    jobs = [{"name": "stock", "folder": folder}, {"name": "imported", "folder": folder, "import_lte": True}]
    stock, imported = run_program("configure.py", jobs, VLLM_PLUGINS="")
    assert "lte_llama" in stock["error"]
    assert "LteLlamaForCausalLM" in imported["error"]
    assert "not supported" in imported["error"]


@pytest.mark.parametrize("seqs", SEQUENCES)
def test_a_small_model_has_graphs_of_longer_prompts_beside_vllms_own(outcomes: Any, seqs: int) -> None:
    own, settled = outcomes[seqs]["own"], outcomes[seqs]["settled"]
    assert seqs in own or seqs > own[-1]
    longer = [size for size in range(32, 2049, 32) if size > own[-1]]
    assert len(longer) > 40
    assert settled == [[*own, *longer], 2048]


def test_every_family_of_the_table_is_served_or_refused() -> None:
    from lte.hf.families import FAMILIES as table
    from lte.vllm.architectures import REFUSED, SERVED

    heads = {f"Lte{stock}" for family in table.values() for stock in family.models.values()}
    assert heads == {*SERVED, *REFUSED}
    assert not {*SERVED} & {*REFUSED}
    assert len(SERVED) == len(FAMILIES)
