"""`lte calibrate`, and the commands that run a folder at another point of its curve."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from pydoc_data import topics
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

import lte
from lte.eval.models import save_folder
from lte.hf.dense import load_tokenizer
from lte.hf.saved_config import rewrite_config
from lte.hf.sparsity_curve import SparsityCurve
from lte.methods.cats import CatsConfig
from tests.cli.conftest import SHORT, save_tiny_model
from tests.hf.gguf_files import tiny_llama, train_tokenizer, write_gguf
from tests.tiny_models import EXPERT_SIZE, randomise_routers_, tiny_sparse_model

FLAGS = ["--sequence-length", "64", "--max-tokens", "1024", "--sparsities", "0,0.3,0.6,0.9", "--kernels", "off"]
QUICK = [*FLAGS, "--no-time"]


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two kinds: help texts, and numbers."""
    folder = tmp_path_factory.mktemp("texts")
    (folder / "help.txt").write_text("\n".join(list(topics.topics.values())[:5]), encoding="utf-8")
    rows = [json.dumps({"text": f"{n} {n * n} {n**3}"}) for n in range(600)]
    (folder / "numbers.jsonl").write_text("\n".join(rows), encoding="utf-8")
    return [folder / "help.txt", folder / "numbers.jsonl"]


@pytest.fixture
def given(texts: list[Path]) -> list[Any]:
    return [part for text in texts for part in ("--texts", text)]


