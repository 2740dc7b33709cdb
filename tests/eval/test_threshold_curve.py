"""Curves over the threshold of tiny models: what is measured is what the model does, and goals are met."""

from __future__ import annotations

import copy
from pathlib import Path
from statistics import fmean
from typing import Any

import peft
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import lte
from lte.eval.cost import measured_cost
from lte.eval.perplexity import evaluate_model
from lte.eval.threshold_curve import measure_curve, prompts_of, time_curve
from lte.hf.sparsity_curve import SparsityCurve, SparsityGoal
from lte.methods.cats import CatsConfig
from tests.tiny_models import VOCAB, tiny_dense_model, tiny_sparse_model


def rows(seed: int, low: int = 3, high: int = VOCAB) -> list[dict[str, Tensor]]:
    ids = torch.randint(low, high, (16, 48), generator=torch.Generator().manual_seed(seed))
    return [{"input_ids": part, "labels": part} for part in ids.split(8)]


# Two kinds of text, on which the sparsities differ.
TEXTS = {"low": rows(1, 3, 20), "high": rows(2, 60, VOCAB)}


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_sparse_model(num_hidden_layers=3)


@pytest.fixture(scope="module")
def dense() -> Any:
    """Another model, so that ratios differ from 1, and rise and fall."""
    return tiny_dense_model(num_hidden_layers=3)


@pytest.fixture(scope="module")
def curve(model: Any, dense: Any) -> SparsityCurve:
    return measure_curve(model, TEXTS, dense=dense)


def test_every_point_is_what_the_model_does_there(model: Any, dense: Any, curve: SparsityCurve) -> None:
    assert len(curve.points) == 13, "thirteen sparsities, one of them about where the model is"
    assert curve.tokens == {"low": 768, "high": 768}
    for name, batches in TEXTS.items():
        quality, measured = evaluate_model(dense, batches, progress=False)
        assert curve.dense is not None
        assert measured is None
        assert curve.dense.nll_per_token[name] == quality.nll_per_token
    for point in curve.points[::4]:
        other = copy.deepcopy(model)
        for ffn in lte.sparse_ffns(other).values():
            ffn.set_threshold(point.threshold)
        for name, batches in TEXTS.items():
            quality, measured = evaluate_model(other, batches, progress=False)
            assert measured is not None
            assert point.texts[name].sparsity == measured.sparsity
            assert point.texts[name].nll_per_token == quality.nll_per_token
            assert point.texts[name].bytes_per_token == measured_cost(other, measured).bytes_per_token


def test_the_points_are_where_they_were_asked_for(curve: SparsityCurve) -> None:
    found = [point.sparsity for point in curve.points]
    assert found[0] == 0, "all experts on"
    for wanted, sparsity in zip([0.0, 0.02, 0.05, *(0.1 * n for n in range(1, 10)), 0.95], found, strict=True):
        assert sparsity == pytest.approx(wanted, abs=0.03)
    assert [point.threshold for point in curve.points] == sorted(point.threshold for point in curve.points)
    assert any(point.threshold == 0.5 for point in curve.points), "where it was trained"


def test_a_threshold_that_was_moved_by_hand_stays(model: Any) -> None:
    own = copy.deepcopy(model)
    for ffn in lte.sparse_ffns(own).values():
        ffn.set_threshold(0.6)
    found = measure_curve(own, TEXTS, sparsities=[0.5])
    assert any(point.threshold == pytest.approx(0.6) for point in found.points)
    assert all(ffn.threshold_logit == pytest.approx(0.405, abs=1e-3) for ffn in lte.sparse_ffns(own).values())


def test_interpolated_points_below_the_first_level_hold(curve: SparsityCurve, model: Any) -> None:
    for target in (0.03, 0.07):
        own = copy.deepcopy(model)
        own.config.lte_curve = curve.to_dict()
        lte.set_sparsity_(own, target)
        found = fmean(lte.measure_sparsity(own, batches).sparsity for batches in TEXTS.values())
        assert found == pytest.approx(target, abs=0.03)


