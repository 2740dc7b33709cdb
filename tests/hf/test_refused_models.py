"""Mixtures of experts and models of pictures or sound are refused in one sentence, and left as they were."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import lte

TEXT = {
    "vocab_size": 16,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}
PICTURES = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}


def mixtral() -> nn.Module:
    config = transformers.MixtralConfig(**TEXT, num_local_experts=2, num_experts_per_tok=1)
    return transformers.MixtralForCausalLM(config)


def qwen2_moe() -> nn.Module:
    config = transformers.Qwen2MoeConfig(
        **TEXT, num_experts=2, num_experts_per_tok=1, moe_intermediate_size=8, shared_expert_intermediate_size=8
    )
    return transformers.Qwen2MoeForCausalLM(config)


def llava() -> nn.Module:
    config = transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(**TEXT), vision_config=transformers.CLIPVisionConfig(**PICTURES)
    )
    return transformers.LlavaForConditionalGeneration(config)


def paligemma() -> nn.Module:
    config = transformers.PaliGemmaConfig(
        text_config={"model_type": "gemma", "head_dim": 8, **TEXT},
        vision_config={"model_type": "siglip_vision_model", **PICTURES},
        projection_dim=16,
        hidden_size=16,
    )
    return transformers.PaliGemmaForConditionalGeneration(config)


def gemma3() -> nn.Module:
    config = transformers.Gemma3Config(
        text_config={"head_dim": 8, **TEXT}, vision_config=PICTURES, mm_tokens_per_image=4
    )
    return transformers.Gemma3ForConditionalGeneration(config)


def qwen2_vl() -> nn.Module:
    config = transformers.Qwen2VLConfig(
        text_config={**TEXT, "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2]}},
        vision_config={"depth": 1, "embed_dim": 16, "hidden_size": 16, "num_heads": 2, "patch_size": 4},
    )
    return transformers.Qwen2VLForConditionalGeneration(config)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (mixtral, "model must have dense FFNs, got model_type='mixtral', a mixture of experts"),
        (qwen2_moe, "model must have dense FFNs, got model_type='qwen2_moe', a mixture of experts"),
        (llava, "model must take text alone, got model_type='llava', which also takes pictures"),
        (paligemma, "model must take text alone, got model_type='paligemma', which also takes pictures"),
        (gemma3, "model must take text alone, got model_type='gemma3', which also takes pictures"),
        (qwen2_vl, "model must take text alone, got model_type='qwen2_vl', which also takes pictures"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_one_sentence_and_an_unchanged_model(make: Callable[[], Any], reason: str) -> None:
    model = make()
    modules = [(name, type(module)) for name, module in model.named_modules()]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=reason) as error:
        lte.sparsify_(model, lte.LteConfig(expert_size=4))
    assert ". " not in str(error.value)
    assert "llama, mistral" in str(error.value)
    assert [(name, type(module)) for name, module in model.named_modules()] == modules
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("model_type", ["qwen3_moe", "gpt_oss", "deepseek_v3", "olmoe", "granitemoe", "dbrx"])
def test_other_mixtures_are_known_by_their_config(model_type: str) -> None:
    config = transformers.AutoConfig.for_model(model_type)
    with pytest.raises(ValueError, match=f"got model_type='{model_type}', a mixture of experts"):
        lte.hf.families.family_of(config)


def test_sound_is_named() -> None:
    config = transformers.AutoConfig.for_model("gemma3n")
    with pytest.raises(ValueError, match="which also takes pictures and sound"):
        lte.hf.families.family_of(config)
