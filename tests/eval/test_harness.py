"""lm-eval on a loaded model gives what plain forward passes of the same model give."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("lm_eval")

import lte
from lte.bench.models import model_pair
from lte.eval.harness import TaskScore, check_harness_tasks, evaluate_harness
from lte.eval.inference import hard_inference
from lte.eval.sparsity import measure_sparsity
from lte.nn.sparse_ffn import SparseFfn
from lte.ops import dispatch
from lte.ops.step import engines
from lte.ops.step.reference import ReferenceEngine, ReferenceStep
from tests.eval.harness_toys import toy_model, toy_tokenizer, write_tasks
from tests.tiny_models import LAYERS, tiny_dense_model


@pytest.fixture(scope="module")
def tasks_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tasks(tmp_path_factory.mktemp("tasks"))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return toy_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def evaluate(tokenizer: Any, tasks_dir: Path) -> Any:
    def with_settings(model: Any, *tasks: str, **settings: Any) -> list[TaskScore]:
        return evaluate_harness(model, tokenizer, tasks, tasks_dir=tasks_dir, **settings).scores

    return with_settings


def model_of(kind: str, model_type: str = "llama") -> Any:
    model = toy_model(model_type)
    if kind == "off":
        return model
    return lte.accelerate_(model, "int8" if kind == "int8" else "native")


def requests_of(score: TaskScore) -> list[tuple[tuple[str, str], float]]:
    """Context and continuation of each log likelihood, and what the harness found."""
    samples = score.samples[score.task]
    return [
        (pair, response[0][0])
        for sample in samples
        for pair, response in zip(sample["arguments"], sample["resps"], strict=True)
    ]


@torch.no_grad()
def log_likelihood(model: Any, row: list[int], length: int) -> float:
    """Of the last `length` tokens of a row, by one forward pass without padding."""
    log_probs = model(torch.tensor([row[:-1]])).logits[0].log_softmax(-1)
    wanted = torch.tensor(row[-length:])
    return log_probs[-length:].gather(1, wanted.unsqueeze(1)).sum().item()


def measured_on(model: Any, rows: set[tuple[int, ...]]) -> Any:
    return measure_sparsity(model, [{"input_ids": torch.tensor([row])} for row in sorted(rows)])


def check_measurement(score: TaskScore, model: Any, rows: set[tuple[int, ...]]) -> None:
    """The harness counted the tokens of these rows, each row once."""
    expected = measured_on(model, rows)
    found = score.measurement
    assert found is not None
    assert found.tokens == score.tokens == expected.tokens == sum(map(len, rows))
    assert found.expert_use == expected.expert_use
    assert found.sparsity == pytest.approx(expected.sparsity)
    assert 0.2 < found.sparsity < 0.8


@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("kernels", ["off", "native", "int8"])
def test_log_likelihoods_and_sparsity_are_those_of_plain_passes(
    evaluate: Any, tokenizer: Any, kernels: str, batch_size: int
) -> None:
    model = model_of(kernels)
    (score,) = evaluate(model, "toy_choice", batch_size=batch_size)
    requests = requests_of(score)
    assert len(requests) == 16
    rows = {}
    with hard_inference(model):
        for (context, continuation), found in requests:
            row = tokenizer.encode(context + continuation)
            length = len(row) - len(tokenizer.encode(context))
            assert found == pytest.approx(log_likelihood(model, row, length), rel=1e-4)
            rows[tuple(row[:-1])] = found
    assert any(row[-1] == 0 for row in rows)
    assert len({len(row) for row in rows}) > 3
    check_measurement(score, model, set(rows))


def test_log_likelihoods_of_a_model_in_bf16_are_not_rounded(evaluate: Any) -> None:
    (score,) = evaluate(model_of("off").bfloat16(), "toy_choice", batch_size=4)
    found = [torch.tensor(value) for _, value in requests_of(score)]
    assert any(value != value.bfloat16() for value in found)


@pytest.mark.parametrize("model_type", ["opt", "gpt2"])
def test_families_that_store_their_ffns_otherwise(evaluate: Any, tokenizer: Any, model_type: str) -> None:
    model = model_of("native", model_type)
    (score,) = evaluate(model, "toy_choice", batch_size=4)
    rows = {tuple(tokenizer.encode("".join(pair))[:-1]) for pair, _ in requests_of(score)}
    check_measurement(score, model, rows)


def test_texts_are_tokenised_together_as_each_by_itself(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from lm_eval.api.instance import Instance

    from lte.eval.harness_lm import HFLM, CountingLm

    lm = CountingLm(toy_model(), tokenizer, 2)
    prefix = tokenizer.decode(lm.prefix_token_id)
    pairs = [
        (context, answer) for context in ("the river ", "the river", f"{prefix}a sea", "") for answer in ("to", " by")
    ]
    requests = [Instance("loglikelihood", {}, pair, index) for index, pair in enumerate(pairs)]
    seen: list[Any] = []
    alone: list[str] = []
    monkeypatch.setattr(lm, "_loglikelihood_tokens", lambda found, disable_tqdm=False: seen.append(found))
    HFLM.loglikelihood(lm, requests)
    encode = HFLM.tok_encode
    monkeypatch.setattr(HFLM, "tok_encode", lambda *a, **k: (alone.append(a[1]), encode(*a, **k))[1])
    lm.loglikelihood(requests)
    assert seen[0] == seen[1]
    # What begins with the prefix, or follows it alone, HFLM treats apart.
    assert {text for text in alone if not text.startswith(prefix)} == {"to", " by"}


@pytest.mark.parametrize("kernels", ["off", "native"])
def test_rolling_log_likelihoods(evaluate: Any, tokenizer: Any, kernels: str) -> None:
    model = model_of(kernels)
    (score,) = evaluate(model, "toy_rolling", batch_size=4)
    rows = set()
    for sample in score.samples["toy_rolling"]:
        row = [tokenizer.bos_token_id, *tokenizer.encode(sample["arguments"][0][0])]
        rows.add(tuple(row[:-1]))
        assert sample["resps"][0][0] == pytest.approx(log_likelihood(model, row, len(row) - 1), rel=1e-4)
    check_measurement(score, model, rows)


@torch.no_grad()
def generated(model: Any, tokenizer: Any, sample: dict[str, Any]) -> tuple[int, ...]:
    """Prompt and greedy answer, by a prompt at a time."""
    ids = tokenizer(sample["arguments"][0][0], return_tensors="pt")
    return tuple(model.generate(**ids, max_new_tokens=8, do_sample=False, pad_token_id=0)[0].tolist())


@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("kernels", ["off", "native", "int8"])
def test_generation_counts_neither_padding_nor_what_follows_the_end(
    evaluate: Any, tokenizer: Any, kernels: str, batch_size: int
) -> None:
    model = model_of(kernels)
    model.generation_config.eos_token_id = None
    samples = evaluate(model, "toy_generation", limit=1)[0].samples["toy_generation"]
    third = generated(model, tokenizer, samples[0])[-6]
    model.generation_config.eos_token_id = [2, third]
    (score,) = evaluate(model, "toy_generation", batch_size=batch_size)
    answers, rows = [], set()
    for sample in score.samples["toy_generation"]:
        row = generated(model, tokenizer, sample)
        rows.add(row[:-1])
        answers.append(len(row) - len(tokenizer.encode(sample["arguments"][0][0])))
        text = tokenizer.decode(row[-answers[-1] :], skip_special_tokens=True)
        assert sample["resps"][0][0] == text
    assert answers[0] == 3
    assert max(answers) == 8
    check_measurement(score, model, rows)


class TestThePath:
    """What runs is what `lte bench` times: the FFNs of its sparse model, by the same kernels."""

    @pytest.fixture
    def calls(self, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int, int]]:
        """The path, the runner and the tokens of each call of a kernel."""
        found: list[tuple[str, int, int]] = []
        current: list[int] = []
        run = dispatch.FfnRunner.__call__

        def spied_run(self: Any, x: Tensor, *given: Any) -> Tensor:
            current[:] = [id(self)]
            return run(self, x, *given)

        for name in ("sparse_ffn_cpu", "masked_ffn"):
            kernel = getattr(dispatch, name)

            def spied(x: Tensor, *args: Any, name: str = name, kernel: Any = kernel) -> Tensor:
                found.append((name, current[0], len(x)))
                return kernel(x, *args)

            monkeypatch.setattr(dispatch, name, spied)
        monkeypatch.setattr(dispatch.FfnRunner, "__call__", spied_run)

        def plain(self: Any, x: Tensor) -> Tensor:
            raise AssertionError("plain PyTorch computed an FFN")

        monkeypatch.setattr(SparseFfn, "forward", plain)
        return found

    def test_log_likelihoods_and_generation(
        self, evaluate: Any, calls: list[tuple[str, int, int]], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(engines, "unfit", lambda plan, caches: "whole steps are not what is tested here")
        pair = model_pair(toy_model())
        runners = [id(ffn._runner) for ffn in pair.sparse_ffns]  # type: ignore[attr-defined]
        evaluate(pair.sparse, "toy_choice", batch_size=4)
        assert {name for name, _, tokens in calls if tokens > 16} == {"masked_ffn"}
        calls.clear()
        evaluate(pair.sparse, "toy_generation", batch_size=1)
        assert [runner for _, runner, _ in calls] == runners * (len(calls) // LAYERS)
        # 8 tokens for each of 4 prompts, and each text once more to be counted.
        assert len(calls) == LAYERS * 4 * (8 + 1)
        few = {name for name, _, tokens in calls if tokens <= 16}
        assert few == {"sparse_ffn_cpu" if dispatch.HAS_NUMBA else "masked_ffn"}

    @pytest.mark.parametrize("batch_size", [1, 4])
    def test_generation_takes_whole_steps(
        self, evaluate: Any, batch_size: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        steps: list[Tensor] = []

        class Counting(ReferenceStep):
            def __call__(self, tokens: Tensor, positions: Tensor, starts: Tensor) -> Tensor:
                steps.append(starts)
                return super().__call__(tokens, positions, starts)

        monkeypatch.setattr(ReferenceEngine, "bind", lambda engine, caches: Counting(engine.plan, caches))
        monkeypatch.setattr(engines, "unfit", lambda plan, caches: None)
        monkeypatch.setattr(engines, "make_engine", ReferenceEngine)
        (plain,) = evaluate(model_of("off"), "toy_generation", batch_size=batch_size)
        assert not steps
        (score,) = evaluate(model_of("native"), "toy_generation", batch_size=batch_size)
        # The prompt gives the first of 8 tokens.
        assert len(steps) == 7 * 4 // batch_size
        assert any(bool(starts.any()) for starts in steps) == (batch_size > 1)
        for found, expected in zip(score.samples["toy_generation"], plain.samples["toy_generation"], strict=True):
            assert found["resps"] == expected["resps"]
        assert score.measurement is not None
        assert plain.measurement is not None
        assert score.measurement.expert_use == plain.measurement.expert_use


class TestScores:
    def test_a_task(self, evaluate: Any) -> None:
        (score,) = evaluate(toy_model(), "toy_choice", num_fewshot=0, limit=3)
        assert (score.task, score.metric, score.num_samples, score.num_fewshot) == ("toy_choice", "acc", 3, 0)
        assert (score.split, score.task_version) == ("test", "7")
        assert set(score.metrics) == {"acc", "acc_stderr", "acc_norm", "acc_norm_stderr"}
        right = [sample["acc"] for sample in score.samples["toy_choice"]]
        assert score.value == score.metrics["acc"] == sum(right) / 3
        assert evaluate(toy_model(), "toy_choice", limit=1)[0].metrics["acc_stderr"] is None

    def test_questions_as_chats(self, evaluate: Any, tokenizer: Any, tasks_dir: Path) -> None:
        model, chat = toy_model(), copy.deepcopy(tokenizer)
        chat.chat_template = None
        with pytest.raises(ValueError, match="tokenizer must have a chat template, got chat_template=None"):
            evaluate_harness(model, chat, ["toy_choice"], apply_chat_template=True, tasks_dir=tasks_dir)
        turns = "{% for message in messages %}{{ message.role }} asks: {{ message.content }}{% endfor %}"
        chat.chat_template = turns + "{% if add_generation_prompt %} it answers:{% endif %}"
        (score,) = evaluate_harness(model, chat, ["toy_choice"], apply_chat_template=True, tasks_dir=tasks_dir).scores
        (plain,) = evaluate(model, "toy_choice")
        asked = [f"user asks: {context} it answers:" for (context, _), _ in requests_of(plain)]
        assert [context for (context, _), _ in requests_of(score)] == asked
        rows = {tuple(tokenizer.encode("".join(pair))[:-1]) for pair, _ in requests_of(score)}
        check_measurement(score, model, rows)

    def test_each_task_has_the_sparsity_of_its_own_passes(self, evaluate: Any) -> None:
        model = toy_model()
        choice, rolling = evaluate(model, "toy_choice", "toy_rolling")
        assert choice.tokens > rolling.tokens
        assert evaluate(model, "toy_rolling")[0].measurement == rolling.measurement

    def test_a_group_with_a_mean_is_one_score(self, evaluate: Any) -> None:
        (score,) = evaluate(toy_model(), "toy_group")
        assert score.task == "toy_group"
        assert set(score.by_task) == {"toy_choice", "toy_other"}
        assert score.value == pytest.approx(sum(score.by_task.values()) / 2)
        assert score.num_samples == 8

    @pytest.mark.parametrize("name", ["toy_tag", "toy_plain_group"])
    def test_others_are_a_score_for_each_task(self, evaluate: Any, name: str) -> None:
        assert [score.task for score in evaluate(toy_model(), name)] == ["toy_choice", "toy_other"]

    def test_the_hash_is_that_of_the_task(self, evaluate: Any, tmp_path: Path, tokenizer: Any) -> None:
        first, again = (evaluate(toy_model(), "toy_choice")[0] for _ in range(2))
        assert first.config_hash == again.config_hash
        assert evaluate(toy_model(), "toy_rolling")[0].config_hash != first.config_hash
        elsewhere = write_tasks(tmp_path)
        moved = evaluate_harness(toy_model(), tokenizer, ["toy_choice"], tasks_dir=elsewhere).scores[0]
        assert moved.config_hash == first.config_hash

    def test_a_dense_model(self, evaluate: Any, tokenizer: Any) -> None:
        model = tiny_dense_model(vocab_size=300, max_position_embeddings=256)
        (score,) = evaluate(model, "toy_choice", batch_size=4)
        assert score.measurement is None
        rows = {tuple(tokenizer.encode("".join(pair))[:-1]) for pair, _ in requests_of(score)}
        assert score.tokens == sum(map(len, rows))

    def test_modes_come_back(self, evaluate: Any) -> None:
        model = toy_model().train()
        ffns = lte.sparse_ffns(model).values()
        for ffn in ffns:
            ffn.set_mode("soft")
        (score,) = evaluate(model, "toy_choice")
        assert {ffn.mode for ffn in ffns} == {"soft"}
        assert all(module.training for module in model.modules())
        assert not any(ffn.record_logits or ffn.logits is not None for ffn in ffns)
        assert score.metrics == evaluate(toy_model(), "toy_choice")[0].metrics


class TestFaults:
    def test_an_unknown_name_is_answered_with_near_ones(self, evaluate: Any) -> None:
        match = (
            "tasks must be names of tasks, groups or tags that lm-eval knows, got toy_choise; did you mean toy_choice"
        )
        with pytest.raises(ValueError, match=match):
            evaluate(toy_model(), "toy_choise")

    def test_settings(self, tokenizer: Any, evaluate: Any, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="tasks must be a list of at least one task's name, got tasks='piqa'"):
            evaluate_harness(toy_model(), tokenizer, "piqa")
        for name, value in (("num_fewshot", -1), ("limit", 0), ("batch_size", 0)):
            with pytest.raises(ValueError, match=rf"{name} must be .*, got {name}={value}"):
                evaluate(toy_model(), "toy_choice", **{name: value})
        with pytest.raises(ValueError, match=r"tasks_dir must be an existing folder, got tasks_dir=.*nowhere"):
            evaluate_harness(toy_model(), tokenizer, ["toy_choice"], tasks_dir=tmp_path / "nowhere")

    def test_another_head(self, evaluate: Any) -> None:
        with pytest.raises(ValueError, match="model must predict the next token to run lm-eval's tasks, got Lte"):
            evaluate(toy_model("bert"), "toy_choice")

    def test_several_sequences_per_prompt(self, evaluate: Any, tasks_dir: Path) -> None:
        text = (tasks_dir / "generation.yaml").read_text()
        beams = text.replace("toy_generation", "toy_beams").replace(
            "do_sample: false", "num_beams: 2, do_sample: false"
        )
        (tasks_dir / "beams.yaml").write_text(beams)
        with pytest.raises(ValueError, match="generation must be of one sequence per prompt, got 8 for 4"):
            evaluate(toy_model(), "toy_beams", batch_size=4)

    def test_without_lm_eval(self, evaluate: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "lm_eval", None)
        for run in (lambda: evaluate(toy_model(), "toy_choice"), lambda: check_harness_tasks(["toy_choice"])):
            with pytest.raises(ValueError, match=r"lm-eval must be installed .* pip install lm-eval"):
                run()
