"""Prompt lookup whose proposals and accepted tokens stay on the device."""

from __future__ import annotations

import ctypes
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.version import Version
from torch import Tensor
from transformers import DynamicCache
from transformers.generation.candidate_generator import PromptLookupCandidateGenerator
from transformers.generation.stopping_criteria import (
    EosTokenCriteria,
    MaxLengthCriteria,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.generation.streamers import BaseStreamer

import lte
from lte.eval.answers import first_difference, generate_greedily, greedy_answers
from lte.eval.speculation import closest_call
from lte.hf import checking, lookup, stepping
from lte.hf.checking import CheckedModel
from lte.hf.lookup import Lookup
from lte.hf.threshold import set_threshold_
from lte.ops.step import engines
from lte.ops.step.cuda import CudaEngine, Launch
from lte.ops.step.reference import ReferenceEngine
from tests.hf.step_models import STEP_TYPES, accelerated, step_model, take_reference_engines
from tests.hf.test_stepping import DEVICES, leave_ffns_to_pytorch
from tests.ops.step_emulator import Emulator
from tests.ops.test_lookup_kernels import Trusting
from tests.tiny_models import PAD, VOCAB

TOKENS = 40
# Of stock models, too: the assistant's cache grows beyond its window.
DRAFTS_FAIL_IN_WINDOWS = Version(version("transformers")) < Version("5.18")


class Pieces(BaseStreamer):
    """What a streamer was given, by length."""

    def __init__(self) -> None:
        self.tokens, self.lengths, self.ended = list[int](), list[int](), False

    def put(self, value: Tensor) -> None:
        assert value.device.type == "cpu"
        self.tokens += value.flatten().tolist()
        self.lengths.append(value.numel())

    def end(self) -> None:
        self.ended = True


@pytest.fixture(scope="module")
def prompt() -> Tensor:
    ids = torch.randint(3, VOCAB, (1, 20), generator=torch.Generator().manual_seed(0))
    return torch.cat([ids, ids[:, :12]], 1)


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The next pass begins before the host has heard of the last one, and a pass is up to four calls of the engine."""
    take_reference_engines(monkeypatch)
    monkeypatch.setattr(lookup, "runs_ahead", lambda device: True)
    monkeypatch.setattr(CheckedModel, "calls", 4)


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tokens each pass of lookups on the device reads."""
    found, read = list[int](), CheckedModel.logits_of

    def noted(self: CheckedModel, ids: Tensor, *given: Tensor) -> Tensor:
        if any(self is each for each in looking):
            found.append(len(ids))
        return read(self, ids, *given)

    looking, run = list[CheckedModel](), Lookup.run

    def noted_run(self: Lookup, *given: Any) -> Any:
        looking.append(self.checked)
        return run(self, *given)

    monkeypatch.setattr(CheckedModel, "logits_of", noted)
    monkeypatch.setattr(Lookup, "run", noted_run)
    return found


def by_stock(model: Any, *args: Any, **settings: Any) -> Any:
    """An answer by the loop of transformers."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stepping, "lookup_of", lambda *given: None)
        return model.generate(*args, **settings)


@pytest.mark.parametrize("model_type", STEP_TYPES)
@pytest.mark.parametrize("proposed", [1, 3, 10, 31])
def test_answers_are_those_of_plain_decoding(
    model_type: str, proposed: int, prompt: Tensor, runs: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    # The memory must grow now and then.
    monkeypatch.setattr(checking, "ROOM", 16)
    model, streamer = accelerated(model_type), Pieces()
    plain = generate_greedily(model, prompt, TOKENS)
    settings = {"prompt_lookup_num_tokens": proposed, "max_matching_ngram_size": 9 if proposed == 31 else None}
    found = generate_greedily(model, prompt, TOKENS, streamer=streamer, **settings)
    assert torch.equal(found, plain)
    assert streamer.tokens == plain[0].tolist()
    assert streamer.ended
    # The prompt, its first token, and what each pass brings.
    assert streamer.lengths[:2] == [prompt.shape[1], 1]
    # What one call of the engine reads.
    assert set(runs) == {min(proposed + 1, 8)}
    # One more pass may have begun than there was to read.
    assert len(runs) - (len(streamer.lengths) - 2) in (0, 1)
    assert max(streamer.lengths[2:]) <= proposed + 1


def test_a_text_that_repeats_itself_takes_few_passes(runs: list[int], prompt: Tensor) -> None:
    """A greedy answer of a model with so few tokens goes in circles, which lookup foresees."""
    model = accelerated("llama")
    plain = generate_greedily(model, prompt, 90)
    period = next(n for n in range(1, 40) if torch.equal(plain[0, -n:], plain[0, -2 * n : -n]))
    assert period < 20
    assert torch.equal(generate_greedily(model, prompt, 90, prompt_lookup_num_tokens=7), plain)
    assert len(runs) < 60
    stock, call = list[int](), CheckedModel.__call__

    def counted(self: CheckedModel, **inputs: Any) -> Any:
        stock.append(inputs["input_ids"].shape[1])
        return call(self, **inputs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CheckedModel, "__call__", counted)
        patch.setattr(stepping, "lookup_of", lambda *given: None)
        assert torch.equal(generate_greedily(model, prompt, 90, prompt_lookup_num_tokens=7), plain)
    # Transformers proposes after each match of two tokens, and ours may have begun one pass too many.
    assert len(runs) <= len(stock) + 1


@pytest.mark.parametrize("gram", [None, 12])
@pytest.mark.parametrize("seed", range(3))
def test_proposals_of_long_matches_are_those_of_transformers(
    seed: int, gram: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of short ones, and whether any are made, are those of plain Python; others are no tokens for the engine."""
    model, proposed, grams = accelerated("llama"), 5, gram or 8
    # Of few tokens, so that matches are of different lengths.
    text = torch.randint(3, 3 + 2 * (seed + 1), (1, 20), generator=torch.Generator().manual_seed(seed))
    read, found = CheckedModel.logits_of, list[list[int]]()

    def noted(self: CheckedModel, ids: Tensor, positions: Tensor, starts: Tensor) -> Tensor:
        found.append(ids[starts <= positions].tolist())
        return read(self, ids, positions, starts)

    monkeypatch.setattr(CheckedModel, "logits_of", noted)
    kept = Pieces()
    settings: dict[str, Any] = {"prompt_lookup_num_tokens": proposed, "max_matching_ngram_size": gram}
    answer = generate_greedily(model, text, TOKENS, streamer=kept, **settings)
    length, expected, plain = text.shape[1], list[list[int]](), Trusting()

    def candidates(most: int) -> list[int]:
        generator = PromptLookupCandidateGenerator(
            num_output_tokens=proposed, max_matching_ngram_size=most, max_length=10**6, eos_token_id=None
        )
        return generator.get_candidates(answer[:, :length])[0][0, length:].tolist()

    for brought in kept.lengths[1:-1]:
        length += brought
        last = answer[0, :length].tolist()
        following = plain.proposal_of(last, proposed, grams)
        if plain.last[0] == 4 and following:
            assert following == candidates(grams)
        expected.append([last[-1], *following])
        plain.note(int(answer[0, length]))
    # One more pass may have begun than there was to read.
    assert found[: len(expected)] == expected
    assert len({len(each) for each in expected}) >= 3


def test_engines_hear_that_tokens_of_a_pass_may_be_none(prompt: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """For which they may take a smaller kernel; passes that transformers asks for have all their tokens."""
    bound, bind = list[tuple[int, bool]](), ReferenceEngine.bind

    def noted(self: ReferenceEngine, caches: Any, tokens: int = 1, *, fewer: bool = False) -> Any:
        bound.append((tokens, fewer))
        return bind(self, caches, tokens, fewer=fewer)

    monkeypatch.setattr(ReferenceEngine, "bind", noted)
    model, settings = accelerated("llama"), {"prompt_lookup_num_tokens": 5, "max_new_tokens": 12, "do_sample": False}
    model.generate(prompt, **settings)
    assert {*bound} == {(6, True)}
    bound.clear()
    by_stock(model, prompt, **settings)
    assert {fewer for _, fewer in bound} == {False}


@pytest.mark.parametrize("place", [0, 1, 5, 17])
def test_an_answer_ends_with_an_end_token(place: int, prompt: Tensor, runs: list[int]) -> None:
    model, streamer = accelerated("qwen2"), Pieces()
    plain = generate_greedily(model, prompt, TOKENS)[0, prompt.shape[1] :]
    end = plain[place].item()
    first = plain.tolist().index(end)
    settings: dict[str, Any] = {
        **{"attention_mask": torch.ones_like(prompt), "max_new_tokens": TOKENS, "do_sample": False},
        **{"eos_token_id": [end, VOCAB + 5], "pad_token_id": PAD, "prompt_lookup_num_tokens": 6},
    }
    found = model.generate(prompt, streamer=streamer, **settings)
    assert found[0, prompt.shape[1] :].tolist() == plain[: first + 1].tolist()
    assert streamer.tokens == found[0].tolist()
    assert bool(runs) == (first > 0)


@pytest.mark.parametrize("more", [1, 2, 3, 8, 23])
def test_an_answer_has_as_many_tokens_as_were_asked_for(more: int, prompt: Tensor) -> None:
    model = accelerated("mistral")
    found = generate_greedily(model, prompt, more, prompt_lookup_num_tokens=5)
    assert torch.equal(found, generate_greedily(model, prompt, more))
    assert found.shape[1] == prompt.shape[1] + more


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "gemma3_text"])
def test_padding_and_the_cache_that_is_left(model_type: str, prompt: Tensor, runs: list[int]) -> None:
    model = accelerated(model_type)
    mask = torch.ones_like(prompt)
    mask[:, :3] = 0
    settings: dict[str, Any] = {
        **{"attention_mask": mask, "max_new_tokens": TOKENS, "do_sample": False, "prompt_lookup_num_tokens": 4},
        **{"return_dict_in_generate": True, "pad_token_id": PAD, "eos_token_id": VOCAB + 7},
    }
    ours = model.generate(prompt, **settings)
    assert runs
    theirs = by_stock(model, prompt, **settings)
    assert torch.equal(ours.sequences, theirs.sequences)
    for one, other in zip(ours.past_key_values.layers, theirs.past_key_values.layers, strict=True):
        assert one.get_seq_length() == other.get_seq_length() == ours.sequences.shape[1] - 1
        # What padding left behind is nobody's.
        length = min(one.keys.shape[2], other.keys.shape[2], ours.sequences.shape[1] - 1 - 3)
        for name in ("keys", "values"):
            pair = (getattr(layer, name)[:, :, -length:] for layer in (one, other))
            torch.testing.assert_close(*pair, rtol=1e-4, atol=1e-4)
    # Text goes on from it.
    more = {**settings, "attention_mask": None, "past_key_values": ours.past_key_values, "max_new_tokens": 5}
    mask = torch.cat([mask, torch.ones(1, TOKENS, dtype=mask.dtype)], 1)
    del more["prompt_lookup_num_tokens"]
    again = model.generate(ours.sequences, **{**more, "attention_mask": mask}).sequences
    whole = {**settings, "max_new_tokens": TOKENS + 5}
    assert torch.equal(again, model.generate(prompt, **whole).sequences)


