"""Routers that read the mean of the tokens before: what they compute, causality, and their state in the cache."""

from __future__ import annotations

import copy
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache

import lte
from lte.eval.answers import generate_greedily
from lte.hf.threshold import set_threshold_
from lte.nn.router_context import mean_before
from lte.runs.conversion import convert_folder
from lte.train.combinations import check_combination
from lte.train.config import TrainConfig
from lte.vllm.settings import serve_settings
from tests.hf.step_models import SETTINGS
from tests.tiny_models import EXPERT_SIZE, VOCAB, tiny_dense_model, tiny_sparse_model

WINDOW = 3
TYPES = ["llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3_text", "phi3"]


def context_model(model_type: str = "llama", **options: Any) -> Any:
    """A model whose routers take as much from the tokens before as from their own."""
    dense = tiny_dense_model(model_type, **{**SETTINGS[model_type], "max_position_embeddings": 128})
    config = lte.LteConfig(expert_size=EXPERT_SIZE, grouping="random", router_context=WINDOW, **options)
    model = lte.sparsify_(dense, config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for ffn in lte.sparse_ffns(model).values():
            for parameter in ffn.router.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
            ffn.router.pin_()
    return model


def ids_of(rows: int = 2, tokens: int = 17, seed: int = 0) -> Tensor:
    return torch.randint(3, VOCAB, (rows, tokens), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def read(model: Any, ids: Tensor, **inputs: Any) -> tuple[Tensor, list[Tensor]]:
    """The logits of the model, and those of its routers [B, T, E]."""
    ffns = list(lte.sparse_ffns(model).values())
    for ffn in ffns:
        ffn.record_logits = True
    inputs = {"use_cache": False, **inputs}
    logits = model(ids, **inputs).logits
    return logits, [ffn.logits.reshape(*ids.shape, -1) for ffn in ffns]


def test_means_by_hand() -> None:
    summaries = torch.randn(2, 9, 4, generator=torch.Generator().manual_seed(0))
    # In the first row another document begins at token 5, the second has two tokens of padding on the left.
    positions = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3], [0, 0, 0, 1, 2, 3, 4, 5, 6]])
    found = mean_before(summaries, positions, WINDOW)
    for row in range(2):
        for t in range(9):
            before = summaries[row, max(0, t - min(WINDOW, int(positions[row, t]))) : t]
            wanted = before.mean(0) if len(before) else torch.zeros(4)
            torch.testing.assert_close(found[row, t], wanted)
    for start in range(1, 9):
        assert torch.equal(mean_before(summaries, positions[:, start:], WINDOW), found[:, start:])
    # Positions that begin late do not reach back behind the first token.
    torch.testing.assert_close(mean_before(summaries[:, :2], torch.tensor([[7, 8]]), 3)[:, 1], summaries[:, 0])


