"""The plan of a whole decoding step computes what the model of transformers computes, token by token."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lte
from lte.hf.decoder import NoPlanError, decoder_plan, same_memory
from lte.ops.step.plan import DecoderPlan, LayerCache
from lte.ops.step.reference import ReferenceEngine
from tests.hf.step_models import STEP_TYPES, WINDOW, accelerated, step_model
from tests.tiny_models import tiny_dense_model, tiny_sparse_model

Measure = Callable[[Tensor, Tensor], float]
STEPS = 64


def poisoned_caches(plan: DecoderPlan, batch: int, size: int, *, rings: bool = True) -> list[LayerCache]:
    """Caches of NaN; with `rings` those of layers with a window hold little more than that, each from another slot."""
    made = []
    for index, layer in enumerate(plan.layers):
        slots = layer.window + index if rings and layer.window else size
        shape = (batch, plan.kv_heads, slots, plan.head_size)
        tensors = [torch.full(shape, torch.nan, dtype=plan.embedding.dtype) for _ in range(2)]
        made.append(LayerCache(keys=tensors[0], values=tensors[1], shift=3 * index))
    return made


def read_by_steps(plan: DecoderPlan, ids: Tensor, starts: Tensor, *, rings: bool = True) -> Tensor:
    """The logits [B, T, V] of tokens [B, T] read one by one; those of padding are zero."""
    step = ReferenceEngine(plan).bind(poisoned_caches(plan, *ids.shape, rings=rings))
    logits = torch.zeros(*ids.shape, len(plan.head))
    for position in range(ids.shape[1]):
        found = step(ids[:, position], torch.full_like(starts, position), starts.clamp(max=position))
        logits[:, position] = torch.where((starts <= position)[:, None], found, 0)
    return logits


class TestReference:
    @pytest.mark.parametrize("rings", [True, False])
    @pytest.mark.parametrize("dense", [True, False])
    @pytest.mark.parametrize("model_type", STEP_TYPES)
    def test_each_position(self, model_type: str, dense: bool, rings: bool, relative_rms: Measure) -> None:
        model = step_model(model_type, dense=dense)
        ids, starts = torch.randint(3, 99, (3, STEPS)), torch.tensor([0, 5, 40])
        mask = (torch.arange(STEPS) >= starts[:, None]).long()
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        with torch.no_grad():
            expected = model(ids, attention_mask=mask, position_ids=positions).logits * mask[..., None]
        plan = decoder_plan(model if dense else lte.accelerate_(model), lay_out_dense=True)
        actual = read_by_steps(plan, ids, starts, rings=rings)
        for position in range(STEPS):
            assert relative_rms(actual[:, position], expected[:, position]) <= 1e-5

    @pytest.mark.parametrize("model_type", STEP_TYPES)
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_sixteen_bits(self, model_type: str, dtype: torch.dtype, relative_rms: Measure) -> None:
        model = step_model(model_type).to(dtype)
        lte.accelerate_(model)
        ids, starts = torch.randint(3, 99, (1, 8)), torch.zeros(1, dtype=torch.int64)
        with torch.no_grad():
            expected = model(ids).logits.float()
        actual = read_by_steps(decoder_plan(model), ids, starts)
        assert relative_rms(actual, expected) <= {torch.bfloat16: 1e-2, torch.float16: 1e-3}[dtype]

    @pytest.mark.parametrize("model_type", ["gemma2", "phi3"])
    def test_int8(self, model_type: str, relative_rms: Measure) -> None:
        model = lte.accelerate_(step_model(model_type), "int8")
        ids, starts = torch.randint(3, 99, (1, 8)), torch.zeros(1, dtype=torch.int64)
        with torch.no_grad():
            expected = model(ids).logits
        plan = decoder_plan(model)
        assert relative_rms(read_by_steps(plan, ids, starts), expected) <= 1e-5
        assert same_memory(plan, decoder_plan(model))
        model.model.layers[1].mlp.down_scale = model.model.layers[1].mlp.down_scale.clone()
        assert not same_memory(plan, decoder_plan(model))

    def test_sequences_at_different_positions(self, relative_rms: Measure) -> None:
        plan = decoder_plan(accelerated("mistral"))
        ids, starts, rows = torch.randint(3, 99, (2, 20)), torch.zeros(2, dtype=torch.int64), torch.arange(2)
        expected = read_by_steps(plan, ids, starts)
        step = ReferenceEngine(plan).bind(poisoned_caches(plan, 2, 20))
        behind = torch.tensor([0, 6])
        for position in range(20):
            at = (position - behind).clamp(min=0)
            logits = step(ids[rows, at], at, starts)
            assert relative_rms(logits, expected[rows, at]) <= 1e-5


class TestPlan:
    @pytest.mark.parametrize("model_type", STEP_TYPES)
    def test_reads_the_parameters_in_place(self, model_type: str) -> None:
        model = accelerated(model_type)
        owned = {p.untyped_storage().data_ptr() for p in model.parameters()}
        plan = decoder_plan(model)
        for part in (plan, *plan.layers):
            for name, value in vars(part).items():
                if isinstance(value, Tensor):
                    assert value.untyped_storage().data_ptr() in owned, name

    def test_dense_models_are_laid_out_on_request(self) -> None:
        model = step_model(dense=True)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        with pytest.raises(NoPlanError, match=r"down_proj of layer 0 is not laid out by neuron"):
            decoder_plan(model)
        plan = decoder_plan(model, lay_out_dense=True)
        assert plan.layers[0].router is None
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        assert plan.layers[1].down.data_ptr() == model.model.layers[1].mlp.down_proj.weight.data_ptr()
        assert same_memory(plan, decoder_plan(model))

    def test_routers_of_16_bit_models_are_rounded_anew(self) -> None:
        model = accelerated().bfloat16()
        router = model.model.layers[0].mlp.router
        router.float()
        assert decoder_plan(model).layers[0].router is not None
        with torch.no_grad():
            router.weight.normal_()
        router = decoder_plan(model).layers[0].router
        assert torch.equal(router, model.model.layers[0].mlp.router.weight.bfloat16())

    @pytest.mark.parametrize("change", ["data", "parameter", "threshold", "frequencies", "nothing"])
    def test_sees_what_changed(self, change: str) -> None:
        model = accelerated()
        before, projection = decoder_plan(model), model.model.layers[1].self_attn.q_proj
        if change == "data":
            projection.weight.data = projection.weight.data.clone()
        elif change == "parameter":
            projection.weight = nn.Parameter(projection.weight.detach().clone())
        elif change == "threshold":
            model.model.layers[0].mlp.threshold_logit += 1
        elif change == "frequencies":
            model.model.rotary_emb.inv_freq.mul_(2)
            assert torch.equal(decoder_plan(model).ropes[0].frequencies, model.model.rotary_emb.inv_freq)
        assert same_memory(before, decoder_plan(model)) == (change in ("nothing", "frequencies"))

    def test_a_copy_is_another_model(self) -> None:
        model = accelerated()
        assert not same_memory(decoder_plan(model), decoder_plan(copy.deepcopy(model)))


def _hook(model: Any) -> None:
    model.model.layers[1].self_attn.register_forward_hook(lambda *args: None)


def _adapt(model: Any) -> None:
    peft = pytest.importorskip("peft")
    peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["k_proj"]), model)


def _double_embedding(model: Any) -> None:
    model.model.embed_tokens.double()


def _replace_forward(model: Any) -> None:
    model.model.norm.forward = model.model.norm.forward


def _other_norm(model: Any) -> None:
    model.model.norm = nn.RMSNorm(32)


def _meta(model: Any) -> None:
    model.lm_head.to("meta")


def _own_attention(model: Any) -> None:
    model.config._attn_implementation = "mine"


def _soften(model: Any) -> None:
    model.model.layers[0].mlp.set_mode("soft")


REFUSALS: dict[str, tuple[str, dict[str, Any], Callable[[Any], object], str]] = {
    "family": ("gpt2", {}, lambda model: None, "gpt2 models have no such step"),
    "dynamic": (
        "llama",
        {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
        lambda model: None,
        "rotary embedding is dynamic",
    ),
    "bidirectional": ("gemma3_text", {"use_bidirectional_attention": True}, lambda model: None, "bidirectional"),
    "attention": (
        "llama",
        {},
        lambda model: setattr(model.config, "_attn_implementation", "mine"),
        "attention is mine",
    ),
    "hooks": ("llama", {}, _hook, "model.layers.1.self_attn has hooks"),
    "adapters": ("llama", {}, _adapt, "is a peft"),
    "dtypes": ("llama", {}, _double_embedding, "float64"),
    "forward": ("llama", {}, _replace_forward, "forward method of model.norm was replaced"),
    "class": ("llama", {}, _other_norm, "model.norm is a torch.nn"),
    "devices": ("llama", {}, _meta, "on meta"),
    "soft mode": ("llama", {}, _soften, "computed by plain PyTorch"),
}


class TestRefusals:
    @pytest.mark.parametrize("name", REFUSALS)
    def test_says_why(self, name: str) -> None:
        model_type, overrides, change, reason = REFUSALS[name]
        model = lte.accelerate_(tiny_sparse_model(model_type, **overrides))
        change(model)
        with pytest.raises(NoPlanError, match=reason), torch.no_grad():
            decoder_plan(model)

    def test_low_rank(self) -> None:
        model = lte.sparsify_(tiny_dense_model(), lte.LteConfig(expert_size=8, router_rank=4, grouping="random"))
        with pytest.raises(NoPlanError, match="SparseFfn"):
            decoder_plan(model)
        with pytest.raises(NoPlanError, match="low rank"):
            decoder_plan(lte.accelerate_(model))

    def test_a_subclass_of_the_users(self) -> None:
        model = accelerated()
        model.__class__ = type("Mine", (type(model),), {"forward": lambda self, *args, **kwargs: None})
        with pytest.raises(NoPlanError, match="it is a Mine, no plain LlamaForCausalLM"):
            decoder_plan(model)


def test_windows_are_shorter_than_the_text() -> None:
    windows = {name: [layer.window for layer in decoder_plan(accelerated(name)).layers] for name in STEP_TYPES}
    assert windows["llama"] == [0, 0]
    assert windows["mistral"] == windows["phi3"] == [WINDOW, WINDOW]
    assert windows["qwen2"] == windows["qwen3"] == [0, WINDOW]
    assert windows["gemma2"] == windows["gemma3_text"] == [WINDOW, 0]