class Never(StoppingCriteria):
    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
        return torch.zeros(len(input_ids), dtype=torch.bool)


def settings_of_others() -> Iterator[Any]:
    yield pytest.param({"repetition_penalty": 1.3}, id="processors")
    yield pytest.param({"do_sample": True, "top_k": 1}, id="sampling")
    yield pytest.param({"stopping_criteria": [Never()]}, id="criteria")
    yield pytest.param({"return_dict_in_generate": True, "output_scores": True}, id="scores")


@pytest.mark.parametrize("others", settings_of_others())
def test_what_is_not_greedy_goes_by_the_loop_of_transformers(
    others: dict[str, Any], prompt: Tensor, runs: list[int]
) -> None:
    model = accelerated("llama")
    settings: dict[str, Any] = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": 8, "do_sample": False}
    settings |= {"prompt_lookup_num_tokens": 5, "pad_token_id": PAD, "eos_token_id": VOCAB + 7, **others}
    model.generate(prompt, **settings)
    assert runs == []


def test_a_cache_that_holds_something_is_left_to_transformers(prompt: Tensor, runs: list[int]) -> None:
    model, cache = accelerated("llama"), DynamicCache()
    with torch.no_grad():
        model.model(input_ids=prompt[:, :5], past_key_values=cache, use_cache=True)
    # Whose answer is another one then, with stock models, too.
    generate_greedily(model, prompt, 8, prompt_lookup_num_tokens=5, past_key_values=cache)
    assert runs == []
    plain = generate_greedily(model, prompt, 8)
    new = DynamicCache()
    assert torch.equal(generate_greedily(model, prompt, 8, prompt_lookup_num_tokens=5, past_key_values=new), plain)
    assert runs
    assert new.get_seq_length() == prompt.shape[1] + 7


