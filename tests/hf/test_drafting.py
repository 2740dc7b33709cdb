"""Speculative decoding through `generate`: prompt lookup, assistants, and a model that drafts for itself."""

from __future__ import annotations

import copy
import functools
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache

import lte
from lte.eval.answers import first_difference, generate_greedily
from lte.eval.speculation import PassClock, closest_call
from lte.hf import checking, stepping
from lte.hf.checking import CheckedModel
from lte.hf.stepping import has_engine
from lte.nn.accelerated import AcceleratedFfn
from lte.ops.step import engines
from tests.hf.accelerated_models import weight_bytes
from tests.hf.step_models import STEP_TYPES, accelerated, step_model
from tests.tiny_models import PAD, VOCAB, tiny_dense_model, tiny_sparse_model

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
        {"assistant_model": propose_(lte.draft_of(model, 0.7), 4)},
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
    draft, make = propose_(lte.draft_of(model, 0.7), 4), stepping.decoder_plan

    def counted(of: Any) -> Any:
        planned.append(of)
        return make(of)

    monkeypatch.setattr(stepping, "decoder_plan", counted)
    plain = generate_greedily(model, prompt, TOKENS)
    for _ in range(2):
        planned.clear()
        assert torch.equal(generate_greedily(model, prompt, TOKENS, assistant_model=draft), plain)
        assert [each is draft for each in planned].count(True) == 1
    # Also where the model itself goes by modules.
    planned.clear()
    model.prepare_inputs_for_generation = model.prepare_inputs_for_generation
    assert torch.equal(generate_greedily(model, prompt, TOKENS, assistant_model=draft), plain)
    del model.prepare_inputs_for_generation
    assert planned == [draft]
    planned.clear()
    generate_greedily(draft, prompt, 4)
    assert planned == [draft]


