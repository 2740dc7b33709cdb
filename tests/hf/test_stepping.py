"""`generate` by whole decoding steps gives what `generate` of transformers gives."""

from __future__ import annotations

import copy
import gc
import importlib.util
import pickle
import threading
import warnings
import weakref
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, LlamaForCausalLM, StaticCache, StoppingCriteria
from transformers.generation.streamers import BaseStreamer

import lte
from lte.hf import stepping
from lte.ops.dispatch import FfnRunner
from lte.ops.step import engines
from lte.ops.step.plan import DecoderPlan
from lte.ops.step.reference import ReferenceEngine, ReferenceStep
from tests.hf.step_models import STEP_TYPES, accelerated, step_model
from tests.tiny_models import randomise_routers_, tiny_sparse_model


def is_there(module: str) -> bool:
    """Whether a module and numba are installed."""
    return all(importlib.util.find_spec(name) is not None for name in (module, "numba"))


GREEDY: dict[str, Any] = {"max_new_tokens": 24, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
PROMPT = 6


class Counting:
    """The reference engine, and how often its steps ran and engines were made."""

    def __init__(self) -> None:
        self.steps, self.made = 0, 0
        self.fail_at: int | None = None

    def make(self, plan: DecoderPlan) -> Any:
        self.made += 1
        return _CountingEngine(plan, self)


class _CountingEngine(ReferenceEngine):
    def __init__(self, plan: DecoderPlan, count: Counting):
        super().__init__(plan)
        object.__setattr__(self, "count", count)

    def bind(self, caches: Any, tokens: int = 1, *, fewer: bool = False) -> Any:
        step, count = ReferenceStep(self.plan, caches), self.count  # type: ignore[attr-defined]
        scratch = torch.empty(0)

        def run(tokens: Tensor, positions: Tensor, starts: Tensor) -> Tensor:
            nonlocal scratch
            assert {tensor.dtype for tensor in (tokens, positions, starts)} == {torch.int64}
            # The memory of the last logits is written anew.
            scratch.fill_(torch.nan)
            scratch = step(tokens, positions, starts)
            count.steps += 1
            if count.steps == count.fail_at:
                raise RuntimeError("interrupted")
            return scratch

        return run


def leave_ffns_to_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts, and all tokens of the plain path, do without the threads of numba, for which busy cores wait."""
    monkeypatch.setattr(FfnRunner, "_cpu_kernel_takes", lambda self, tokens, dtype: False)


@pytest.fixture(autouse=True)
def count(monkeypatch: pytest.MonkeyPatch) -> Counting:
    counting = Counting()
    leave_ffns_to_pytorch(monkeypatch)
    monkeypatch.setattr(engines, "unfit", lambda plan, caches: None)
    monkeypatch.setattr(engines, "make_engine", counting.make)
    return counting


@pytest.fixture(params=["as on a CPU", "as on a GPU"])
def ahead(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether a step begins before it is known that the text goes on."""
    found = request.param == "as on a GPU"
    monkeypatch.setattr(stepping, "runs_ahead", lambda device: found)
    return found


def prompt(batch: int = 3, *, padded: bool = False, length: int = PROMPT) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(3, 99, (batch, length), generator=generator)
    mask = torch.ones_like(ids)
    if padded:
        mask[0, :4] = mask[1, :1] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


def plain(model: Any, **arguments: Any) -> Any:
    """What transformers generates with the same model."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stepping, "_is_plain", lambda *args: False)
        return model.generate(**arguments)


class TestTokens:
    @pytest.mark.parametrize("cache", [None, "static"])
    @pytest.mark.parametrize("padded", [False, True])
    @pytest.mark.parametrize("model_type", STEP_TYPES)
    def test_greedy(self, model_type: str, padded: bool, cache: str | None, count: Counting) -> None:
        model = accelerated(model_type)
        arguments = {**prompt(padded=padded), **GREEDY, "cache_implementation": cache}
        actual = model.generate(**arguments)
        assert count.steps == 23
        assert torch.equal(actual, plain(model, **arguments))

    @pytest.mark.parametrize("length", [1, 7, 8, 15])
    @pytest.mark.parametrize("cache", [None, "static"])
    def test_prompts_around_a_window(self, length: int, cache: str | None, count: Counting) -> None:
        model = accelerated("gemma3_text")
        arguments = {**prompt(length=length), **GREEDY, "cache_implementation": cache}
        assert torch.equal(model.generate(**arguments), plain(model, **arguments))
        assert count.steps == 23

    def test_sampling(self, count: Counting) -> None:
        model = accelerated()
        settings = {"do_sample": True, "temperature": 0.9, "top_k": 20, "top_p": 0.9, "repetition_penalty": 1.2}
        arguments = {**prompt(padded=True), **GREEDY, **settings, "num_return_sequences": 2}
        torch.manual_seed(3)
        expected = plain(model, **arguments)
        torch.manual_seed(3)
        assert torch.equal(model.generate(**arguments), expected)
        assert count.steps == 23

    def test_caches_grow(self, monkeypatch: pytest.MonkeyPatch, count: Counting) -> None:
        monkeypatch.setattr(stepping, "ROOM", 2)
        model = accelerated("gemma2")
        arguments = {**prompt(padded=True), **GREEDY}
        assert torch.equal(model.generate(**arguments), plain(model, **arguments))
        assert (count.steps, count.made) == (23, 1)

    def test_ends_and_padding(self, ahead: bool, count: Counting) -> None:
        model = accelerated()
        free = plain(model, **prompt(), **GREEDY)[:, PROMPT:]
        arguments = {**prompt(), **GREEDY, "eos_token_id": [int(free[0, 4]), int(free[1, 9]), int(free[2, 2])]}
        expected = plain(model, **arguments)
        assert torch.equal(model.generate(**arguments), expected)
        assert expected.shape[1] < PROMPT + 24
        assert count.steps == expected.shape[1] - PROMPT - (not ahead)

    def test_tokens_of_32_bits(self, count: Counting) -> None:
        model, arguments = accelerated(), {**prompt(), **GREEDY}
        arguments["input_ids"] = arguments["input_ids"].int()
        assert torch.equal(model.generate(**arguments), plain(model, **arguments))
        assert count.steps == 23

    def test_another_default_device(self, count: Counting) -> None:
        model, arguments = accelerated(), {**prompt(), **GREEDY}
        expected = plain(model, **arguments)
        with torch.device("meta"):
            assert torch.equal(model.generate(**arguments), expected)
        assert count.steps == 23

    def test_inference_mode_and_after(self, count: Counting) -> None:
        model, arguments = accelerated("gemma2"), {**prompt(), **GREEDY}
        with torch.inference_mode():
            first = model.generate(**arguments)
        assert torch.equal(model.generate(**arguments), first)
        assert (count.steps, count.made) == (46, 1)


DEVICES = [
    pytest.param("cpu", marks=pytest.mark.skipif(not is_there("lte.ops.step.cpu"), reason="needs the CPU engine")),
    pytest.param(
        "cuda",
        marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")],
    ),
]


class TestOwnEngine:
    """By the engine of the device in the place of the reference."""

    @pytest.mark.parametrize("cache", [None, "static"])
    @pytest.mark.parametrize("model_type", STEP_TYPES)
    @pytest.mark.parametrize("device", DEVICES)
    def test_greedy(self, device: str, model_type: str, cache: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.undo()
        leave_ffns_to_pytorch(monkeypatch)
        model = lte.accelerate_(step_model(model_type, head_dim=64).to(device))
        inputs = {name: tensor.to(device) for name, tensor in prompt(padded=True).items()}
        arguments = {**inputs, **GREEDY, "cache_implementation": cache, "disable_compile": True}
        with warnings.catch_warnings():
            warnings.simplefilter("error", RuntimeWarning)
            actual = model.generate(**arguments)
        assert model in stepping._KEPT
        assert torch.equal(actual, plain(model, **arguments))


class Recording(BaseStreamer):
    def __init__(self) -> None:
        self.seen: list[Any] = []

    def put(self, value: Tensor) -> None:
        self.seen.append(value.tolist())

    def end(self) -> None:
        self.seen.append("end")


class RowsStop(StoppingCriteria):
    """Row i stops after 3 + 4 i tokens, and looks at the scores that it gets."""

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        new = input_ids.shape[1] - PROMPT
        assert scores is None or len(scores) == new
        return new >= 3 + 4 * torch.arange(len(input_ids))


class Stop(StoppingCriteria):
    """Stops all rows after so many tokens."""

    def __init__(self, tokens: int):
        self.tokens = tokens

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        return torch.full((len(input_ids),), input_ids.shape[1] >= PROMPT + self.tokens)


class TestCalls:
    def test_streamer(self, ahead: bool, count: Counting) -> None:
        model, streamers = accelerated(), [Recording(), Recording()]
        plain(model, **prompt(1), **GREEDY, streamer=streamers[0])
        model.generate(**prompt(1), **GREEDY, streamer=streamers[1])
        assert streamers[0].seen == streamers[1].seen
        assert len(streamers[1].seen) == 26
        assert count.steps == 23

    @pytest.mark.parametrize("scores", [False, True])
    def test_stopping_criteria(self, scores: bool, count: Counting) -> None:
        model = accelerated()
        arguments = {**prompt(), **GREEDY, "stopping_criteria": [RowsStop()]}
        arguments |= {"return_dict_in_generate": scores, "output_scores": scores}
        actual, expected = model.generate(**arguments), plain(model, **arguments)
        assert torch.equal(actual["sequences"] if scores else actual, expected["sequences"] if scores else expected)
        assert count.steps == 10

    def test_scores_and_logits(self, count: Counting, relative_rms: Callable[[Tensor, Tensor], float]) -> None:
        model = accelerated("phi3")
        settings = {
            "return_dict_in_generate": True,
            "output_scores": True,
            "output_logits": True,
            "bad_words_ids": [[7]],
        }
        arguments = {**prompt(padded=True), **GREEDY, **settings}
        actual, expected = model.generate(**arguments), plain(model, **arguments)
        assert actual.keys() == expected.keys()
        assert torch.equal(actual.sequences, expected.sequences)
        for name in ("scores", "logits"):
            assert len(actual[name]) == 24
            for one, other in zip(actual[name], expected[name], strict=True):
                finite = other.isfinite()
                assert torch.equal(finite, one.isfinite())
                assert relative_rms(one[finite], other[finite]) <= 1e-5
        assert count.steps == 23


def given_cache(kind: str, model: Any) -> Any:
    if kind == "static":
        return StaticCache(model.config, max_cache_len=64)
    return DynamicCache(config=model.config) if kind == "dynamic" else DynamicCache()


class TestCachesOfTheCaller:
    @pytest.mark.parametrize("first_tokens", [1, 12])
    @pytest.mark.parametrize("kind", ["dynamic", "static", "without layers yet"])
    @pytest.mark.parametrize("model_type", ["llama", "gemma2"])
    def test_conversations(self, model_type: str, kind: str, first_tokens: int, ahead: bool, count: Counting) -> None:
        model, texts, caches = accelerated(model_type), list[Tensor](), list[Any]()
        for generate in (model.generate, lambda **arguments: plain(model, **arguments)):
            cache = given_cache(kind, model)
            arguments = {**prompt(2), **GREEDY, "past_key_values": cache}
            ids = generate(**{**arguments, "max_new_tokens": 20, "stopping_criteria": [Stop(first_tokens)]})
            # Further tokens of the user, then of the model; the last answer by steps or not.
            ids = torch.cat([ids, torch.full((2, 3), 5)], dim=1)
            arguments |= {"input_ids": ids, "attention_mask": torch.ones_like(ids), "max_new_tokens": 9}
            ids = generate(**arguments)
            ids = torch.cat([ids, torch.full((2, 1), 6)], dim=1)
            arguments |= {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            texts.append(plain(model, **arguments))
            caches.append(cache)
        assert torch.equal(*texts)
        assert int(caches[0].get_seq_length()) == int(caches[1].get_seq_length())
        assert count.steps == first_tokens - (not ahead) + 8

    def test_a_cache_of_more_tokens_than_are_given(self, count: Counting) -> None:
        # Transformers then takes the tokens for new ones in part; it need not be sensible, but no other.
        model, texts = accelerated(), list[Tensor]()
        for generate in (model.generate, lambda **arguments: plain(model, **arguments)):
            cache = given_cache("dynamic", model)
            plain(model, **prompt(2), **GREEDY, past_key_values=cache)
            texts.append(generate(**prompt(2, length=25), **GREEDY, past_key_values=cache))
        assert torch.equal(*texts)
        assert count.steps == 0

    def test_returned(self, count: Counting) -> None:
        model = accelerated("gemma3_text")
        arguments = {**prompt(), **GREEDY, "return_dict_in_generate": True}
        ours, theirs = (cache.past_key_values for cache in (model.generate(**arguments), plain(model, **arguments)))
        assert count.steps == 23
        for one, other in zip(ours.layers, theirs.layers, strict=True):
            assert one.get_seq_length() == other.get_seq_length()
            torch.testing.assert_close(one.keys, other.keys)
            torch.testing.assert_close(one.values, other.values)

    @pytest.mark.parametrize("kind", ["dynamic", "static"])
    def test_after_an_exception(self, kind: str, ahead: bool, count: Counting) -> None:
        model = accelerated("gemma2")
        cache, expected = given_cache(kind, model), plain(model, **prompt(), **GREEDY)
        count.fail_at = 10
        with pytest.raises(RuntimeError, match="interrupted"):
            model.generate(**prompt(), **GREEDY, past_key_values=cache)
        # The token after those whose steps came to an end is read again.
        held = int(cache.get_seq_length())
        assert held == PROMPT + 9
        ids = expected[:, : held + 1]
        arguments = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "past_key_values": cache}
        again = model.generate(**arguments, **{**GREEDY, "max_new_tokens": 14})
        assert torch.equal(again, expected[:, : held + 15])
        assert torch.equal(model.generate(**prompt(), **GREEDY), expected)


class OwnCache(DynamicCache):
    pass


def _train(model: Any) -> dict[str, Any]:
    model.train()
    return {}


def _train_one_part(model: Any) -> dict[str, Any]:
    model.model.layers[1].self_attn.train()
    return {}


def _prepare_otherwise(model: Any) -> dict[str, Any]:
    prepare = model.prepare_inputs_for_generation
    model.prepare_inputs_for_generation = lambda *args, **kwargs: prepare(*args, **kwargs)
    return {}


def _record(model: Any) -> dict[str, Any]:
    model.model.layers[0].mlp.record_logits = True
    return {}


def _soften(model: Any) -> dict[str, Any]:
    model.model.layers[1].mlp.set_mode("soft")
    return {}


OTHERS: dict[str, Callable[[Any], dict[str, Any]]] = {
    "beams": lambda model: {"num_beams": 2},
    "attentions": lambda model: {"output_attentions": True, "return_dict_in_generate": True},
    "hidden states": lambda model: {"output_hidden_states": True, "return_dict_in_generate": True},
    "no cache": lambda model: {"use_cache": False},
    "a cache of another class": lambda model: {"past_key_values": OwnCache(config=model.config)},
    "a static cache that is too small": lambda model: {
        "past_key_values": StaticCache(model.config, max_cache_len=12),
        "max_length": 30,
        "max_new_tokens": None,
        "eos_token_id": list(range(99)),
    },
    "one token": lambda model: {"max_new_tokens": 1},
    "embeddings": lambda model: {"inputs_embeds": model.model.embed_tokens(prompt(1)["input_ids"])},
    "training": _train,
    "training of one part": _train_one_part,
    "inputs that the caller prepares": _prepare_otherwise,
    "soft mode": _soften,
    "recorded routing": _record,
}


class TestFallBack:
    @pytest.mark.parametrize("name", OTHERS)
    def test_without_a_word(self, name: str, count: Counting) -> None:
        model = accelerated()
        with warnings.catch_warnings():
            warnings.simplefilter("error", RuntimeWarning)
            found = []
            for generate in (model.generate, lambda **arguments: plain(model, **arguments)):
                arguments = {**prompt(1), **GREEDY, **OTHERS[name](model)}
                if "inputs_embeds" in arguments:
                    del arguments["input_ids"], arguments["attention_mask"]
                found.append(generate(**arguments))
        sequences = [text if isinstance(text, Tensor) else text.sequences for text in found]
        assert torch.equal(*sequences)
        assert count.steps == 0

    @pytest.mark.parametrize("gap", ["right", "middle", "positions"])
    def test_padding_that_is_not_on_the_left(self, gap: str, count: Counting) -> None:
        model, inputs = accelerated(), prompt()
        if gap == "positions":
            inputs["position_ids"] = torch.arange(PROMPT) + torch.tensor([[0], [0], [3]])
        else:
            inputs["attention_mask"][1, 5 if gap == "right" else 2] = 0
        assert torch.equal(model.generate(**inputs, **GREEDY), plain(model, **inputs, **GREEDY))
        assert count.steps == 0

    def test_classes_that_sample_by_themselves(self, count: Counting) -> None:
        class Silent(LlamaForCausalLM):
            def _sample(self, input_ids: Tensor, *args: Any, **kwargs: Any) -> Tensor:
                return input_ids

        model = step_model(dense=True)
        model.__class__ = Silent
        lte.accelerate_(lte.sparsify_(model, lte.LteConfig(expert_size=8, grouping="random")))
        assert torch.equal(model.generate(**prompt(), **GREEDY), prompt()["input_ids"])

    def test_says_once_what_it_does_not_know(self, count: Counting) -> None:
        model = accelerated()
        handle = model.model.norm.register_forward_hook(lambda *args: None)
        with pytest.warns(RuntimeWarning, match=r"as model\.norm has hooks"):
            model.generate(**prompt(), **GREEDY)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model.generate(**prompt(), **GREEDY)
        assert count.steps == 0
        handle.remove()
        model.generate(**prompt(), **GREEDY)
        assert count.steps == 23

    def test_says_why_no_engine_fits(self, monkeypatch: pytest.MonkeyPatch, count: Counting) -> None:
        monkeypatch.setattr(engines, "unfit", lambda plan, caches: f"{caches[0].keys.shape[2]} tokens are too many")
        with pytest.warns(RuntimeWarning, match="as 29 tokens are too many"):
            accelerated().generate(**prompt(), **GREEDY)
        assert count.made == 0

    def test_plain_models_stay_with_transformers(self, count: Counting) -> None:
        step_model().generate(**prompt(), **GREEDY)
        tiny_sparse_model("gpt2").generate(**prompt(), **GREEDY)
        assert count.steps == 0


class TestStateOfTheModel:
    def test_changes_between_calls(self, count: Counting) -> None:
        model, arguments = accelerated("qwen2"), {**prompt(), **GREEDY}
        # The plan then holds copies of its frequencies.
        model.model.rotary_emb.double()

        def check(made: int) -> Tensor:
            actual = model.generate(**arguments)
            assert torch.equal(actual, plain(model, **arguments))
            assert count.made == made
            return actual

        texts = [check(1), check(1)]
        assert torch.equal(*texts)
        with torch.no_grad():
            model.model.layers[0].self_attn.q_proj.weight.mul_(-1)
            model.model.layers[1].mlp.router.bias.sub_(0.5)
        texts.append(check(1))
        model.load_state_dict(randomise_routers_(step_model("qwen2"), seed=9).state_dict())
        texts.append(check(1))
        model.model.rotary_emb.inv_freq.mul_(-7)
        texts.append(check(1))
        model.model.layers[0].self_attn.v_proj.weight.data = torch.randn(16, 32)
        texts.append(check(2))
        model.model.layers[1].mlp.threshold_logit = 0.3
        texts.append(check(3))
        model.double().float()
        check(4)
        lte.decelerate_(model)
        model.generate(**arguments)
        assert count.made == 4
        lte.accelerate_(model)
        check(5)
        # Each change was one that the tokens show.
        assert all(not torch.equal(one, other) for one, other in pairwise(texts[1:]))

    def test_more_tokens_in_the_vocabulary(self, count: Counting) -> None:
        # Transformers makes the new head in training mode.
        model = accelerated(tie_word_embeddings=False)
        model.resize_token_embeddings(120)
        assert torch.equal(model.generate(**prompt(), **GREEDY), plain(model, **prompt(), **GREEDY))
        assert count.steps == 23

    def test_copies_pickles_and_folders(self, tmp_path: Path, count: Counting) -> None:
        model, arguments = accelerated(), {**prompt(), **GREEDY}
        expected = model.generate(**arguments)
        copied, pickled = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
        model.save_pretrained(tmp_path / "model")
        loaded = lte.accelerate_(type(model).from_pretrained(tmp_path / "model", attn_implementation="eager"))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
        for other in (copied, pickled, loaded):
            assert torch.equal(other.generate(**arguments), expected)
        assert (count.steps, count.made) == (4 * 23, 4)

    def test_nothing_holds_a_model_or_its_weights(self, count: Counting) -> None:
        model = accelerated()
        model.generate(**prompt(), **GREEDY)
        kept = [weakref.ref(model), weakref.ref(stepping._KEPT[model].engine)]
        for change in (lte.decelerate_, lambda model: model.double().float()):
            change(model)
            gc.collect()
            assert kept[1]() is None
            lte.accelerate_(model)
            model.generate(**prompt(), **GREEDY)
            kept[1] = weakref.ref(stepping._KEPT[model].engine)
        del model
        gc.collect()
        assert [reference() for reference in kept] == [None, None]

    def test_threads_and_two_models(self, count: Counting) -> None:
        models = [accelerated("qwen2"), accelerated("gemma2")]
        arguments = {**prompt(), **GREEDY}
        expected = [plain(model, **arguments) for model in models]
        found: dict[int, Tensor] = {}

        def run(index: int) -> None:
            found[index] = models[index % 2].generate(**arguments)

        threads = [threading.Thread(target=run, args=(index,)) for index in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert all(torch.equal(found[index], expected[index % 2]) for index in range(4))
        assert (count.steps, count.made) == (4 * 23, 2)