def test_a_quality_that_every_expert_off_meets_loads_again(model: Any, tmp_path: Path) -> None:
    own = copy.deepcopy(model)
    dense = lte.densify_(copy.deepcopy(model))
    curve = lte.calibrate_curve_(own, TEXTS, goal=SparsityGoal(max_perplexity_ratio=1e9), dense=dense, sparsities=[0.5])
    assert curve.chosen is not None
    own.save_pretrained(tmp_path)
    assert AutoModelForCausalLM.from_pretrained(tmp_path).target_sparsity < 1


def test_it_leaves_the_model_as_it_was(model: Any) -> None:
    own = copy.deepcopy(model)
    measure_curve(own, TEXTS, sparsities=[0.4], goal=SparsityGoal(target_sparsity=0.7))
    assert [ffn.threshold_logit for ffn in lte.sparse_ffns(own).values()] == [0.0] * 3
    assert own.config.lte == model.config.lte
    assert own.config.lte_curve is None
    for name, tensor in model.state_dict().items():
        assert torch.equal(own.state_dict()[name], tensor)


@pytest.mark.parametrize("hold", ["mean", "each"])
@pytest.mark.parametrize("target", [0.25, 0.62])
def test_a_target_is_met_and_reloads(hold: Any, target: float, model: Any, tmp_path: Path) -> None:
    own = copy.deepcopy(model)
    goal = SparsityGoal(target_sparsity=target, hold=hold)
    found = lte.calibrate_curve_(own, TEXTS, goal=goal, sparsities=[0.2, 0.5, 0.8])
    assert found.chosen is not None
    assert not found.chosen.interpolated
    assert found.chosen.point in found.points
    assert len(found.points) <= 5, "tries are not kept"
    held = found.chosen.point.held_sparsity(hold)
    assert held == pytest.approx(target, abs=5e-3)
    misses = found.chosen.misses.values()
    assert (min(misses) if hold == "each" else sum(misses)) == pytest.approx(0, abs=1e-2)
    own.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    for name, batches in TEXTS.items():
        assert lte.measure_sparsity(loaded, batches).sparsity == found.chosen.point.texts[name].sparsity
    assert loaded.target_sparsity == target
    assert SparsityCurve.from_dict(loaded.config.lte_curve) == found
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), "weights and biases stay"
    # The folder's own way of meeting it goes on, and a point that meets it is not interpolated anew.
    again = AutoModelForCausalLM.from_pretrained(tmp_path, target_sparsity=held)
    assert again.config.lte["threshold"] == loaded.config.lte["threshold"]


def test_interpolated_points_are_near_what_is_measured_there(model: Any, curve: SparsityCurve, tmp_path: Path) -> None:
    own = copy.deepcopy(model)
    own.config.lte_curve = curve.to_dict()
    own.save_pretrained(tmp_path)
    for target in (0.15, 0.44, 0.66, 0.85):
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path, target_sparsity=target)
        measured = [lte.measure_sparsity(loaded, batches).sparsity for batches in TEXTS.values()]
        assert sum(measured) / 2 == pytest.approx(target, abs=0.01)