@pytest.mark.parametrize("model_type", TYPES)
def test_scores_are_those_of_the_formula(model_type: str) -> None:
    model, ids, inputs = context_model(model_type), ids_of(), list[Tensor]()
    for ffn in lte.sparse_ffns(model).values():
        ffn.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    _, logits = read(model, ids)
    for ffn, x, found in zip(lte.sparse_ffns(model).values(), inputs, logits, strict=True):
        router = ffn.router
        for t in range(17):
            wanted = x[:, t] @ router.weight.T + router.bias
            if t:
                wanted = (
                    wanted + (x[:, max(0, t - WINDOW) : t] @ router.context_down.T).mean(1) @ router.context_weight.T
                )
            torch.testing.assert_close(found[:, t], wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("model_type", TYPES)
def test_later_tokens_and_other_requests_change_nothing(model_type: str) -> None:
    model, ids = context_model(model_type), ids_of()
    logits, scores = read(model, ids)
    for place in (1, 6, 16):
        changed = ids.clone()
        changed[:, place] = (changed[:, place] + 5) % (VOCAB - 3) + 3
        other, other_scores = read(model, changed)
        assert torch.equal(other[:, :place], logits[:, :place])
        for one, two in zip(scores, other_scores, strict=True):
            assert torch.equal(one[:, :place], two[:, :place])
            assert not torch.equal(one[:, place], two[:, place])
        changed = ids.clone()
        changed[1, place] = ids_of(seed=9)[1, place]
        assert torch.equal(read(model, changed)[0][0], logits[0])


def test_a_later_token_reads_the_ones_before_it_in_the_window_alone() -> None:
    model, ids = context_model(), ids_of()
    _, scores = read(model, ids)
    changed = ids.clone()
    changed[:, 4] = (changed[:, 4] + 5) % (VOCAB - 3) + 3
    first = read(model, changed)[1][0]
    # Attention, too, tells the first layer's routers of it; without it the window alone does.
    with torch.no_grad():
        model.model.layers[0].self_attn.o_proj.weight.zero_()
        model.model.layers[0].self_attn.o_proj.bias.zero_()
    before, after = read(model, ids)[1][0], read(model, changed)[1][0]
    same = [torch.equal(before[:, t], after[:, t]) for t in range(17)]
    assert [t for t in range(17) if not same[t]] == [4, 5, 6, 7]
    assert not torch.equal(first, scores[0])


def test_padding_on_the_left_is_not_read() -> None:
    model, ids = context_model(), ids_of(1, 9)
    alone, _ = read(model, ids)
    for pads in (torch.zeros(1, 5, dtype=torch.long), ids_of(1, 5, seed=4)):
        mask = torch.cat([torch.zeros(1, 5), torch.ones(1, 9)], 1).long()
        padded, _ = read(model, torch.cat([pads, ids], 1), attention_mask=mask)
        torch.testing.assert_close(padded[:, 5:], alone, rtol=1e-4, atol=1e-4)
    right, _ = read(model, torch.cat([ids, ids_of(1, 5)], 1), attention_mask=mask.flip(1))
    torch.testing.assert_close(right[:, :9], alone, rtol=1e-4, atol=1e-4)


def test_a_mask_by_place_counts_as_one_by_name() -> None:
    model, ids = context_model(), ids_of(1, 9)
    mask, padded = torch.cat([torch.zeros(1, 5), torch.ones(1, 9)], 1).long(), torch.cat([ids_of(1, 5), ids], 1)
    with torch.no_grad():
        alone = model.model(ids, use_cache=False).last_hidden_state
        found = model.model(padded, mask, use_cache=False).last_hidden_state
    torch.testing.assert_close(found[:, 5:], alone, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="exactly one of input_ids or inputs_embeds"):
        model(attention_mask=mask)


def test_documents_that_share_a_row_do_not_see_each_other() -> None:
    model, ids = context_model(), ids_of(1, 17)
    positions = torch.cat([torch.arange(8), torch.arange(9)])[None]
    packed, _ = read(model, ids, position_ids=positions)
    torch.testing.assert_close(packed[:, 8:], read(model, ids[:, 8:])[0], rtol=1e-4, atol=1e-4)
    changed = torch.cat([ids_of(1, 8, seed=5), ids[:, 8:]], 1)
    assert torch.equal(read(model, changed, position_ids=positions)[0][:, 8:], packed[:, 8:])


@pytest.mark.parametrize("model_type", TYPES)
def test_the_state_survives_whatever_generate_does_with_its_cache(model_type: str) -> None:
    model, prompt = context_model(model_type), ids_of(1, 13)
    ids = torch.cat([prompt, prompt[:, :6]], 1)
    plain = generate_greedily(model, ids, 12)
    # Without a cache: all tokens anew for each.
    assert torch.equal(generate_greedily(model, ids, 12, use_cache=False), plain)
    wanted, _ = read(model, plain)
    for pieces in ([5, 9, 17], [1, 1, 29], [19] + [1] * 12):
        cache, parts = DynamicCache(config=model.config), []
        for part in plain.split(pieces, dim=1):
            parts.append(read(model, part, past_key_values=cache, use_cache=True)[0])
        torch.testing.assert_close(torch.cat(parts, 1), wanted, rtol=1e-4, atol=1e-4)
    if SETTINGS[model_type].get("sliding_window") is None:
        assert torch.equal(generate_greedily(model, ids, 12, prefill_chunk_size=4), plain)
    assert torch.equal(generate_greedily(model, ids, 12, prompt_lookup_num_tokens=4), plain)
    assistant = set_threshold_(context_model(model_type), 0.7)
    assert torch.equal(generate_greedily(model, ids, 12, assistant_model=assistant), plain)


def test_a_prefix_that_is_kept_and_a_batch_of_beams() -> None:
    model, ids = context_model(), ids_of(1, 19)
    plain = generate_greedily(model, ids, 8)
    kept = DynamicCache(config=model.config)
    read(model, ids[:, :11], past_key_values=kept, use_cache=True)
    for _ in range(2):
        assert torch.equal(generate_greedily(model, ids, 8, past_key_values=copy.deepcopy(kept)), plain)
    beams = generate_greedily(model, ids, 8, num_beams=3)
    assert torch.equal(beams, generate_greedily(model, ids, 8, num_beams=3, use_cache=False))
    rows = torch.cat([ids, ids_of(1, 19, seed=8)])
    both = generate_greedily(model, rows, 8)
    assert torch.equal(both[:1], plain)
    padded = torch.cat([torch.zeros(1, 4, dtype=torch.long), ids], 1)
    longer = torch.cat([padded, ids_of(1, 23, seed=2)])
    mask = torch.ones_like(longer)
    mask[0, :4] = 0
    found = model.generate(longer, attention_mask=mask, max_new_tokens=8, do_sample=False, eos_token_id=None)
    assert torch.equal(found[:1, 4:], plain)


def test_what_cannot_keep_the_state_is_refused() -> None:
    model, ids = context_model(), ids_of(1, 9)
    with pytest.raises(
        ValueError, match="past_key_values must be a DynamicCache on the device of a model with router_con"
    ):
        generate_greedily(model, ids, 4, cache_implementation="static")
    paged: Any = torch.nn.Identity()
    with pytest.raises(ValueError, match=r"past_key_values must be a DynamicCache .* and not in continuous batches"):
        read(model, ids, cache=paged)
    cache = DynamicCache()
    with torch.no_grad():
        tiny_dense_model("llama", **{**SETTINGS["llama"], "max_position_embeddings": 128})(
            ids, past_key_values=cache, use_cache=True
        )
    with pytest.raises(ValueError, match="past_key_values must hold what the routers have seen of all 9 tokens, got 0"):
        read(model, ids, past_key_values=cache, use_cache=True)
    with pytest.raises(
        ValueError, match="router_context must be 0 for the kernels, which route each token by itself, got 3"
    ):
        lte.accelerate_(model)
    ffn = next(iter(lte.sparse_ffns(model).values()))
    read(model, ids)
    for alone in (ffn, copy.deepcopy(ffn)):
        with pytest.raises(ValueError, match="a model with router_context must be called as a whole"):
            alone(torch.randn(1, 9, 32))
    with pytest.raises(ValueError, match="router_context must be 0 where a router is asked about hidden states alone"):
        ffn.router(torch.randn(1, 4, 32))
    for model_type in ("gpt2", "opt", "bert"):
        with pytest.raises(ValueError, match=f"router_context must be 0 for {model_type}, whose blocks are not told"):
            lte.sparsify_(tiny_dense_model(model_type), lte.LteConfig(expert_size=EXPERT_SIZE, router_context=2))
    with pytest.raises(ValueError, match="router_context must be 0 for vLLM, whose caches do not keep"):
        serve_settings(model.config)
    with pytest.raises(ValueError, match="router_context must be a whole number from 0, got router_context=-1"):
        lte.LteConfig(router_context=-1)
    for settings, name in (({"regroup_count": 1}, "regroup_count"), ({}, "dropped_bias")):
        config = lte.LteConfig(router_context=2, dropped_bias=name == "dropped_bias")
        with pytest.raises(ValueError, match=f"router_context must be 0 with {name}"):
            check_combination(
                config, TrainConfig(**settings), (1, 2), distils=False, sequence_length=64, new_routers=True
            )


def test_folders_copies_and_the_dense_model(tmp_path: Path) -> None:
    model, ids = context_model(always_on=0.0), ids_of()
    logits, _ = read(model, ids)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(read(loaded, ids)[0], logits)
    assert torch.equal(read(copy.deepcopy(model), ids)[0], logits)
    narrow = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert all(p.dtype == torch.float32 for f in lte.sparse_ffns(narrow).values() for p in f.router.parameters())
    assert read(narrow, ids)[0].isfinite().all()
    lte.densify_(loaded)
    assert not any(module._forward_pre_hooks for module in loaded.modules())
    with torch.no_grad():
        dense = tiny_dense_model("llama", **{**SETTINGS["llama"], "max_position_embeddings": 128})
        torch.testing.assert_close(loaded(ids).logits, dense(ids).logits, rtol=1e-4, atol=1e-4)


def test_the_cache_is_let_go() -> None:
    model, cache = context_model(), DynamicCache()
    read(model, ids_of(), past_key_values=cache, use_cache=True)
    gone = weakref.ref(cache)
    del cache
    assert gone() is None
    for ffn in lte.sparse_ffns(model).values():
        ffn.set_mode("dense")
    cache = DynamicCache()
    model(ids_of(), past_key_values=cache, use_cache=True)
    gone = weakref.ref(cache)
    del cache
    assert gone() is None


def test_a_folder_converted_layer_by_layer_is_the_same(tmp_path: Path) -> None:
    config = lte.LteConfig(expert_size=EXPERT_SIZE, grouping="kmeans", router_context=5)
    tiny_dense_model().save_pretrained(tmp_path / "dense")
    convert_folder(tmp_path / "dense", tmp_path / "sparse", config)
    loaded, model = AutoModelForCausalLM.from_pretrained(tmp_path / "sparse"), lte.sparsify_(tiny_dense_model(), config)
    assert loaded.state_dict().keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


def test_new_routers_start_as_those_without_and_without_are_as_ever() -> None:
    dense, ids = tiny_dense_model(), ids_of()
    with torch.no_grad():
        wanted = dense(ids).logits
    model = lte.sparsify_(dense, lte.LteConfig(expert_size=EXPERT_SIZE, grouping="random", router_context=8))
    torch.testing.assert_close(read(model, ids)[0], wanted, rtol=1e-4, atol=1e-4)
    without = tiny_sparse_model()
    assert not any("context" in name for name in without.state_dict())
    assert not any(module._forward_pre_hooks for module in without.modules())