def test_a_streamer_that_fails_leaves_a_cache_that_is_right(prompt: Tensor) -> None:
    class Fails(Pieces):
        def put(self, value: Tensor) -> None:
            super().put(value)
            if len(self.tokens) > 40:
                raise RuntimeError("no more")

    model, cache, streamer = accelerated("llama"), DynamicCache(), Fails()
    with pytest.raises(RuntimeError, match="no more"):
        generate_greedily(model, prompt, TOKENS, prompt_lookup_num_tokens=3, past_key_values=cache, streamer=streamer)
    assert cache.get_seq_length() == len(streamer.tokens) - 1
    text = torch.tensor([streamer.tokens])
    assert torch.equal(generate_greedily(model, text, 9, past_key_values=cache), generate_greedily(model, text, 9))


def test_a_device_that_waits_for_the_host_anyway_reads_what_was_found_alone(
    prompt: Tensor, runs: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lookup, "runs_ahead", lambda device: False)
    model = accelerated("llama")
    plain = generate_greedily(model, prompt, 8)
    assert torch.equal(generate_greedily(model, prompt, 8, prompt_lookup_num_tokens=5), plain)
    assert runs == []


def test_memory_is_held_once_and_for_the_tokens_that_may_come(prompt: Tensor) -> None:
    model, cache, shared = accelerated("llama"), DynamicCache(), list[bool]()
    runs_of = list[Lookup]()

    class Looks(Pieces):
        def put(self, value: Tensor) -> None:
            if runs_of:
                taken = runs_of[0].checked.layers
                shared.extend(
                    layer.keys.untyped_storage().data_ptr() == one.keys.untyped_storage().data_ptr()
                    for layer, one in zip(cache.layers, taken, strict=False)
                )

    with pytest.MonkeyPatch.context() as patch:
        run = Lookup.run
        patch.setattr(Lookup, "run", lambda self, *given: [runs_of.append(self), run(self, *given)][1])
        generate_greedily(model, prompt, 30, prompt_lookup_num_tokens=3, past_key_values=cache, streamer=Looks())
    assert shared
    assert all(shared)
    # What passes read in vain and ahead is all that there is room for beyond the text.
    assert cache.layers[0].keys.untyped_storage().nbytes() <= cache.layers[0].keys[:, :, :1].nbytes * (62 + 2 * 4)


