"""The curve that a model remembers over its threshold: its file form, and the points that are picked from it."""

from __future__ import annotations

import copy
import json
import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import lte
from lte.hf.saved_config import rewrite_config
from lte.hf.sparsity_curve import (
    Choice,
    CurvePoint,
    DenseReference,
    SparsityCurve,
    SparsityGoal,
    TextPoint,
    choice_record,
    curve_of,
    describe_choice,
    threshold_of,
)
from lte.hf.stepping import has_engine
from lte.hf.threshold import set_threshold_, take_choice_
from lte.methods.cats import CatsConfig
from tests.tiny_models import VOCAB, tiny_dense_model, tiny_sparse_model

# threshold, (sparsity, nll) of `wiki` and of `code`
POINTS = [
    (threshold_of(-2.0), (0.2, 3.0), (0.1, 2.0)),
    (0.5, (0.5, 3.02), (0.3, 2.04)),
    (threshold_of(3.0), (0.8, 3.2), (0.7, 2.4)),
]


def point(threshold: float, wiki: tuple[float, float], code: tuple[float, float], **fields: Any) -> CurvePoint:
    texts = {
        name: TextPoint(sparsity=sparsity, nll_per_token=nll, bytes_per_token=1000 * (1 - sparsity))
        for name, (sparsity, nll) in {"wiki": wiki, "code": code}.items()
    }
    return CurvePoint(threshold=threshold, texts=texts, layer_sparsity=[wiki[0], code[0]], **fields)


def curve(**fields: Any) -> SparsityCurve:
    dense = DenseReference(model="base", nll_per_token={"wiki": 3.0, "code": 2.0}, bytes_per_token=1200.0)
    points = [point(*each, ms_per_token=10.0 - index) for index, each in enumerate(POINTS)]
    return SparsityCurve(**{"points": points, "tokens": {"wiki": 100, "code": 50}, "dense": dense, **fields})


def remembering(**fields: Any) -> Any:
    model = tiny_sparse_model()
    model.config.lte_curve = curve(**fields).to_dict()
    return model