@pytest.fixture(scope="module")
def made(dense_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An LTE folder with random routers."""
    model = AutoModelForCausalLM.from_pretrained(dense_folder)
    lte.sparsify_(model, lte.LteConfig(expert_size=EXPERT_SIZE, grouping="random"))
    folder = tmp_path_factory.mktemp("made") / "sparse"
    save_folder(randomise_routers_(model), load_tokenizer(dense_folder), folder)
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "sparse"))


@pytest.fixture(scope="module")
def with_curve(
    made: Path, texts: list[Path], run: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    folder = Path(shutil.copytree(made, tmp_path_factory.mktemp("curve") / "sparse"))
    flags = [part for text in texts for part in ("--texts", text)]
    assert run("calibrate", folder, *flags, *QUICK).exit_code == 0
    return folder


@pytest.fixture
def remembering(with_curve: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(with_curve, tmp_path / "remembering"))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def curve_in(folder: Path) -> SparsityCurve:
    return SparsityCurve.from_dict(json.loads((folder / "config.json").read_text())["lte_curve"])


class TestCurve:
    def test_only_the_curve(self, run: Callable[..., Any], folder: Path, given: list[Any], tmp_path: Path) -> None:
        before, settings = contents(folder), json.loads((folder / "config.json").read_text())
        result = run("calibrate", folder, *given, *QUICK, "--json", tmp_path / "curve.json")
        assert result.exit_code == 0, result.output
        after = contents(folder)
        changed = {name for name in after if after[name] != before.get(name)}
        assert changed == {"config.json", "lte_checksums.json", "README.md"}
        assert lte.verify(folder) == []
        now = json.loads(after["config.json"])
        curve = curve_in(folder)
        assert now == {**settings, "lte_curve": curve.to_dict()}
        assert len(curve.points) == 5
        assert curve.chosen is None
        assert curve.dense is None
        assert curve.settings["dtype"] == "float32"
        assert set(curve.tokens) == {"help.txt", "numbers.jsonl"}
        assert all(0 < count <= 1024 for count in curve.tokens.values())
        assert "The threshold stays where it was." in result.stdout
        # Where it is now, against the target that it has.
        for name in curve.tokens:
            assert f"{name}: " in result.stdout
        assert "points of 50%" in result.stdout
        written = json.loads((tmp_path / "curve.json").read_text())
        assert written["curve"] == curve.to_dict()
        assert [row["sparsity"] for row in written["rows"]] == [point.sparsity for point in curve.points]

    def test_a_target_is_set_and_what_each_text_misses_is_said(
        self, run: Callable[..., Any], folder: Path, given: list[Any], dense_folder: Path
    ) -> None:
        weights = (folder / "model.safetensors").stat().st_mtime_ns
        result = run("calibrate", folder, *given, *QUICK, "--target-sparsity", "0.62", "--dense", dense_folder)
        assert result.exit_code == 0, result.output
        assert (folder / "model.safetensors").stat().st_mtime_ns == weights
        assert lte.verify(folder) == []
        curve = curve_in(folder)
        assert curve.chosen is not None
        assert curve.chosen.point.sparsity == pytest.approx(0.62, abs=5e-3)
        for name, miss in curve.chosen.misses.items():
            text = curve.chosen.point.texts[name]
            assert f"{name}: {100 * text.sparsity:.2f}%, {100 * miss:+.2f} points of 62%" in result.stdout
        loaded = AutoModelForCausalLM.from_pretrained(folder)
        assert loaded.target_sparsity == 0.62
        assert loaded.config.lte["threshold"] == curve.chosen.point.threshold
        assert curve.dense is not None
        assert curve.perplexity_ratio(curve.points[0]) == pytest.approx(1), "all experts on is the dense model"
        card = (folder / "README.md").read_text()
        assert "for target-sparsity 0.62 on the mean of the texts" in card
        assert "| target sparsity | 62.0% |" in card

    def test_the_worst_text_holds_it(self, run: Callable[..., Any], folder: Path, given: list[Any]) -> None:
        result = run("calibrate", folder, *given, *QUICK, "--target-sparsity", "0.62", "--hold", "each")
        assert result.exit_code == 0, result.output
        curve = curve_in(folder)
        assert curve.hold == "each"
        assert curve.chosen is not None
        assert min(curve.chosen.misses.values()) == pytest.approx(0, abs=5e-3)
        assert max(curve.chosen.misses.values()) > 0.002

    def test_times_are_those_of_generate(
        self, run: Callable[..., Any], folder: Path, given: list[Any], dense_folder: Path
    ) -> None:
        flags = [*FLAGS[:-2], "--sparsities", "0.5", "--dense", dense_folder]
        result = run("calibrate", folder, *given, *flags)
        assert result.exit_code == 0, result.output
        curve = curve_in(folder)
        assert all(point.ms_per_token for point in curve.points)
        assert curve.dense is not None
        assert curve.dense.ms_per_token
        assert "ms per token" in result.stdout

    def test_a_ratio_of_perplexities(
        self, run: Callable[..., Any], folder: Path, given: list[Any], dense_folder: Path
    ) -> None:
        result = run("calibrate", folder, *given, *QUICK, "--max-perplexity-ratio", "1.02", "--dense", dense_folder)
        assert result.exit_code == 0, result.output
        curve = curve_in(folder)
        assert curve.chosen is not None
        ratio = curve.perplexity_ratio(curve.chosen.point)
        assert ratio is not None
        assert ratio <= 1.02
        sparser = [point for point in curve.points if point.sparsity > curve.chosen.point.sparsity]
        assert all(curve.perplexity_ratio(point) > 1.02 for point in sparser)  # type: ignore[operator]
        assert AutoModelForCausalLM.from_pretrained(folder).target_sparsity == curve.chosen.point.sparsity

    def test_a_ratio_that_none_meets_keeps_the_curve_and_the_threshold(
        self, run: Callable[..., Any], folder: Path, given: list[Any], dense_folder: Path
    ) -> None:
        result = run("calibrate", folder, *given, *QUICK, "--max-perplexity-ratio", "0.01", "--dense", dense_folder)
        assert result.exit_code == 1
        assert "max_perplexity_ratio must be at least" in result.stderr
        assert curve_in(folder).chosen is None
        assert AutoModelForCausalLM.from_pretrained(folder).config.lte["threshold"] == 0.5

    def test_the_dense_model_that_the_folder_names(
        self, run: Callable[..., Any], given: list[Any], trained: Any, dense_folder: Path, tmp_path: Path
    ) -> None:
        assert lte.verify(trained[0]) == []
        folder = Path(shutil.copytree(trained[0], tmp_path / "trained"))
        result = run("calibrate", folder, *given, *QUICK, "--max-perplexity-ratio", "2")
        assert result.exit_code == 0, result.output
        curve = curve_in(folder)
        assert curve.dense is not None
        assert curve.dense.model == str(dense_folder)
        assert json.loads((folder / "config.json").read_text())["lte_measurement"]["model"] == str(dense_folder)

    def test_prompts_count_if_that_is_asked_for(self, run: Callable[..., Any], folder: Path, tmp_path: Path) -> None:
        rows = [json.dumps({"prompt": f"{n} times {n} is ", "completion": f"{n * n}"}) for n in range(200)]
        (tmp_path / "sums.jsonl").write_text("\n".join(rows))
        flags = ["--texts", tmp_path / "sums.jsonl", *QUICK]
        found = []
        for more in ([], ["--count-prompts"]):
            assert run("calibrate", folder, *flags, *more).exit_code == 0
            found.append(curve_in(folder))
        alone, counted = found
        assert counted.tokens["sums.jsonl"] > 1.5 * alone.tokens["sums.jsonl"]
        assert counted.settings["count_prompts"]
        others = {point.threshold: point for point in counted.points}
        both = [(point, others[point.threshold]) for point in alone.points if point.threshold in others]
        assert both, "where the model is, at least"
        for one, other in both:
            assert one.nll_per_token == other.nll_per_token, "the quality is that of answers"
            assert one.sparsity != other.sparsity or one.sparsity == 0
        assert alone.points[0].nll_per_token == counted.points[0].nll_per_token

    def test_merged_adapters(
        self, run: Callable[..., Any], given: list[Any], dense_folder: Path, tmp_path: Path
    ) -> None:
        folder = tmp_path / "merged"
        result = run("train", "--model", dense_folder, "--output", folder, *SHORT, "--lora-rank", "4")
        assert result.exit_code == 0, result.output
        result = run("calibrate", folder, *given, *QUICK, "--target-sparsity", "0.55")
        assert result.exit_code == 0, result.output
        chosen = curve_in(folder).chosen
        assert chosen is not None
        loaded = AutoModelForCausalLM.from_pretrained(folder)
        rows = [topics.topics["with"]]
        wanted = lte.measure_sparsity(loaded, rows, tokenizer=load_tokenizer(folder)).sparsity
        again = AutoModelForCausalLM.from_pretrained(folder, target_sparsity=chosen.point.sparsity)
        assert lte.measure_sparsity(again, rows, tokenizer=load_tokenizer(folder)).sparsity == wanted


class TestRefusals:
    """All of them before anything is loaded or written."""

    def refused(self, run: Callable[..., Any], message: str, *arguments: Any) -> None:
        result = run("calibrate", *arguments)
        assert result.exit_code == 1, result.output
        assert message in result.stderr
        assert "sparsity" not in result.stdout

    def test_other_models(self, run: Callable[..., Any], dense_folder: Path, given: list[Any], tmp_path: Path) -> None:
        rule = "model must be a folder of an LTE model on this machine, whose threshold can be moved, got"
        self.refused(run, f"{rule} {dense_folder}, a dense one; `lte train` makes it sparse", dense_folder, *given)
        tokenizer = train_tokenizer()
        gguf = tmp_path / "model.gguf"
        write_gguf(gguf, tiny_llama(tokenizer.get_vocab_size()), tokenizer)
        self.refused(run, f"{rule} the GGUF file {gguf}, which holds a dense model", gguf, *given)
        self.refused(run, f"{rule} owner/name; download it", "owner/name", *given)
        cats = AutoModelForCausalLM.from_pretrained(dense_folder)
        batch = {"input_ids": load_tokenizer(dense_folder)(topics.topics["with"], return_tensors="pt")["input_ids"]}
        lte.sparsify_(cats, CatsConfig(), calibration=[{"input_ids": batch["input_ids"][:, :60]}])
        cats.save_pretrained(tmp_path / "cats")
        self.refused(run, "of the method cats; `lte.calibrate_` sets what that", tmp_path / "cats", *given)
        self.refused(run, "which does not exist", tmp_path / "no" / "such", *given)

    @pytest.mark.parametrize(
        ("flags", "message"),
        [
            (["--target-sparsity", "1"], "target_sparsity must lie in [0, 1), got target_sparsity=1.0"),
            (["--target-sparsity", "0.5", "--max-perplexity-ratio", "1.1"], "must not both be given"),
            (["--max-perplexity-ratio", "0"], "max_perplexity_ratio must be a positive number"),
            (["--hold", "all"], "hold must be one of mean, each, got hold='all'"),
            (["--sparsities", "0.5,x"], "sparsities must be numbers with commas between them, got sparsities=0.5,x"),
            (["--sparsities", "1.5"], "sparsities must lie in [0, 1), got sparsities=1.5"),
            (["--sparsities", ","], "sparsities must name at least one, got sparsities=','"),
            (["--dtype", "float8"], "dtype must be one of"),
            (["--kernels", "on"], "kernels must be one of"),
            (["--max-perplexity-ratio", "1.1"], "must have a dense model to compare with, and the folder names none"),
            (["--dense", "/no/such"], "dense must be a hub name, folder or GGUF file, got /no/such"),
            (["--texts", "/no/such.txt"], "data must be an existing file, glob or hub data set, got /no/such.txt"),
            (["--sequence-length", "1"], "sequence_length must be at least 2"),
        ],
    )
    def test_flags(
        self, flags: list[str], message: str, run: Callable[..., Any], made: Path, given: list[Any], monkeypatch: Any
    ) -> None:
        monkeypatch.setattr("lte.eval.models.load_any_model", None)
        before = contents(made)
        self.refused(run, message, made, *given, *flags)
        assert contents(made) == before

    def test_a_folder_that_cannot_be_written(
        self, run: Callable[..., Any], made: Path, given: list[Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("lte.cli.calibrate.os.access", lambda path, mode: False)
        self.refused(run, f"got {made}, in which nothing can be written; copy it", made, *given)

    def test_a_text_twice(self, run: Callable[..., Any], made: Path, texts: list[Path]) -> None:
        self.refused(run, f"texts must each be given once, got {texts[0]} twice", made, *["--texts", texts[0]] * 2)

    def test_a_sparse_model_as_the_dense_one(self, run: Callable[..., Any], made: Path, given: list[Any]) -> None:
        self.refused(run, "dense must be a dense model, got dense=", made, *given, "--dense", made)

    def test_another_tokenizer(self, run: Callable[..., Any], made: Path, given: list[Any], tmp_path: Path) -> None:
        other = save_tiny_model(tmp_path / "other")
        found = json.loads((other / "tokenizer.json").read_text())
        found["model"]["merges"] = []
        (other / "tokenizer.json").write_text(json.dumps(found))
        self.refused(run, "dense must read the same tokens as", made, *given, *QUICK, "--dense", other)

    def test_nothing_to_do(self, run: Callable[..., Any], made: Path) -> None:
        self.refused(run, "--texts FILE must be given to measure the curve, or a target to pick from it", made)
        self.refused(run, "must be given with a model that remembers its curve", made, "--target-sparsity", "0.5")
        flags = ["--target-sparsity", "0.5", "--kind", "text"]
        self.refused(run, "--kind must be given with --texts, got none", made, *flags)
        for flags in (["--dense", "x"], ["--max-tokens", "16384"], ["--no-time"], ["--dtype", "bfloat16"]):
            name = flags[0].replace("--no-", "--")
            self.refused(run, f"{name} must be given with --texts", made, "--target-sparsity", "0.5", *flags)

    def test_a_model_that_predicts_no_tokens(self, run: Callable[..., Any], given: list[Any], tmp_path: Path) -> None:
        tiny_sparse_model("bert").save_pretrained(tmp_path)
        self.refused(run, "model must predict the next token", tmp_path, *given)


class TestRemembered:
    def test_another_point_without_texts(self, run: Callable[..., Any], remembering: Path) -> None:
        weights = (remembering / "model.safetensors").read_bytes()
        result = run("calibrate", remembering, "--target-sparsity", "0.45")
        assert result.exit_code == 0, result.output
        chosen = curve_in(remembering).chosen
        assert chosen is not None
        assert chosen.interpolated
        assert "interpolated between measured points; asked for was target-sparsity 0.45" in result.stdout
        assert f"* {chosen.point.logit:.2f}" in result.stdout
        assert (remembering / "model.safetensors").read_bytes() == weights
        assert lte.verify(remembering) == []
        loaded = AutoModelForCausalLM.from_pretrained(remembering)
        assert loaded.config.lte["threshold"] == chosen.point.threshold
        assert loaded.target_sparsity == 0.45
        assert "(interpolated on the curve below)" in (remembering / "README.md").read_text()

    def test_outside_of_the_curve(self, run: Callable[..., Any], remembering: Path) -> None:
        before = contents(remembering)
        result = run("calibrate", remembering, "--target-sparsity", "0.99")
        assert result.exit_code == 1
        assert "target_sparsity must lie on the curve that the model remembers" in result.stderr
        assert contents(remembering) == before

    def test_a_damaged_curve_is_measured_anew(
        self, run: Callable[..., Any], remembering: Path, given: list[Any]
    ) -> None:
        rewrite_config(remembering, {"lte_curve": {"points": []}})
        result = run("inspect", remembering)
        assert result.exit_code == 0
        assert "This lte cannot read the curve over the threshold" in result.stdout
        result = run("calibrate", remembering, *given, *QUICK)
        assert result.exit_code == 0, result.output
        assert len(curve_in(remembering).points) == 5

    def test_inspect_shows_it(self, run: Callable[..., Any], remembering: Path, tmp_path: Path) -> None:
        assert run("calibrate", remembering, "--target-sparsity", "0.45").exit_code == 0
        result = run("inspect", remembering, "--json", tmp_path / "found.json")
        assert result.exit_code == 0, result.output
        assert "over the threshold, on the texts of `lte calibrate`" in result.stdout
        assert "for target-sparsity 0.45 on the mean of the texts, interpolated on the model's curve" in result.stdout
        assert "interpolated on its curve" in result.stdout
        found = json.loads((tmp_path / "found.json").read_text())
        assert SparsityCurve.from_dict(found["curve"]) == curve_in(remembering)

    def test_eval_runs_at_a_target(
        self, run: Callable[..., Any], remembering: Path, texts: list[Path], tmp_path: Path
    ) -> None:
        flags = ["--train", texts[1], "--sequence-length", "64", "--max-validation-tokens", "512", "--kernels", "off"]
        result = run("eval", remembering, *flags, "--target-sparsity", "0.45", "--json", tmp_path / "eval.json")
        assert result.exit_code == 0, result.output
        assert "target 45%" in result.stdout
        assert "for target-sparsity 0.45" in result.stderr
        record = json.loads((tmp_path / "eval.json").read_text())
        assert record["target_sparsity"] == 0.45
        choice = record["config"]["threshold_choice"]
        assert choice["asked"] == {"target_sparsity": 0.45}
        assert record["method_config"]["threshold"] == choice["threshold"]
        assert record["measurement"]["threshold"] == pytest.approx(choice["threshold"])
        plain = run("eval", remembering, *flags, "--json", tmp_path / "plain.json")
        assert plain.exit_code == 0
        found = json.loads((tmp_path / "plain.json").read_text())
        assert found["sparsity"] != record["sparsity"]
        assert "threshold_choice" not in found["config"]

    def test_generate_runs_at_a_target(self, run: Callable[..., Any], remembering: Path) -> None:
        result = run("generate", remembering, "--prompt", "with", "--max-new-tokens", 4, "--target-sparsity", "0.85")
        assert result.exit_code == 0, result.output
        assert "for target-sparsity 0.85" in result.stderr

    def test_bench_runs_at_a_target(self, run: Callable[..., Any], remembering: Path, tmp_path: Path) -> None:
        flags = ["--quick", "--benchmarks", "ffn", "--sparsities", "own", "--context-length", "64"]
        result = run("bench", remembering, *flags, "--target-sparsity", "0.85", "--output", tmp_path / "bench")
        assert result.exit_code == 0, result.output
        header = json.loads((tmp_path / "bench.json").read_text())
        assert header["threshold_choice"]["asked"] == {"target_sparsity": 0.85}

    @pytest.mark.parametrize("command", ["eval", "generate", "bench"])
    def test_targets_that_cannot_be_met(
        self,
        command: str,
        run: Callable[..., Any],
        made: Path,
        remembering: Path,
        dense_folder: Path,
        texts: list[Path],
    ) -> None:
        own = {"eval": ["--train", texts[1]], "generate": ["--prompt", "a"], "bench": ["--quick"]}[command]
        for folder, target, message in [
            (made, "0.5", "target_sparsity must be given with a model that remembers its curve"),
            (remembering, "0.99", "target_sparsity must lie on the curve that the model remembers"),
            (
                dense_folder,
                "0.5",
                "target_sparsity must be given with an LTE model, whose threshold it moves, got a",
            ),
            (remembering, "1.5", "target_sparsity must lie in [0, 1)"),
        ]:
            result = run(command, folder, *own, "--target-sparsity", target)
            assert result.exit_code == 1
            assert message in result.stderr

    def test_bench_of_a_shape_has_no_curve(self, run: Callable[..., Any]) -> None:
        result = run("bench", "--target-sparsity", "0.5")
        assert result.exit_code == 1
        assert "target_sparsity must be given with MODEL, got target_sparsity=0.5" in result.stderr