@pytest.mark.parametrize(
    "others",
    [
        pytest.param({"max_new_tokens": 2 * 10**10}, id="endless"),
        pytest.param({"stopping_criteria": StoppingCriteriaList([MaxLengthCriteria(40)])}, id="two lengths"),
        pytest.param(
            {"stopping_criteria": StoppingCriteriaList([EosTokenCriteria(torch.tensor(VOCAB + 9))])}, id="0-d"
        ),
        pytest.param({"eos_token_id": [7, *range(VOCAB, VOCAB + 40)]}, id="many ends"),
        pytest.param({"int32": True}, id="int32"),
    ],
)
def test_uncommon_calls(others: dict[str, Any], prompt: Tensor) -> None:
    model, streamer = accelerated("qwen2"), Pieces()
    others, ids = dict(others), prompt.int() if others.get("int32") else prompt
    others.pop("int32", None)
    end = generate_greedily(model, prompt, TOKENS)[0, -1].item()
    settings: dict[str, Any] = {"attention_mask": torch.ones_like(ids), "max_new_tokens": TOKENS, "do_sample": False}
    settings |= {"pad_token_id": PAD, "eos_token_id": end, **others}
    plain = model.generate(ids, **settings)
    found = model.generate(ids, prompt_lookup_num_tokens=4, streamer=streamer, **settings)
    assert found.tolist() == plain.tolist()
    assert streamer.tokens == plain[0].tolist()


def test_another_default_device(prompt: Tensor, runs: list[int]) -> None:
    model, streamer = accelerated("llama"), Pieces()
    settings: dict[str, Any] = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": 9, "do_sample": False}
    expected = model.generate(prompt, **settings)
    with torch.device("meta"):
        found = model.generate(prompt, prompt_lookup_num_tokens=4, streamer=streamer, **settings)
    assert torch.equal(found, expected)
    assert runs