class TestPicking:
    def test_a_measured_point_is_taken_as_it_is(self) -> None:
        found = curve().at_target(0.4)
        assert found.point == curve().points[1]
        assert not found.interpolated
        assert found.asked == {"target_sparsity": 0.4}
        assert found.misses == pytest.approx({"wiki": 0.1, "code": -0.1})

    def test_between_two_points_logits_are_interpolated(self) -> None:
        # 0.4 to 0.75, so 0.54 is two fifths of the way, and the logits go from 0 to 3.
        found = curve().at_target(0.54)
        assert found.interpolated
        assert found.point.logit == pytest.approx(1.2)
        assert found.point.sparsity == pytest.approx(0.54)
        assert found.point.texts["wiki"].sparsity == pytest.approx(0.62)
        assert found.point.texts["code"].nll_per_token == pytest.approx(2.04 + 0.4 * 0.36)
        assert found.point.bytes_per_token == pytest.approx(460)
        assert found.point.ms_per_token == pytest.approx(9 - 0.4)
        assert found.point.layer_sparsity == pytest.approx([0.62, 0.46])

    def test_each_text_meets_the_target_or_their_mean_does(self) -> None:
        one, other = curve().at_target(0.3, "each"), curve().at_target(0.3, "mean")
        assert one.point.threshold == 0.5
        assert one.misses == pytest.approx({"wiki": 0.2, "code": 0.0})
        assert other.point.threshold < 0.5
        assert min(other.misses.values()) < 0
        # What the curve was made with goes on.
        assert curve(hold="each").at_target(0.3) == one

    def test_the_sparsest_measured_point_within_a_ratio(self) -> None:
        ratios = [curve().perplexity_ratio(each) for each in curve().points]
        assert ratios == pytest.approx([1.0, math.exp(0.03), math.exp(0.3)])
        assert curve().within_ratio(1.05).point == curve().points[1]
        assert curve().within_ratio(1.05).target_sparsity == pytest.approx(0.4)
        # exp(0.04) on code.
        assert curve().within_ratio(1.035, "each").point == curve().points[0]
        assert curve().within_ratio(9).point == curve().points[2]

    @pytest.mark.parametrize(
        ("pick", "message"),
        [
            (lambda: curve().at_target(0.8), r"must lie on the curve .*from 0.150 to 0.750, got target_sparsity=0.8;"),
            (lambda: curve().at_target(0.05, "each"), r"from 0.100 to 0.700 on the text with the least, got"),
            (lambda: curve().at_target(1.0), r"target_sparsity must lie in \[0, 1\)"),
            (lambda: curve().at_target(0.5, "all"), "hold must be one of mean, each, got hold='all'"),
            (lambda: curve().within_ratio(0.9), "max_perplexity_ratio must be at least 1.0000, the best of the curve"),
            (lambda: curve().within_ratio(0.0), "max_perplexity_ratio must be a positive number"),
            (lambda: curve(dense=None).within_ratio(2), "must have a dense model to compare with, got a curve without"),
            (lambda: SparsityGoal(target_sparsity=0.5, max_perplexity_ratio=1.1), "must not both be given, got target"),
            (lambda: SparsityGoal(target_sparsity=1.5), r"target_sparsity must lie in \[0, 1\)"),
            (lambda: SparsityGoal(max_perplexity_ratio=-1.0), "max_perplexity_ratio must be a positive number"),
            (lambda: SparsityGoal(hold="none"), "hold must be one of mean, each"),
        ],
    )
    def test_what_cannot_be_picked_says_why(self, pick: Callable[[], Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            pick()


class TestForm:
    def test_it_goes_through_json(self) -> None:
        chosen = curve().at_target(0.54)
        whole = curve(chosen=chosen, settings={"dtype": "float32"}, hold="each")
        assert SparsityCurve.from_dict(json.loads(json.dumps(whole.to_dict()))) == whole
        plain = curve(dense=None)
        assert SparsityCurve.from_dict(json.loads(json.dumps(plain.to_dict()))) == plain

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"version": 2}, "written by a newer lte: it has version=2, this lte reads up to 1; install"),
            ({"points": []}, "must hold points of rising thresholds"),
            ({"points": None}, "lte_curve.points must be a list, got None"),
            ({"tokens": {"wiki": 100}}, "each with all texts"),
            ({"tokens": {"wiki": "many", "code": 1}}, "lte_curve.tokens must be a finite number, got 'many'"),
            ({"hold": "any"}, "hold must be one of mean, each"),
            (
                {"points": [{"threshold": 0.5}]},
                "lte_curve.points must hold the fields layer_sparsity, texts, threshold",
            ),
            ({"dense": {"model": "base"}}, "lte_curve.dense must hold the fields"),
            ({"chosen": {"asked": {}}}, "lte_curve.chosen must hold the fields"),
        ],
    )
    def test_damage_is_a_sentence(self, change: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            SparsityCurve.from_dict({**curve().to_dict(), **change})

    @pytest.mark.parametrize(
        ("name", "value", "message"),
        [
            ("threshold", 1.0, r"threshold must lie in \(0, 1\), got threshold=1.0"),
            ("threshold", None, "threshold must be a finite number, got None"),
            ("texts", {}, "texts must hold a text, got none"),
            ("layer_sparsity", "x", "layer_sparsity must be a list"),
            ("ms_per_token", True, "ms_per_token must be a finite number, got True"),
        ],
    )
    def test_damage_of_a_point_is_a_sentence(self, name: str, value: Any, message: str) -> None:
        data = curve().to_dict()
        data["points"][1][name] = value
        with pytest.raises(ValueError, match=message):
            SparsityCurve.from_dict(data)

    def test_thresholds_must_rise(self) -> None:
        with pytest.raises(ValueError, match="must hold points of rising thresholds"):
            SparsityCurve.from_dict(curve(points=curve().points[::-1]).to_dict())

    def test_what_a_later_version_added_is_left_out(self) -> None:
        data = {**curve().to_dict(), "more": 1}
        data["points"][0]["texts"]["wiki"]["more"] = 2
        assert SparsityCurve.from_dict(data) == curve()

    def test_a_folder_with_a_damaged_curve_runs_where_it_is(self, tmp_path: Path) -> None:
        remembering().save_pretrained(tmp_path)
        rewrite_config(tmp_path, {"lte_curve": {"points": []}})
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
        with pytest.raises(ValueError, match="lte_curve must hold the fields points, tokens, got points; measure it"):
            lte.set_sparsity_(loaded, 0.5)
        rewrite_config(tmp_path, {"lte_curve": [1]})
        with pytest.raises(ValueError, match=f"{re.escape(str(tmp_path))}.*lte_curve must hold fields or be null, got"):
            AutoConfig.from_pretrained(tmp_path)


class TestModels:
    def test_a_folder_loads_at_a_target(self, tmp_path: Path) -> None:
        model = remembering()
        model.save_pretrained(tmp_path / "a")
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "a", target_sparsity=0.54)
        wanted = curve().at_target(0.54)
        assert all(ffn.threshold_logit == pytest.approx(1.2) for ffn in lte.sparse_ffns(loaded).values())
        assert loaded.config.lte["threshold"] == wanted.point.threshold
        assert loaded.target_sparsity == 0.54
        assert SparsityCurve.from_dict(loaded.config.lte_curve).chosen == wanted
        assert loaded.config.lte_measurement["interpolated"]
        assert loaded.config.lte_measurement["active_fraction"] == pytest.approx([0.38, 0.54])
        # Saved again, it is what it was loaded as; the weights are those of the folder.
        loaded.save_pretrained(tmp_path / "b")
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "b")
        assert again.config.lte == loaded.config.lte
        assert again.config.lte_curve == loaded.config.lte_curve
        ids = torch.arange(3, 40)[None]
        assert torch.equal(again(ids).logits, loaded(ids).logits)
        assert not torch.equal(again(ids).logits, model(ids).logits)
        for name, tensor in model.state_dict().items():
            assert torch.equal(again.state_dict()[name], tensor), name

    def test_what_was_said_of_the_base_model_stays(self) -> None:
        model = remembering()
        model.config.lte_measurement = {"sparsity": 0.4, "tokens": 9, "split": "validation", "model": "owner/base"}
        lte.set_sparsity_(model, 0.4)
        assert model.config.lte_measurement["model"] == "owner/base"
        assert model.config.lte_measurement["sparsity"] == pytest.approx(0.4)
        assert not model.config.lte_measurement["interpolated"]

    def test_by_the_ratio_of_perplexities(self) -> None:
        model = lte.set_sparsity_(remembering(), max_perplexity_ratio=1.05)
        assert model.config.lte["threshold"] == 0.5
        assert model.config.lte["target_sparsity"] == pytest.approx(0.4)
        assert choice_record(model.config) == {
            "asked": {"max_perplexity_ratio": 1.05},
            "hold": "mean",
            "threshold": 0.5,
            "interpolated": False,
            "sparsity": pytest.approx(0.4),
            "text_sparsity": {"wiki": 0.5, "code": 0.3},
            "perplexity_ratio": pytest.approx(math.exp(0.03)),
        }
        assert "for max-perplexity-ratio 1.05 on the mean of the texts, a measured point" in describe_choice(
            model.config
        )

    def test_nothing_picked_says_nothing(self) -> None:
        assert choice_record(remembering().config) is None
        assert describe_choice(tiny_dense_model().config) is None

    @pytest.mark.parametrize("arguments", [{}, {"target_sparsity": 0.5, "max_perplexity_ratio": 1.1}])
    def test_one_of_both_must_be_given(self, arguments: dict[str, float]) -> None:
        with pytest.raises(ValueError, match="target_sparsity or max_perplexity_ratio must be given, one of them, got"):
            lte.set_sparsity_(remembering(), **arguments)

    def test_models_without_a_curve_say_so(self, tmp_path: Path) -> None:
        tiny_sparse_model().save_pretrained(tmp_path / "none")
        with pytest.raises(ValueError, match="model that remembers its curve over the threshold, got one without; mea"):
            AutoModelForCausalLM.from_pretrained(tmp_path / "none", target_sparsity=0.5)
        remembering().save_pretrained(tmp_path / "short")
        with pytest.raises(ValueError, match="must lie on the curve that the model remembers"):
            AutoModelForCausalLM.from_pretrained(tmp_path / "short", target_sparsity=0.9)
        other = tiny_dense_model()
        batches = [{"input_ids": torch.arange(3, VOCAB)[None, :60]}]
        lte.sparsify_(other, CatsConfig(), calibration=batches).save_pretrained(tmp_path / "cats")
        with pytest.raises(ValueError, match="with an LTE model, whose threshold it moves, got one of the method cats"):
            AutoModelForCausalLM.from_pretrained(tmp_path / "cats", target_sparsity=0.5)
        with pytest.raises(ValueError, match="got a dense one; leave it out"):
            curve_of(tiny_dense_model().config)

    def test_the_weights_are_not_read_for_an_error(self, tmp_path: Path) -> None:
        remembering().save_pretrained(tmp_path)
        (tmp_path / "model.safetensors").write_bytes(b"damaged")
        with pytest.raises(ValueError, match="must lie on the curve"):
            AutoModelForCausalLM.from_pretrained(tmp_path, target_sparsity=0.9)

    @pytest.mark.parametrize("change", ["calibrate_", "densify_", "sparsify_"])
    def test_other_routers_forget_the_curve(self, change: str) -> None:
        model = remembering()
        if change == "calibrate_":
            rows = torch.randint(3, VOCAB, (4, 40))
            lte.calibrate_(model, [{"input_ids": rows, "labels": rows}])
            assert model.config.lte_curve is None
            return
        lte.densify_(model)
        assert not hasattr(model.config, "lte_curve")
        if change == "sparsify_":
            lte.sparsify_(model, lte.LteConfig(expert_size=8, grouping="random"))
            assert model.config.lte_curve is None

    @pytest.mark.parametrize("accelerated", [False, True])
    def test_a_moved_threshold_is_that_of_a_model_made_with_it(self, accelerated: bool) -> None:
        model = tiny_sparse_model()
        other = copy.deepcopy(model)
        if accelerated:
            lte.accelerate_(model)
            lte.accelerate_(other)
        ids = torch.randint(3, VOCAB, (2, 9))
        with torch.no_grad():
            before = model(ids).logits
            set_threshold_(model, 0.8, [0.5, 0.6])
            for ffn in lte.sparse_ffns(other).values():
                ffn.router.bias -= math.log(4)
            torch.testing.assert_close(model(ids).logits, other(ids).logits)
            assert not torch.allclose(model(ids).logits, before)
            set_threshold_(model, 0.5)
            assert torch.equal(model(ids).logits, before)
        if accelerated:
            fractions = [ffn.acceleration.use.active for ffn in lte.sparse_ffns(model).values()]
            assert fractions == pytest.approx([0.5, 0.4])

    def test_whole_decoding_steps_take_the_moved_threshold(self) -> None:
        model = lte.accelerate_(tiny_sparse_model())
        other = lte.accelerate_(set_threshold_(tiny_sparse_model(), 0.9))
        settings = {"max_new_tokens": 12, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
        ids = torch.arange(3, 9)[None]
        before = model.generate(ids, **settings)
        assert has_engine(model)
        set_threshold_(model, 0.9)
        moved, wanted = model.generate(ids, **settings), other.generate(ids, **settings)
        assert has_engine(model)
        assert all(torch.equal(*pair) for pair in zip(moved.logits, wanted.logits, strict=True))
        assert not torch.equal(moved.logits[1], before.logits[1])

    @pytest.mark.parametrize("threshold", [0.0, 1.0, 1.2])
    def test_a_threshold_that_is_none(self, threshold: float) -> None:
        with pytest.raises(ValueError, match=r"threshold must lie in \(0, 1\), got threshold="):
            set_threshold_(tiny_sparse_model(), threshold)

    def test_the_card_shows_the_curve(self, tmp_path: Path) -> None:
        model = remembering(settings={"hardware": "a machine"})
        choice = Choice(asked={"target_sparsity": 0.54}, hold="mean", point=curve().points[1], interpolated=False)
        take_choice_(model, curve(settings={"hardware": "a machine"}), replace(choice))
        model.save_pretrained(tmp_path / "mine")
        text = (tmp_path / "mine" / "README.md").read_text()
        assert "on 150 tokens of wiki, code, timed on a machine:" in text
        assert f"| 40.0% | {math.exp(2.53):.4g} | {math.exp(0.03):.4g} | 0.0006 | 9 |" in text
        assert f"| dense | {math.exp(2.5):.4g} | 1 | 0.0012 |  |" in text
        assert "for target-sparsity 0.54" in text
        assert "| target sparsity | 54.0% |" in text


class TestSavedConfig:
    def test_only_its_fields_and_its_checksum_change(self, tmp_path: Path) -> None:
        tiny_sparse_model().save_pretrained(tmp_path)
        before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
        fields = json.loads(before["config.json"])
        rewrite_config(tmp_path, {})
        assert (tmp_path / "config.json").read_bytes() == before["config.json"]
        rewrite_config(tmp_path, {"lte_measurement": {"sparsity": 0.25}})
        changed = json.loads((tmp_path / "config.json").read_text())
        assert changed == {**fields, "lte_measurement": {"sparsity": 0.25}}
        assert lte.verify(tmp_path) == []
        now = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
        assert {name for name in now if now[name] != before.get(name)} == {"config.json", "lte_checksums.json"}

    def test_a_folder_without_checksums_gets_none(self, tmp_path: Path) -> None:
        tiny_sparse_model().save_pretrained(tmp_path)
        (tmp_path / "lte_checksums.json").unlink()
        rewrite_config(tmp_path, {"lte_measurement": None})
        assert not (tmp_path / "lte_checksums.json").exists()

    def test_a_write_that_fails_leaves_the_config(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        tiny_sparse_model().save_pretrained(tmp_path)
        before = (tmp_path / "config.json").read_bytes()

        def full(self: Path, *arguments: Any, **settings: Any) -> int:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(Path, "write_text", full)
        with pytest.raises(OSError, match=r"config.json could not be written .*make room there"):
            rewrite_config(tmp_path, {"lte_measurement": None})
        monkeypatch.undo()
        assert (tmp_path / "config.json").read_bytes() == before
        assert lte.verify(tmp_path) == []
