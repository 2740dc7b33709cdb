"""What `LteConfig` can add to a model, on every path that computes: always-on experts, biases for what is dropped."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import lte
from lte.eval.sparsity import measure_sparsity
from lte.hf.decoder import decoder_plan
from lte.hf.install import wrapped_ffns
from lte.hf.sparsity_curve import SparsityGoal
from lte.nn.router import ALWAYS_ON_LOGIT
from lte.ops.step.plan import LayerCache
from lte.ops.step.reference import ReferenceEngine
from tests.tiny_models import EXPERT_SIZE, logits_of, randomise_routers_, tiny_dense_model, zero_dropout_

Measure = Callable[[Tensor, Tensor], float]
TEXT = [{"input_ids": torch.randint(3, 99, (4, 24), generator=torch.Generator().manual_seed(5))}]


def with_bias(model_type: str = "llama", **options: Any) -> Any:
    """A model with random routers whose down projections have biases that are not 0."""
    config = lte.LteConfig(expert_size=EXPERT_SIZE, grouping="random", dropped_bias=True, **options)
    model = randomise_routers_(lte.sparsify_(tiny_dense_model(model_type), config))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for ffn in lte.sparse_ffns(model).values():
            bias = ffn.part(ffn.layout.down).bias
            bias.copy_(torch.randn(bias.shape, generator=generator))
    return model


def test_a_converted_model_with_biases_computes_what_it_did(model_type: str, relative_rms: Measure) -> None:
    tokens, model = TEXT[0]["input_ids"], tiny_dense_model(model_type)
    expected = logits_of(model, tokens)
    lte.sparsify_(model, lte.LteConfig(expert_size=EXPERT_SIZE, grouping="random", dropped_bias=True))
    assert relative_rms(logits_of(model, tokens), expected) <= 1e-5
    assert all(ffn.part(ffn.layout.down).bias is not None for ffn in wrapped_ffns(model).values())


def test_biases_are_saved_loaded_and_computed_by_the_kernels(
    model_type: str, relative_rms: Measure, tmp_path: Path
) -> None:
    model, tokens = with_bias(model_type), TEXT[0]["input_ids"]
    expected = logits_of(model, tokens)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    assert torch.equal(logits_of(loaded, tokens), expected)
    lte.accelerate_(loaded)
    assert relative_rms(logits_of(loaded, tokens), expected) <= 1e-5
    for ffn in lte.sparse_ffns(loaded).values():
        nn.init.zeros_(ffn.part(ffn.layout.down).bias)
    assert relative_rms(logits_of(loaded, tokens), expected) > 0.01


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_whole_steps_add_the_bias(dtype: torch.dtype, relative_rms: Measure) -> None:
    model = with_bias("qwen2").to(dtype)
    for ffn in lte.sparse_ffns(model).values():
        ffn.router.float()
    model.set_attn_implementation("eager")
    token = torch.tensor([7])
    expected = logits_of(model, token[None])[0]
    lte.accelerate_(model)
    plan = decoder_plan(model)
    assert all(layer.down_bias is not None and layer.down_bias.any() for layer in plan.layers)
    shape = (1, plan.kv_heads, 8, plan.head_size)
    caches = [
        LayerCache(keys=torch.zeros(shape, dtype=dtype), values=torch.zeros(shape, dtype=dtype)) for _ in plan.layers
    ]
    step = ReferenceEngine(plan).bind(caches)
    found = step(token, torch.tensor([0]), torch.tensor([0]))
    assert relative_rms(found, expected.float()) <= (1e-5 if dtype == torch.float32 else 2e-2)


def test_stock_classes_refuse_the_folder_and_a_missing_bias_is_an_error(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    model = with_bias("qwen2")
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    names = [name for name in weights if name.endswith("down_proj.bias")]
    assert len(names) == 2
    save_file({name: weight for name, weight in weights.items() if name not in names}, file, {"format": "pt"})
    with pytest.raises(ValueError, match=r"down_proj\.bias"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    with pytest.raises((KeyError, ValueError)):
        tiny_dense_model("qwen2").__class__.from_pretrained(tmp_path)


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "gpt2", "opt"])
def test_densified_models_are_stock_ones_again(model_type: str, tmp_path: Path) -> None:
    stock = tiny_dense_model(model_type)
    model = lte.densify_(with_bias(model_type))
    assert model.state_dict().keys() == stock.state_dict().keys()
    model.save_pretrained(tmp_path)
    loaded = type(stock).from_pretrained(tmp_path).eval()
    assert torch.equal(logits_of(loaded, TEXT[0]["input_ids"]), logits_of(model, TEXT[0]["input_ids"]))


def test_a_family_without_biases_of_its_own_keeps_none_after_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_dense_model()
    monkeypatch.setattr("lte.methods.method.become_sparse_", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        lte.sparsify_(model, lte.LteConfig(expert_size=EXPERT_SIZE, grouping="random", dropped_bias=True))
    assert model.model.layers[0].mlp.down_proj.bias is None


def test_spread_ffns_without_biases_are_refused() -> None:
    model = tiny_dense_model("opt", enable_bias=False)
    with pytest.raises(ValueError, match="dropped_bias must be false for FFNs that are spread"):
        lte.sparsify_(model, lte.LteConfig(expert_size=EXPERT_SIZE, grouping="random", dropped_bias=True))


def text_for(model: Any) -> list[dict[str, Tensor]]:
    read_twice = model.config.is_encoder_decoder
    return [{**batch, "decoder_input_ids": batch["input_ids"]} for batch in TEXT] if read_twice else TEXT


def always_on(model_type: str = "llama", share: float = 0.25, **options: Any) -> Any:
    config = lte.LteConfig(expert_size=EXPERT_SIZE, always_on=share, **{"grouping": "random", **options})
    model = zero_dropout_(tiny_dense_model(model_type))
    return lte.sparsify_(model, config, calibration=text_for(model))


@pytest.mark.parametrize("grouping", ["random", "contiguous", "kmeans", "coactivation", "contribution", "chunks"])
def test_the_most_used_neurons_lie_in_the_experts_that_are_always_on(grouping: str, relative_rms: Measure) -> None:
    tokens, dense = TEXT[0]["input_ids"], tiny_dense_model()
    hidden: list[Tensor] = []
    first = dense.model.layers[0].mlp
    handle = first.down_proj.register_forward_pre_hook(lambda module, args: hidden.append(args[0]))
    expected = logits_of(dense, tokens)
    handle.remove()
    size = hidden[0].flatten(0, 1).abs() * first.down_proj.weight.norm(dim=0)
    top = size.topk(round(0.1 * size.shape[1]), dim=1).indices.flatten()
    used = torch.bincount(top, minlength=size.shape[1])
    wanted = used.argsort(descending=True, stable=True)[: 2 * EXPERT_SIZE].sort().values
    model = always_on(grouping=grouping)
    ffn = model.model.layers[0].mlp
    assert torch.equal(ffn.down_proj.weight[:, : 2 * EXPERT_SIZE], first.down_proj.weight[:, wanted])
    # All neurons are there once.
    assert sorted(ffn.gate_proj.weight[:, 0].tolist()) == sorted(first.gate_proj.weight[:, 0].tolist())
    assert relative_rms(logits_of(model, tokens), expected) <= 1e-5


def test_they_are_active_in_every_measure_and_on_every_path(
    model_type: str, relative_rms: Measure, tmp_path: Path
) -> None:
    model, tokens = always_on(model_type), TEXT[0]["input_ids"]
    for ffn in lte.sparse_ffns(model).values():
        nn.init.normal_(ffn.router.weight)
        nn.init.constant_(ffn.router.bias, -50.0)
        ffn.router.pin_()
        assert ffn.router.bias[:2].tolist() == [ALWAYS_ON_LOGIT] * 2
    expected = logits_of(model, tokens)
    measured = measure_sparsity(model, text_for(model))
    assert measured.sparsity == pytest.approx(0.75)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    assert [ffn.router.always_on for ffn in lte.sparse_ffns(loaded).values()] == [2] * len(lte.sparse_ffns(model))
    assert torch.equal(logits_of(loaded, tokens), expected)
    lte.accelerate_(loaded)
    assert relative_rms(logits_of(loaded, tokens), expected) <= 1e-5


def test_thresholds_are_set_around_them() -> None:
    model = always_on(target_sparsity=0.5)
    randomise_routers_(model)
    for ffn in lte.sparse_ffns(model).values():
        ffn.router.pin_()
    lte.calibrate_(model, TEXT)
    assert measure_sparsity(model, TEXT).sparsity == pytest.approx(0.5, abs=0.01)
    assert all(ffn.router.bias[:2].min() > ALWAYS_ON_LOGIT - 50 for ffn in lte.sparse_ffns(model).values())


def test_a_target_beyond_them_is_refused_and_the_folder_still_loads(tmp_path: Path) -> None:
    model = always_on(target_sparsity=0.5)
    most = 1 - model.lte_config.num_always_on(lte.sparse_ffns(model)["model.layers.0.mlp"].num_experts) / (
        lte.sparse_ffns(model)["model.layers.0.mlp"].num_experts
    )
    batches = [{**batch, "labels": batch["input_ids"]} for batch in TEXT]
    with pytest.raises(ValueError, match="target_sparsity must be what some threshold of the model gives"):
        lte.calibrate_curve_(model, {"text": batches}, goal=SparsityGoal(target_sparsity=0.99))
    assert model.lte_config.threshold == 0.5
    curve = lte.calibrate_curve_(model, {"text": batches}, goal=SparsityGoal(target_sparsity=most))
    assert curve.chosen is not None
    model.save_pretrained(tmp_path)
    assert AutoModelForCausalLM.from_pretrained(tmp_path).target_sparsity == most


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match=r"target_sparsity must be below 1 - always_on = 0\.7"):
        lte.sparsify_(tiny_dense_model(), lte.LteConfig(target_sparsity=0.7, always_on=0.3), calibration=TEXT)
    with pytest.raises(ValueError, match="always_on must lie in"):
        lte.LteConfig(always_on=1.0)
    with pytest.raises(ValueError, match="must get calibration batches"):
        lte.sparsify_(tiny_dense_model(), lte.LteConfig(expert_size=EXPERT_SIZE, always_on=0.1))