@dataclass(frozen=True, kw_only=True)
class Noting(Emulator):
    """Notes the size of each kernel that computes; one that ends at once counts no barriers."""

    sizes: list[int] = field(default_factory=list)

    def load(self, macros: Mapping[str, int]) -> Launch:
        run = super().load(macros)

        def launch(args: ctypes.Structure) -> None:
            barriers = ctypes.c_int.from_address(args.counters)
            before = barriers.value
            run(args)
            if barriers.value != before:
                self.sizes.append(macros["T"])

        return launch


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    return tmp_path_factory.mktemp("kernels")


# Of the kernels for a pass, by the tokens that are proposed.
SIZES = {1: (1, 2), 2: (1, 3), 4: (1, 2, 5), 7: (1, 2, 4, 8)}


@pytest.mark.parametrize("proposed", SIZES)
@pytest.mark.parametrize("model_type", ["qwen2", "gemma3_text"])
def test_answers_of_the_kernels_of_gpus_are_those_of_modules(
    model_type: str, proposed: int, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the kernels that are launched for a pass the smallest one that has room for its tokens computes it."""
    leave_ffns_to_pytorch(monkeypatch)
    machine = Noting(blocks=2, threads=128, shared_bytes=80000, folder=folder)
    monkeypatch.setattr(engines, "make_engine", lambda plan: CudaEngine(plan, machine))
    lengths, read = list[int](), CheckedModel.logits_of

    def noted(self: CheckedModel, ids: Tensor, positions: Tensor, starts: Tensor) -> Tensor:
        lengths.append(int((starts <= positions).sum()))
        return read(self, ids, positions, starts)

    monkeypatch.setattr(CheckedModel, "logits_of", noted)
    model, streamer = accelerated(model_type, head_dim=16), Pieces()
    begin = torch.randint(3, VOCAB, (1, 20), generator=torch.Generator().manual_seed(10))
    whole = torch.cat([begin, greedy_answers(model, begin, 52)], 1)
    # The model repeats itself, so after a prompt that ends with its own words there are proposals, short and long ones.
    found = generate_greedily(model, whole[:, :-18], 18, prompt_lookup_num_tokens=proposed, streamer=streamer)
    assert torch.equal(found, whole)
    assert machine.sizes == [next(size for size in SIZES[proposed] if size >= length) for length in lengths]
    # The prompt and its first token come before the passes, of which one more may have begun than there was to read.
    kept = streamer.lengths[2:]
    assert {*machine.sizes[: len(kept)]} >= {SIZES[proposed][0], SIZES[proposed][-1]}
    # Some proposals stay and others do not, also before the last pass, of which the end of the answer may leave less.
    assert max(kept) > min(proposed, 2)
    assert any(stay < length for stay, length in zip(kept[:-1], lengths, strict=False))


class TestOwnEngine:
    """By the engine of the device in the place of the reference."""

    @pytest.mark.parametrize("model_type", STEP_TYPES)
    @pytest.mark.parametrize("device", DEVICES)
    def test_lookup_and_drafts(
        self, device: str, model_type: str, prompt: Tensor, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.undo()
        leave_ffns_to_pytorch(monkeypatch)
        if device == "cpu":
            monkeypatch.setattr(lookup, "runs_ahead", lambda device: True)
            monkeypatch.setattr(CheckedModel, "calls", 4)
        monkeypatch.setattr(checking, "ROOM", 24)
        model, other = (lte.accelerate_(step_model(model_type, head_dim=64).to(device)) for _ in range(2))
        ids = prompt.to(device)
        plain = generate_greedily(model, ids, TOKENS)
        assistant = set_threshold_(other, 0.7)
        assistant.generation_config.num_assistant_tokens = 3
        assistant.generation_config.num_assistant_tokens_schedule = "constant"
        lookups: list[dict[str, Any]] = [{"prompt_lookup_num_tokens": proposed} for proposed in (3, 10)]
        for settings in (*lookups, {"assistant_model": assistant}):
            if (
                "assistant_model" in settings
                and DRAFTS_FAIL_IN_WINDOWS
                and model.config.to_dict().get("sliding_window")
            ):
                continue
            found = generate_greedily(model, ids, TOKENS, **settings)
            place = first_difference(found[0], plain[0])
            if place is not None:
                close = closest_call(model, plain[0, :place])
                assert close["logit_gap"] <= 1e-4 or close["score_distance"] <= 1e-5