def test_the_sparsest_threshold_within_a_ratio(model: Any, dense: Any, curve: SparsityCurve) -> None:
    ratios = {point.threshold: curve.perplexity_ratio(point) for point in curve.points}
    limit = sorted(ratios.values())[len(ratios) // 2] + 1e-6  # type: ignore[type-var, operator]
    goal = SparsityGoal(max_perplexity_ratio=limit)
    own = copy.deepcopy(model)
    found = lte.calibrate_curve_(own, TEXTS, goal=goal, dense=dense)
    assert found.chosen is not None
    point = found.chosen.point
    ratio = found.perplexity_ratio(point)
    assert ratio is not None
    assert ratio <= limit
    within = [each.sparsity for each in found.points if found.perplexity_ratio(each) <= limit]  # type: ignore[operator]
    assert point.sparsity == max(within)
    assert own.config.lte["target_sparsity"] == point.sparsity
    assert own.config.lte["threshold"] == point.threshold


def test_a_ratio_that_none_meets_keeps_the_curve(model: Any, dense: Any) -> None:
    own = copy.deepcopy(model)
    with pytest.raises(ValueError, match="max_perplexity_ratio must be at least"):
        lte.calibrate_curve_(own, TEXTS, goal=SparsityGoal(max_perplexity_ratio=0.1), dense=dense, sparsities=[0.5])
    assert SparsityCurve.from_dict(own.config.lte_curve).chosen is None
    assert own.config.lte == model.config.lte


def test_strict_goals_lose_more_on_the_others(model: Any) -> None:
    found = {
        hold: measure_curve(model, TEXTS, goal=SparsityGoal(target_sparsity=0.5, hold=hold), sparsities=[0.5]).chosen
        for hold in ("mean", "each")
    }
    assert found["each"].point.threshold > found["mean"].point.threshold  # type: ignore[union-attr]
    assert min(found["mean"].misses.values()) < -0.005 < 0.005 < max(found["mean"].misses.values())  # type: ignore[union-attr]


def test_what_cannot_be_measured_says_so_first(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lte.eval.threshold_curve.evaluate_model", None)
    for network, arguments, message in [
        (tiny_dense_model(), {}, "model must be an LTE model, whose threshold can be moved, got a dense one"),
        (
            model,
            {"goal": SparsityGoal(max_perplexity_ratio=1.1)},
            "must have a dense model to compare with, got dense",
        ),
        (model, {"sparsities": [0.5, 1.0]}, r"sparsities must lie in \[0, 1\), got sparsities=1.0"),
    ]:
        with pytest.raises(ValueError, match=message):
            lte.calibrate_curve_(network, TEXTS, **arguments)
    with pytest.raises(ValueError, match="texts must hold at least one text with tokens, got none in empty"):
        lte.calibrate_curve_(model, {**TEXTS, "empty": []})
    with pytest.raises(ValueError, match=r"texts must hold at least one text with tokens, got none$"):
        lte.calibrate_curve_(model, {})
    other = lte.sparsify_(tiny_dense_model(), CatsConfig(), calibration=TEXTS["low"])
    with pytest.raises(ValueError, match="got one of the method cats"):
        lte.calibrate_curve_(other, TEXTS)


def test_times_of_all_points_and_of_the_dense_model(model: Any, dense: Any, curve: SparsityCurve) -> None:
    own = copy.deepcopy(model)
    lte.accelerate_(own)
    short = measure_curve(own, TEXTS, goal=SparsityGoal(target_sparsity=0.6), dense=dense, sparsities=[0.3])
    prompts = prompts_of(TEXTS, own, new_tokens=4)
    assert {name: tuple(ids.shape) for name, ids in prompts.items()} == {"low": (1, 48), "high": (1, 48)}
    timed = time_curve(own, short, prompts, dense=dense, new_tokens=4)
    assert all(point.ms_per_token is not None and point.ms_per_token > 0 for point in timed.points)
    assert timed.dense is not None
    assert timed.dense.ms_per_token is not None
    assert timed.chosen is not None
    assert timed.chosen.point in timed.points
    assert [ffn.threshold_logit for ffn in lte.sparse_ffns(own).values()] == [0.0] * 3
    assert time_curve(own, short, prompts, new_tokens=4).dense == short.dense, "no dense model, no time of it"


def test_prompts_need_room(model: Any) -> None:
    with pytest.raises(ValueError, match="model must have room for a prompt and 64 tokens to be timed, got max_posit"):
        prompts_of(TEXTS, model, new_tokens=64)


def test_adapters_around_a_model(model: Any) -> None:
    own = copy.deepcopy(model)
    plain = lte.calibrate_curve_(copy.deepcopy(own), TEXTS, sparsities=[0.5], goal=SparsityGoal(target_sparsity=0.6))
    wrapped: Any = peft.get_peft_model(own, peft.LoraConfig(target_modules=["q_proj"]))
    found = lte.calibrate_curve_(wrapped, TEXTS, sparsities=[0.5], goal=SparsityGoal(target_sparsity=0.6))
    # New adapters add nothing.
    assert [point.threshold for point in found.points] == pytest.approx([point.threshold for point in plain.points])
    assert [point.sparsity for point in found.points] == pytest.approx([point.sparsity for point in plain.points])
    assert own.config.lte_curve == found.to_dict()
    lte.set_sparsity_(wrapped, 0.55)
    assert own.config.lte["target_sparsity"] == 0.55
