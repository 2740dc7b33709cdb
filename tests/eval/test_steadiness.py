"""What `lte.eval.steadiness` counts, beside counts that are written out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import lte
from lte.eval import decisions as counting
from lte.eval.answers import PADDING, agreement, greedy_answers
from lte.eval.decisions import NoStepsError, by_whole_steps, in_one_pass, token_by_token
from lte.eval.models import load_any_model
from lte.eval.steadiness import DISTANCES, SteadinessSettings, measure_steadiness
from tests.hf.step_models import STEP_TYPES, step_model
from tests.tiny_models import VOCAB, tiny_dense_model, tiny_sparse_model

SETTINGS = SteadinessSettings(prompts=5, prompt_length=9, tokens=6, batch=4)


@pytest.fixture(scope="module")
def ids() -> Tensor:
    return torch.randint(3, VOCAB, (5, 15), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("steadiness") / "sparse"
    model = step_model()
    # Many scores near tau, so that bf16 flips some.
    for ffn in lte.sparse_ffns(model).values():
        ffn.router.weight.data *= 0.02
        ffn.router.bias.data *= 0.02
    model.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def found(folder: Path, ids: Tensor) -> dict[str, Any]:
    return measure_steadiness(str(folder), ids, SETTINGS)


def pair_of(found: dict[str, Any], name: str, dtype: str | None = None) -> dict[str, Any]:
    (pair,) = [pair for pair in found["pairs"] if (pair["pair"], pair["dtype"]) == (name, dtype)]
    return pair


@torch.no_grad()
def routers_say(model: Any, *args: Any, **kwargs: Any) -> list[Tensor]:
    """The logits of every router in a call, as their own modules return them."""
    logits: list[Tensor] = []
    routers = [ffn.router for ffn in lte.sparse_ffns(model).values()]
    hooks = [router.register_forward_hook(lambda *call: logits.append(call[-1])) for router in routers]
    model(*args, **kwargs)
    for hook in hooks:
        hook.remove()
    return logits


def counted(one: list[Tensor], other: list[Tensor]) -> list[float]:
    """The share of the decisions on both sides of logit 0, counted one by one."""
    shares = []
    for ours, theirs in zip(one, other, strict=True):
        numbers = zip(ours.flatten().tolist(), theirs.flatten().tolist(), strict=True)
        flips = [(a > 0) != (b > 0) for a, b in numbers]
        shares.append(sum(flips) / len(flips))
    return shares


def together(rows: list[list[Tensor]]) -> list[Tensor]:
    return [torch.cat([row[layer] for row in rows]) for layer in range(2)]


def test_flips_between_number_formats(folder: Path, ids: Tensor, found: dict[str, Any]) -> None:
    exact, rounded = (load_any_model(str(folder), dtype) for dtype in ("float32", "bfloat16"))
    logits = [together([routers_say(model, row[None]) for row in ids]) for model in (exact, rounded)]
    pair = pair_of(found, "formats")
    assert pair["flips_by_layer"] == pytest.approx(counted(*logits), abs=1e-12)
    assert 0 < pair["flips"] == pytest.approx(sum(pair["flips_by_layer"]) / 2)
    # The first layer reads the same either way: embeddings, which are rounded to bf16 in both.
    assert pair["own_flips_by_layer"][0] == pair["flips_by_layer"][0]
    for name, each in zip(("float32", "bfloat16"), logits, strict=True):
        near = found["near_threshold"][name]
        for distance in DISTANCES:
            scores = [[1 / (1 + 2.718281828459045**-x) for x in layer.flatten().tolist()] for layer in each]
            expected = [sum(abs(score - 0.5) < distance for score in layer) / len(layer) for layer in scores]
            assert near[str(distance)]["by_layer"] == pytest.approx(expected, abs=2e-3)
        assert found["sparsity"][name] == pytest.approx(1 - torch.stack(each).gt(0).double().mean().item())


def test_own_flips_are_of_a_layer_that_reads_what_the_other_run_read(
    folder: Path, ids: Tensor, found: dict[str, Any]
) -> None:
    exact, rounded = (load_any_model(str(folder), dtype) for dtype in ("float32", "bfloat16"))
    ours, theirs = [], []
    for row in ids:
        read: list[Tensor] = []
        hook = exact.model.layers[1].register_forward_pre_hook(lambda module, args, to=read: to.append(args[0]))
        ours.append(routers_say(exact, row[None]))
        hook.remove()
        hook = rounded.model.layers[1].register_forward_pre_hook(
            lambda module, args, of=read: (of[0].bfloat16(), *args[1:])
        )
        theirs.append(routers_say(rounded, row[None]))
        hook.remove()
    own = counted(together(ours), together(theirs))
    assert pair_of(found, "formats")["own_flips_by_layer"] == pytest.approx(own, abs=1e-12)
    assert own[1] < pair_of(found, "formats")["flips_by_layer"][1]


def test_flips_in_a_batch_with_padding(folder: Path, ids: Tensor, found: dict[str, Any]) -> None:
    model = load_any_model(str(folder), "bfloat16")
    alone, batch = [], []
    for rows in (ids[:4], ids[4:]):
        alone += [together([routers_say(model, row[None]) for row in rows])]
        padded = torch.cat([torch.zeros(len(rows), PADDING, dtype=torch.long), rows], dim=1)
        mask = padded > 0
        positions = (mask.long().cumsum(1) - 1).clamp_min(0)
        logits = routers_say(model, padded, attention_mask=mask.long(), position_ids=positions)
        batch += [[each.view(len(rows), PADDING + 15, -1)[:, PADDING:] for each in logits]]
    expected = counted(together(alone), together(batch))
    assert pair_of(found, "padded_batch", "bfloat16")["flips_by_layer"] == pytest.approx(expected, abs=1e-12)


def test_every_pair_is_there_and_fp32_is_steady(found: dict[str, Any]) -> None:
    names = ["batch", "padded_batch", "token_by_token", "kernels", "kernels_token_by_token", "whole_steps"]
    expected = [(name, "float32") for name in names] + [("formats", None)] + [(name, "bfloat16") for name in names]
    assert [(pair["pair"], pair["dtype"]) for pair in found["pairs"]] == expected
    assert all(pair["note"] is None for pair in found["pairs"])
    for pair in found["pairs"][:6]:
        # Of 5 x 15 x 2 x 8 decisions, those within 1e-6 of tau at most.
        assert pair["flips"] <= 0.002
        assert pair["own_flips"] <= 0.002
    for pair in found["pairs"]:
        assert (pair["answers"] is None) == (pair["pair"] in ("token_by_token", "kernels"))
        assert (pair["dense_answers"] is None) == (pair["pair"] not in ("batch", "padded_batch", "formats"))
    assert found["kernels"]["bfloat16"]["weights"] == "native"
    assert set(found) >= {"hardware", "versions", "git_commit"}


def test_answers_are_those_of_generate(folder: Path, ids: Tensor, found: dict[str, Any]) -> None:
    answers = {}
    for dtype in ("float32", "bfloat16"):
        model = load_any_model(str(folder), dtype)
        for kind in ("answers", "dense_answers"):
            if kind == "dense_answers":
                lte.densify_(model)
            out = [
                model.generate(
                    row[None, :9], attention_mask=torch.ones(1, 9), max_new_tokens=6, do_sample=False, eos_token_id=None
                )
                for row in ids
            ]
            answers[kind, dtype] = torch.cat(out)[:, 9:]
    for kind in ("answers", "dense_answers"):
        found_pair = pair_of(found, "formats")[kind]
        assert found_pair == agreement(answers[kind, "float32"], answers[kind, "bfloat16"])


def test_agreement_is_counted() -> None:
    one = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8], [1, 1, 1, 1]])
    other = torch.tensor([[1, 2, 3, 4], [5, 0, 7, 0], [0, 1, 1, 1]])
    assert agreement(one, other) == {
        "equal_tokens": 9 / 12,
        "before_difference": 5 / 12,
        "equal_answers": 1,
        "answers": 3,
        "first_differences": [None, 1, 0],
    }


def test_whole_steps_decide_with_the_engine(folder: Path, ids: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    model = lte.accelerate_(load_any_model(str(folder)))
    plain = token_by_token(load_any_model(str(folder)), ids, 9, keep=True)
    for given in (None, plain.inputs):
        assert torch.equal(by_whole_steps(model, ids, 9, given).active, plain.active)
    plan_of = counting.decoder_plan

    def other_plan(model: Any) -> Any:
        plan = plan_of(model)
        plan.layers[1] = counting.replace(plan.layers[1], threshold=1e9)
        return plan

    # The engine's second layer switches nothing on; the prompt is not the engine's.
    monkeypatch.setattr(counting, "decoder_plan", other_plan)
    for given in (None, plain.inputs):
        active = by_whole_steps(model, ids, 9, given).active
        assert not active[:, 1, 9:].any()
        assert plain.active[:, 1, 9:].any()
        assert torch.equal(active[:, :, :9], plain.active[:, :, :9])
        assert torch.equal(active[:, 0], plain.active[:, 0])


@pytest.mark.parametrize("model_type", STEP_TYPES)
def test_windows_norms_and_fused_projections(model_type: str, ids: Tensor) -> None:
    model = step_model(model_type)
    alone = in_one_pass(model, ids, keep=True)
    runs = [token_by_token(model, ids, 9), in_one_pass(model, ids, batch=5, padding=PADDING)]
    lte.accelerate_(model)
    for run in (*runs, by_whole_steps(model, ids, 9), by_whole_steps(model, ids, 9, alone.inputs)):
        assert (run.active != alone.active).float().mean() <= 0.002
    assert 0.2 < alone.active.float().mean() < 0.8


def test_models_without_whole_steps_say_why() -> None:
    model = lte.accelerate_(tiny_sparse_model("gpt2"))
    with pytest.raises(NoStepsError, match="gpt2 models have no such step yet"):
        by_whole_steps(model, torch.ones(1, 4, dtype=torch.long), 2)


@pytest.mark.parametrize("model_type", ["gpt2", "opt", "gemma2", "phi", "qwen2"])
def test_families_read_the_same_in_every_way(model_type: str, ids: Tensor) -> None:
    model = tiny_sparse_model(model_type)
    alone = in_one_pass(model, ids, keep=True)
    for other in (
        in_one_pass(model, ids, batch=4),
        in_one_pass(model, ids, batch=4, padding=PADDING),
        in_one_pass(model, ids, given=alone.inputs),
        token_by_token(model, ids, 9),
    ):
        assert (other.active != alone.active).float().mean() <= 0.002
    answers = greedy_answers(model, ids[:, :9], 4)
    assert torch.equal(answers, greedy_answers(model, ids[:, :9], 4, batch=4, padding=PADDING))
    assert all(ffn.logits is None and not ffn.record_logits for ffn in lte.sparse_ffns(model).values())


def test_what_cannot_be_compared(tmp_path: Path, ids: Tensor) -> None:
    with pytest.raises(ValueError, match="prompts must be a whole number from 2, got prompts=1"):
        SteadinessSettings(prompts=1)
    tiny_dense_model().save_pretrained(tmp_path / "dense")
    with pytest.raises(ValueError, match="LTE model"):
        measure_steadiness(str(tmp_path / "dense"), ids, SETTINGS)
    with pytest.raises(ValueError, match="model must be a decoder, got LteT5"):
        counting.check_decoder(tiny_sparse_model("t5"))


def test_what_has_no_whole_steps_has_a_note(tmp_path: Path, ids: Tensor) -> None:
    tiny_sparse_model("gpt2").save_pretrained(tmp_path / "sparse")
    found = measure_steadiness(str(tmp_path / "sparse"), ids, SETTINGS)
    pair = pair_of(found, "whole_steps", "float32")
    assert pair["note"] == "not measured, as gpt2 models have no such step yet"
    assert pair["flips"] is pair["answers"] is None
    assert pair_of(found, "kernels", "float32")["flips"] <= 0.002


def test_an_encoder_is_refused() -> None:
    with pytest.raises(ValueError, match="model must predict the next token from those before it"):
        counting.check_decoder(tiny_sparse_model("bert"))
