"""Speculative decoding through `generate`: prompt lookup, assistants, and the passes that check drafts."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

import lte
from lte.eval.answers import first_difference, generate_greedily
from lte.eval.speculation import PassClock, closest_call
from lte.hf import checking, stepping
from lte.hf.checking import CheckedModel
from lte.hf.stepping import has_engine
from lte.hf.threshold import set_threshold_
from lte.ops.step import engines
from tests.hf.step_models import STEP_TYPES, accelerated, step_model
from tests.tiny_models import PAD, VOCAB

TOKENS = 30
# Transformers takes tokens of padding in what an assistant reads for padding, wherever they are.
NEVER: dict[str, Any] = {"suppress_tokens": [PAD]}


@pytest.fixture(scope="module")
def prompt() -> Tensor:
    ids = torch.randint(3, VOCAB, (1, 20), generator=torch.Generator().manual_seed(0))
    # What is there twice can be looked up.
    return torch.cat([ids, ids[:, :12]], 1)


def same(model: Any, prompt: Tensor, one: Tensor, other: Tensor) -> bool:
    """Whether two greedy answers are equal, or differ by rounding alone: as the goal of fp32 says."""
    place = first_difference(one[0], other[0])
    if place is None:
        return True
    close = closest_call(model, one[0, :place])
    return close["logit_gap"] <= 1e-4 or close["score_distance"] <= 1e-5


def propose_(assistant: Any, tokens: int) -> Any:
    """Has an assistant propose just so many tokens at a time, whatever it thinks of them."""
    assistant.generation_config.num_assistant_tokens = tokens
    assistant.generation_config.num_assistant_tokens_schedule = "constant"
    assistant.generation_config.assistant_confidence_threshold = 0.0
    return assistant


def assistant_of(model_type: str, **overrides: Any) -> Any:
    """Another model that often writes what `accelerated` does: one of equal weights that leaves off more experts."""
    return propose_(set_threshold_(accelerated(model_type, **overrides), 0.7), 4)


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[int]]:
    """How many tokens passes read that check drafts, by steps and by modules; lookup is left to transformers here."""
    monkeypatch.setattr(stepping, "lookup_of", lambda *given: None)
    found: dict[str, list[int]] = {"steps": [], "modules": []}
    read, call = CheckedModel._read, CheckedModel.__call__

    def counted_read(self: CheckedModel, inputs: Any, starts: Tensor) -> Any:
        found["steps"].append(inputs["input_ids"].shape[1])
        return read(self, inputs, starts)

    def counted_call(self: CheckedModel, **inputs: Any) -> Any:
        before = len(found["steps"])
        outputs = call(self, **inputs)
        if len(found["steps"]) == before:
            found["modules"].append(inputs["input_ids"].shape[1])
        return outputs

    monkeypatch.setattr(CheckedModel, "_read", counted_read)
    monkeypatch.setattr(CheckedModel, "__call__", counted_call)
    return found


@pytest.mark.parametrize("model_type", STEP_TYPES)
def test_answers_are_those_of_plain_decoding(
    model_type: str, prompt: Tensor, passes: dict[str, list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Caches must grow now and then.
    monkeypatch.setattr(checking, "ROOM", 16)
    monkeypatch.setattr(CheckedModel, "calls", 4)
    model = accelerated(model_type)
    plain = generate_greedily(model, prompt, TOKENS)
    assert same(model, prompt, plain, generate_greedily(step_model(model_type), prompt, TOKENS))
    other = step_model(model_type)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(5)))
    settings: list[dict[str, Any]] = [
        {"prompt_lookup_num_tokens": 5},
        {"prompt_lookup_num_tokens": 10},
        {"prompt_lookup_num_tokens": 31, "max_matching_ngram_size": 1},
        {"assistant_model": propose_(lte.accelerate_(other), 4)},
        {"assistant_model": assistant_of(model_type)},
    ]
    for each in settings:
        clock = PassClock()
        assert same(model, prompt, plain, generate_greedily(model, prompt, TOKENS, streamer=clock, **each))
        assert clock.tokens == TOKENS
        assert clock.passes <= TOKENS
        # By modules goes the prompt alone, with what is proposed after it; more than eight tokens are several calls.
        assert len(passes["modules"]) == 1
        assert passes["modules"][0] >= 32
        proposed = each.get("prompt_lookup_num_tokens", 4)
        assert max(passes["steps"]) in range(2, proposed + 2)
        assert proposed < 10 or max(passes["steps"]) > 8
        assert len(passes["steps"]) + len(passes["modules"]) == clock.passes
        for lengths in passes.values():
            lengths.clear()


@pytest.mark.parametrize(("dtype", "longest"), [(torch.float32, 8), (torch.bfloat16, 32)])
def test_on_a_cpu_passes_of_several_calls_are_for_narrow_weights(
    dtype: torch.dtype, longest: int, prompt: Tensor, passes: dict[str, list[int]]
) -> None:
    model = lte.accelerate_(step_model("llama").to(dtype))
    for proposed in (7, 15, 31, 40):
        generate_greedily(model, prompt, TOKENS, prompt_lookup_num_tokens=proposed, max_matching_ngram_size=1)
    assert max(passes["steps"]) in range(longest // 2, longest + 1)
    assert [length for length in passes["modules"] if longest < length < 32] or longest == 32
    assert min(passes["modules"]) > longest


def by_modules(model: Any, *args: Any, **settings: Any) -> Any:
    """An answer without whole steps."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stepping, "_is_plain", lambda *given: False)
        return model.generate(*args, **settings)


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text"])
def test_padding_scores_and_caches(model_type: str, prompt: Tensor, passes: dict[str, list[int]]) -> None:
    model = accelerated(model_type)
    mask = torch.ones_like(prompt)
    mask[:, :3] = 0
    settings: dict[str, Any] = {
        **{"attention_mask": mask, "max_new_tokens": TOKENS, "do_sample": False, "prompt_lookup_num_tokens": 4},
        **{"return_dict_in_generate": True, "output_scores": True, "output_logits": True, "repetition_penalty": 1.3},
        **{"pad_token_id": PAD, "eos_token_id": None},
    }
    ours, theirs = model.generate(prompt, **settings), by_modules(model, prompt, **settings)
    assert len(passes["steps"]) > 2
    assert torch.equal(ours.sequences, theirs.sequences)
    for name in ("scores", "logits"):
        torch.testing.assert_close(torch.stack(ours[name]), torch.stack(theirs[name]), rtol=1e-4, atol=1e-4)
    for one, other in zip(ours.past_key_values.layers, theirs.past_key_values.layers, strict=True):
        assert one.get_seq_length() == other.get_seq_length()
        torch.testing.assert_close(one.keys, other.keys, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(one.values, other.values, rtol=1e-4, atol=1e-4)


def test_an_engine_that_takes_fewer_tokens(
    prompt: Tensor, passes: dict[str, list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = accelerated()
    plain = generate_greedily(model, prompt, TOKENS)
    unfit = engines.unfit
    monkeypatch.setattr(engines, "unfit", lambda plan, caches: "so" if len(caches[0].keys) > 3 else unfit(plan, caches))
    calls = list[int]()
    step = CheckedModel._step

    def counted(self: CheckedModel, ids: Tensor, *given: Tensor) -> Tensor:
        calls.append(len(ids))
        return step(self, ids, *given)

    monkeypatch.setattr(CheckedModel, "_step", counted)
    monkeypatch.setattr(CheckedModel, "calls", 4)
    assert torch.equal(generate_greedily(model, prompt, TOKENS, prompt_lookup_num_tokens=5), plain)
    assert (max(passes["steps"]), max(calls)) == (6, 3)
    assert sum(calls) == sum(passes["steps"])
    monkeypatch.setattr(CheckedModel, "calls", 1)
    assert torch.equal(generate_greedily(model, prompt, TOKENS, prompt_lookup_num_tokens=5), plain)
    assert 6 in passes["modules"]


def test_what_no_engine_computes_goes_by_modules(prompt: Tensor, passes: dict[str, list[int]]) -> None:
    model = accelerated()
    plain = generate_greedily(model, prompt, TOKENS)
    hook = model.model.norm.register_forward_hook(lambda *given: None)
    with pytest.warns(RuntimeWarning, match="as model.norm has hooks"):
        assert torch.equal(generate_greedily(model, prompt, TOKENS, prompt_lookup_num_tokens=5), plain)
    assert passes == {"steps": [], "modules": []}
    hook.remove()
    assert torch.equal(generate_greedily(model, prompt, TOKENS, prompt_lookup_num_tokens=5), plain)
    assert passes["steps"]
    assert has_engine(model)


def test_what_an_assistant_computes_is_settled_once_for_an_answer(
    prompt: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Making the plan anew took most of the time of a draft; another answer, and a call of its own, look again."""
    model, planned = accelerated(), list[Any]()
    assistant, make = assistant_of("llama"), stepping.decoder_plan

    def counted(of: Any) -> Any:
        planned.append(of)
        return make(of)

    monkeypatch.setattr(stepping, "decoder_plan", counted)
    plain = generate_greedily(model, prompt, TOKENS)
    for _ in range(2):
        planned.clear()
        assert torch.equal(generate_greedily(model, prompt, TOKENS, assistant_model=assistant), plain)
        assert [each is assistant for each in planned].count(True) == 1
    # Also where the model itself goes by modules.
    planned.clear()
    model.prepare_inputs_for_generation = model.prepare_inputs_for_generation
    assert torch.equal(generate_greedily(model, prompt, TOKENS, assistant_model=assistant), plain)
    del model.prepare_inputs_for_generation
    assert planned == [assistant]
    planned.clear()
    generate_greedily(assistant, prompt, 4)
    assert planned == [assistant]


@pytest.mark.parametrize("make", [accelerated, step_model], ids=["kernels", "plain"])
def test_an_assistant_that_is_a_copy_is_always_right(make: Any, prompt: Tensor) -> None:
    model, copied = (make("qwen2", use_sliding_window=False) for _ in range(2))
    assistant, clock = propose_(copied, 4), PassClock()
    found = generate_greedily(model, prompt, TOKENS, assistant_model=assistant, streamer=clock, **NEVER)
    assert torch.equal(found, generate_greedily(model, prompt, TOKENS, **NEVER))
    assert (clock.passes, clock.tokens) == (TOKENS // 5, TOKENS)
    # Where an engine computes the assistant, drafts are written by whole decoding steps, too.
    assert has_engine(assistant) == (make is accelerated)


def test_assistants_read_what_was_kept_by_steps_too(prompt: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    model = accelerated("qwen2", use_sliding_window=False)
    assistant, read = assistant_of("qwen2", use_sliding_window=False), list[int]()
    prefill = type(assistant)._prefill

    def counted(self: Any, input_ids: Tensor, config: Any, kwargs: Any, **settings: Any) -> Any:
        if self is assistant:
            read.append(input_ids.shape[1] - kwargs["past_key_values"].get_seq_length())
        return prefill(self, input_ids, config, kwargs, **settings)

    monkeypatch.setattr(type(assistant), "_prefill", functools.wraps(prefill)(counted))
    plain = generate_greedily(model, prompt, TOKENS, **NEVER)
    assert torch.equal(generate_greedily(model, prompt, TOKENS, assistant_model=assistant, **NEVER), plain)
    # The prompt; and before the last token, of which there is no step to be had.
    assert read in ([32], [32, 1], [32, 2])
    # A cache that is one token behind, and one that is three.
    for missing, by_modules in ((1, []), (3, [3])):
        kept = DynamicCache(config=assistant.config)
        with torch.no_grad():
            assistant.model(input_ids=plain[:, : 40 - missing], past_key_values=kept, use_cache=True)
        read.clear()
        found = generate_greedily(assistant, plain[:, :40], 6, past_key_values=kept)
        assert read == by_modules
        assert torch.equal(found, generate_greedily(assistant, plain[:, :40], 6))
        assert kept.get_seq_length() == 45


def test_int8_weights_and_calls_by_turns(prompt: Tensor) -> None:
    model = lte.accelerate_(step_model(), weights="int8")
    assistant = assistant_of("llama")
    plain = generate_greedily(model, prompt, TOKENS)
    for _ in range(2):
        assert same(model, prompt, plain, generate_greedily(model, prompt, TOKENS, assistant_model=assistant))
        assert torch.equal(plain, generate_greedily(model, prompt, TOKENS))


def test_the_closest_call_by_hand(prompt: Tensor) -> None:
    model = step_model()
    seen: list[Tensor] = []
    hooks = [
        ffn.router.register_forward_hook(lambda module, args, out: seen.append(out.sigmoid()))
        for ffn in lte.sparse_ffns(model).values()
    ]
    with torch.no_grad():
        ordered = model(prompt).logits[0, -1].sort(descending=True).values
    for hook in hooks:
        hook.remove()
    found = closest_call(model, prompt[0])
    assert found["logit_gap"] == pytest.approx((ordered[0] - ordered[1]).item(), rel=1e-4)
    assert found["score_distance"] == pytest.approx((torch.cat(seen) - 0.5).abs().min().item(), abs=1e-6)
