"""The estimate of a training's memory against what its tensors take."""

from __future__ import annotations

import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor
from transformers import Qwen2Config, Qwen2ForCausalLM

import lte
from lte.cli import train_watcher
from lte.cli.train_watcher import TrainWatcher
from lte.train.config import TrainConfig
from lte.train.memory import estimate_memory
from lte.train.optimisers import cast_weights_
from tests.tiny_models import tiny_dense_model

BATCH, LENGTH, LAYERS = 4, 64, 3


def model_of(sparse: bool = True, **options: Any) -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 320, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = Qwen2Config(**{**sizes, "vocab_size": 4096, "num_hidden_layers": LAYERS, **options})
    model = Qwen2ForCausalLM(config)
    return lte.sparsify_(model, lte.LteConfig(expert_size=32, grouping="contiguous")) if sparse else model


def config(**options: Any) -> TrainConfig:
    return TrainConfig(batch_size=BATCH, report_to="none", **options)


def kept_bytes(model: Any, bf16: bool) -> int:
    """Bytes of what a forward pass keeps for its backward pass, weights and their copies left out."""
    for ffn in lte.sparse_ffns(model).values():
        ffn.set_mode("straight_through")
        ffn.record_logits = True
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    shapes = {tuple(shape) for p in model.parameters() if p.ndim == 2 for shape in (p.shape, p.T.shape)}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        place = tensor.untyped_storage().data_ptr()
        if place not in weights and tuple(tensor.shape) not in shapes:
            kept[place] = tensor
        return tensor

    ids = torch.randint(0, 4096, (BATCH, LENGTH))
    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with hooks, torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        model.base_model(ids, use_cache=False)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize(
    "options", [{}, {"bf16": True}, {"weights_dtype": "bfloat16"}], ids=["fp32", "autocast", "bf16"]
)
@pytest.mark.parametrize("sizes", [{}, {"hidden_size": 128, "intermediate_size": 256}])
def test_activations_are_what_a_pass_keeps(sparse: bool, options: dict[str, Any], sizes: dict[str, int]) -> None:
    model = model_of(sparse, **sizes)
    settings = config(**options)
    cast_weights_(model, getattr(torch, settings.weights_dtype))
    estimate = estimate_memory(model, settings, LENGTH)
    assert estimate.activations == pytest.approx(kept_bytes(model.train(), settings.bf16), rel=0.2)


def test_weights_gradients_and_moments_are_those_of_the_tensors() -> None:
    model = model_of()
    numbers = sum(p.numel() for p in model.parameters())
    routers = sum(p.numel() for f in lte.sparse_ffns(model).values() for p in f.router.parameters())
    teacher = model_of(sparse=False).bfloat16()
    found = estimate_memory(model, config(), LENGTH, teacher)
    assert (found.weights, found.gradients, found.moments) == (4 * numbers, 4 * numbers, 8 * numbers)
    assert found.teacher == 2 * sum(p.numel() for p in teacher.parameters())
    found = estimate_memory(model, config(weights_dtype="bfloat16", optim="adamw_torch"), LENGTH)
    narrow = numbers - routers
    expected = 2 * narrow + 4 * routers
    assert (found.weights, found.gradients, found.moments) == (expected, expected, 2 * expected)
    # Norms and biases have wide moments.
    found = estimate_memory(model, config(weights_dtype="bfloat16"), LENGTH)
    assert found.moments == pytest.approx(2.03 * narrow + 8 * routers, rel=0.05)
    found = estimate_memory(model, config(optim="adamw_bnb_8bit"), LENGTH)
    embeddings = model.get_input_embeddings().weight.numel()
    assert found.moments == pytest.approx(2.03 * (narrow - embeddings) + 8 * (routers + embeddings), rel=0.05)


def test_with_adapters_they_and_the_routers_train() -> None:
    pytest.importorskip("peft")
    from peft import LoraConfig, get_peft_model

    found = estimate_memory(model_of(), config(lora_rank=4, weights_dtype="bfloat16", optim="adamw_torch"), LENGTH)
    model = model_of()
    cast_weights_(model, torch.bfloat16)
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))
    adapters = sum(p.nbytes for name, p in adapted.named_parameters() if "lora_" in name)
    routers = sum(p.nbytes for f in lte.sparse_ffns(model).values() for p in f.router.parameters())
    assert found.gradients == adapters + routers
    assert found.moments == 2 * found.gradients
    assert found.weights == sum(p.nbytes for p in adapted.parameters())
    in_4_bits = estimate_memory(model_of(), config(lora_rank=4, lora_4bit=True), LENGTH)
    assert in_4_bits.weights < estimate_memory(model_of(), config(lora_rank=4), LENGTH).weights
    # All that is not in 4 bits is then in bf16, and autocast copies the adapters alone.
    autocast = estimate_memory(model_of(), config(lora_rank=4, lora_4bit=True, bf16=True), LENGTH)
    assert autocast.weights < in_4_bits.weights