@pytest.mark.parametrize("make", [accelerated, step_model], ids=["kernels", "plain"])
def test_a_draft_at_the_same_threshold_is_always_right(make: Any, prompt: Tensor) -> None:
    model = make("qwen2", use_sliding_window=False)
    draft, clock = propose_(lte.draft_of(model, 0.5), 4), PassClock()
    found = generate_greedily(model, prompt, TOKENS, assistant_model=draft, streamer=clock, **NEVER)
    assert torch.equal(found, generate_greedily(model, prompt, TOKENS, **NEVER))
    assert (clock.passes, clock.tokens) == (TOKENS // 5, TOKENS)
    # Where an engine computes the model, drafts are written by whole decoding steps, too.
    assert has_engine(draft) == (make is accelerated)


def test_drafts_read_what_was_kept_by_steps_too(prompt: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    model = accelerated("qwen2", use_sliding_window=False)
    draft, read = propose_(lte.draft_of(model, 0.7), 4), list[int]()
    prefill = type(draft)._prefill

    def counted(self: Any, input_ids: Tensor, config: Any, kwargs: Any, **settings: Any) -> Any:
        if self is draft:
            read.append(input_ids.shape[1] - kwargs["past_key_values"].get_seq_length())
        return prefill(self, input_ids, config, kwargs, **settings)

    monkeypatch.setattr(type(draft), "_prefill", functools.wraps(prefill)(counted))
    plain = generate_greedily(model, prompt, TOKENS, **NEVER)
    assert torch.equal(generate_greedily(model, prompt, TOKENS, assistant_model=draft, **NEVER), plain)
    # The prompt; and before the last token, of which there is no step to be had.
    assert read in ([32], [32, 1], [32, 2])
    # A cache that is one token behind, and one that is three.
    for missing, by_modules in ((1, []), (3, [3])):
        kept = DynamicCache(config=draft.config)
        with torch.no_grad():
            draft.model(input_ids=plain[:, : 40 - missing], past_key_values=kept, use_cache=True)
        read.clear()
        found = generate_greedily(draft, plain[:, :40], 6, past_key_values=kept)
        assert read == by_modules
        assert torch.equal(found, generate_greedily(draft, plain[:, :40], 6))
        assert kept.get_seq_length() == 45


def test_a_draft_has_the_weights_of_its_model_and_a_threshold_of_its_own(prompt: Tensor) -> None:
    model = accelerated()
    before, logits = weight_bytes(model), model(prompt).logits
    draft = lte.draft_of(model, 0.8)
    assert [id(p) for p in draft.parameters()] == [id(p) for p in model.parameters()]
    both = {t.untyped_storage().data_ptr() for m in (model, draft) for t in (*m.parameters(), *m.buffers())}
    assert len(both) == len({t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())})
    for ours, theirs in zip(lte.sparse_ffns(draft).values(), lte.sparse_ffns(model).values(), strict=True):
        assert isinstance(ours, AcceleratedFfn)
        assert isinstance(theirs, AcceleratedFfn)
        assert ours.stacked is theirs.stacked
        assert ours.threshold_logit > theirs.threshold_logit == 0
    alone = step_model()
    for ffn in lte.sparse_ffns(alone).values():
        ffn.set_threshold(0.8)
    with torch.no_grad():
        torch.testing.assert_close(draft(prompt).logits, alone(prompt).logits, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(model(prompt).logits, logits)
    assert weight_bytes(model) == before
    assert draft.generation_config is not model.generation_config


def test_a_draft_follows_its_model(prompt: Tensor) -> None:
    model = accelerated()
    draft = lte.draft_of(model, 0.5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
        torch.testing.assert_close(draft(prompt).logits, model(prompt).logits)
    for move in (lambda: model.to(torch.bfloat16), lambda: draft.to(torch.float32), lambda: model.half().float()):
        move()
        with torch.no_grad():
            assert torch.equal(draft(prompt).logits, model(prompt).logits)
        for ours, theirs in zip(lte.sparse_ffns(draft).values(), lte.sparse_ffns(model).values(), strict=True):
            assert ours.stacked is theirs.stacked  # type: ignore[attr-defined]
    assert torch.equal(generate_greedily(model, prompt, 9, assistant_model=draft), generate_greedily(model, prompt, 9))


def test_int8_weights_and_calls_by_turns(prompt: Tensor) -> None:
    model = step_model()
    draft = propose_(lte.draft_of(model, 0.7), 3)
    with pytest.raises(ValueError, match=r"must not be a draft, got one of lte.draft_of, .* the draft goes along"):
        lte.accelerate_(draft, weights="int8")
    # Also on other kernels than it was.
    for weights in ("native", "int8"):
        lte.accelerate_(lte.decelerate_(model), weights=weights)
        with torch.no_grad():
            assert torch.equal(draft(prompt).logits, lte.draft_of(model, 0.7)(prompt).logits)
            assert not torch.equal(draft(prompt).logits, model(prompt).logits)
        assert all(isinstance(ffn, AcceleratedFfn) for ffn in lte.sparse_ffns(draft).values())
    plain = generate_greedily(model, prompt, TOKENS)
    for _ in range(2):
        assert same(model, prompt, plain, generate_greedily(model, prompt, TOKENS, assistant_model=draft))
        assert torch.equal(plain, generate_greedily(model, prompt, TOKENS))


def test_a_draft_from_the_curve_of_the_model(prompt: Tensor) -> None:
    model = step_model()
    lte.calibrate_curve_(model, {"text": [{"input_ids": prompt, "labels": prompt}]}, sparsities=(0.3, 0.5, 0.7))
    remembered = copy.deepcopy(model.config.lte_curve)
    draft = lte.draft_of(model, target_sparsity=0.6)
    (ours, *_), (theirs, *_) = lte.sparse_ffns(draft).values(), lte.sparse_ffns(model).values()
    assert ours.threshold_logit > theirs.threshold_logit
    assert lte.measure_sparsity(draft, [{"input_ids": prompt}]).sparsity == pytest.approx(0.6, abs=0.06)
    assert model.config.lte_curve == remembered
    assert draft.config.lte_curve != remembered


@pytest.mark.parametrize("make", [accelerated, step_model], ids=["kernels", "plain"])
def test_a_saved_draft_skips_as_the_draft_does(make: Any, prompt: Tensor, tmp_path: Path) -> None:
    model = make()
    model.config.lte_measurement = {"sparsity": 0.1, "active_fraction": [0.9, 0.9]}
    draft = lte.draft_of(model, 0.7)
    draft.save_pretrained(tmp_path / "draft")
    model.save_pretrained(tmp_path / "model")
    for each, name, threshold in ((draft, "draft", 0.7), (model, "model", 0.5)):
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / name)
        assert loaded.lte_config.threshold == threshold
        assert (loaded.config.lte_measurement is None) == (name == "draft")
        with torch.no_grad():
            torch.testing.assert_close(loaded(prompt).logits, each(prompt).logits, rtol=1e-4, atol=1e-4)


def test_train_and_eval_are_those_of_all() -> None:
    model = step_model()
    draft = lte.draft_of(model, 0.7)
    others = [lte.draft_of(model, 0.8), lte.draft_of(draft, 0.9)]
    everyone = [model, draft, *others]
    for one, other in zip(everyone, everyone[1:] + everyone[:1], strict=True):
        with warnings.catch_warnings():
            # Of training in hard mode.
            warnings.simplefilter("ignore")
            one.train()
        assert all(module.training for each in everyone for module in each.modules())
        other.eval()
        assert not any(module.training for each in everyone for module in each.modules())


def test_what_cannot_draft_for_itself(prompt: Tensor) -> None:
    with pytest.raises(ValueError, match="threshold or target_sparsity must be given, one of them"):
        lte.draft_of(step_model())
    with pytest.raises(ValueError, match=r"threshold must lie in \(0, 1\), got threshold=1.5"):
        lte.draft_of(step_model(), 1.5)
    with pytest.raises(ValueError, match="LTE model"):
        lte.draft_of(tiny_dense_model(), 0.7)
    with pytest.raises(ValueError, match="model must have FFNs in modules of their own to draft for itself"):
        lte.draft_of(tiny_sparse_model("opt"), 0.7)
    hooked = step_model()
    hooked.model._hf_hook = object()
    with pytest.raises(ValueError, match="model must lie on one device without accelerate's hooks"):
        lte.draft_of(hooked, 0.7)
    model = accelerated()
    draft = lte.draft_of(model, 0.7)
    with pytest.raises(ValueError, match="a draft must be left accelerated as its model is"):
        lte.decelerate_(draft)
    lte.decelerate_(model)
    with pytest.raises(ValueError, match="the model of a draft must stay accelerated"), torch.no_grad():
        draft(prompt)


def test_a_copy_of_a_draft_and_the_model_without_it(prompt: Tensor) -> None:
    model = accelerated()
    plain = generate_greedily(model, prompt, 9)
    draft = copy.deepcopy(lte.draft_of(model, 0.7))
    assert torch.equal(generate_greedily(model, prompt, 9, assistant_model=draft), plain)
    alone = lte.accelerate_(copy.deepcopy(lte.draft_of(step_model(), 0.7)))
    assert torch.equal(generate_greedily(model, prompt, 9, assistant_model=alone), plain)


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