def test_what_saves_memory_lowers_the_estimate() -> None:
    model = model_of()
    plain = estimate_memory(model, config(), LENGTH)
    assert estimate_memory(model, config(gradient_checkpointing=True), LENGTH).activations < plain.activations / 2
    assert estimate_memory(model, config(trainable="routers"), LENGTH).moments < plain.moments / 10
    ffn = estimate_memory(model, config(trainable="ffn"), LENGTH)
    assert ffn.gradients == sum(p.nbytes for f in lte.sparse_ffns(model).values() for p in f.parameters())
    whole = estimate_memory(model, config(loss_chunk_tokens=0), LENGTH, model_of(sparse=False))
    assert whole.loss == BATCH * LENGTH * 4096 * (4 + 12 + 4 + 8)
    chunked = estimate_memory(model, config(loss_chunk_tokens=16), LENGTH, model_of(sparse=False))
    assert chunked.loss == 16 * 4096 * 16 + 4 * model.get_output_embeddings().weight.numel()


def qwen_of_1_5b() -> Any:
    sizes = {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12}
    config = Qwen2Config(**sizes, num_key_value_heads=2, vocab_size=151936, tie_word_embeddings=True)
    with torch.device("meta"):
        return Qwen2ForCausalLM(config)


@pytest.mark.parametrize(
    ("options", "limit"),
    [
        ({"bf16": True}, 48e9),
        ({"bf16": True, "optim": "adamw_bnb_8bit"}, 40e9),
        ({"weights_dtype": "bfloat16"}, 24e9),
        ({"weights_dtype": "bfloat16", "lora_rank": 16}, 16e9),
    ],
)
def test_a_model_of_1_5b_fits(options: dict[str, Any], limit: float) -> None:
    settings = TrainConfig(batch_size=16, gradient_checkpointing=True, report_to="none", **options)
    model, teacher = qwen_of_1_5b(), qwen_of_1_5b().bfloat16()
    found = estimate_memory(model, settings, 1024, teacher)
    assert found.teacher == pytest.approx(3.09e9, rel=0.01)
    assert limit / 2 < found.total < limit
    assert found.sentence().startswith(f"about {found.total / 1e9:.2g} GB (weights ")


@pytest.mark.parametrize("model_type", ["gpt2", "opt", "gemma2", "phi3", "gpt_neox"])
def test_every_kind_of_family_has_an_estimate(model_type: str) -> None:
    model = lte.sparsify_(tiny_dense_model(model_type), lte.LteConfig(expert_size=8, grouping="contiguous"))
    found = estimate_memory(model, config(), LENGTH)
    assert found.activations > 0
    assert found.loss > 0


@pytest.mark.parametrize(("offload", "told"), [("false", True), ("true", False)])
def test_a_gpu_need_not_hold_what_lies_on_the_cpu(
    offload: str, told: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that has room for activations, but not for weights, gradients and moments beside them."""
    model, train = model_of(), config(stage1_steps=1, stage2_steps=1)
    memory = estimate_memory(model, train, 8)
    monkeypatch.setattr(train_watcher, "gpu_bytes", lambda: int(memory.not_offloaded + 1))
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_OFFLOAD_PARAMS", offload)
    work: Any = SimpleNamespace(
        data_config=SimpleNamespace(sequence_length=8), train=range(64), info={"validation": {"tokens": 1}}
    )
    said = Console(file=io.StringIO(), width=1000)
    settings: Any = SimpleNamespace(stages=(1, 2), train=train)
    TrainWatcher(settings, work, tmp_path, None, said, lambda: None, False).before_training(model, None, train)
    text = said.file.getvalue()  # type: ignore[attr-defined]
    assert ("This GPU has" in text) == told
    assert ("weights, gradients and moments of it are the CPU's" in text) != told
