"""`lte eval`, `lte generate` and `lte inspect` on a dense and a trained sparse folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import lte
from lte.config import GFLOP
from lte.eval.flops import count_linear_weights
from lte.eval.models import save_folder
from lte.hf.dense import load_dense_model, load_tokenizer
from lte.methods.cats import CatsConfig
from lte.methods.deja_vu import DejaVuConfig
from lte.methods.wanda import WandaConfig
from tests.cli.conftest import SHORT, VOCAB_SIZE
from tests.tiny_models import tiny_dense_model, tiny_sparse_model

DATA = [*SHORT[:2], *SHORT[4:6]]


class TestEval:
    def test_it_repeats_the_numbers_of_training(self, run: Callable[..., Any], trained: Any, tmp_path: Path) -> None:
        file = tmp_path / "eval.json"
        result = run("eval", trained[0], *DATA, "--batch-size", 4, "--json", file)
        assert result.exit_code == 0, result.output
        record = json.loads(file.read_text())
        after_training = json.loads((trained[0] / "result.json").read_text())
        for name in ("value", "sparsity", "flops_per_token", "bytes_per_token"):
            assert record[name] == pytest.approx(after_training[name], rel=1e-6), name
        assert f"{record['value']:.3f}" in result.output
        assert "target 50%" in result.output

    def test_a_dense_model(self, run: Callable[..., Any], dense_folder: Path, tmp_path: Path) -> None:
        result = run("eval", dense_folder, *DATA, "--json", tmp_path / "eval.json")
        assert result.exit_code == 0, result.output
        record = json.loads((tmp_path / "eval.json").read_text())
        assert record["method"] == "dense"
        assert record["sparsity"] == 0
        assert "dense model" in result.output

    def test_an_unknown_dtype(self, run: Callable[..., Any], dense_folder: Path) -> None:
        result = run("eval", dense_folder, *DATA, "--dtype", "bfloat61")
        assert result.exit_code == 1
        assert "dtype must be one of float32, bfloat16, float16" in result.stderr
        assert "did you mean bfloat16" in result.stderr


class TestMethods:
    """A folder of another method than LTE, and one that a method left as a stock model."""

    def save(self, config: Any, dense_folder: Path, folder: Path) -> Path:
        model = AutoModelForCausalLM.from_pretrained(dense_folder)
        AutoTokenizer.from_pretrained(dense_folder).save_pretrained(folder)
        lte.sparsify_(model, config, calibration=[{"input_ids": torch.arange(60).view(2, 30)}]).save_pretrained(folder)
        return folder

    @pytest.mark.parametrize(
        ("config", "sparsity", "share"),
        [(CatsConfig(), 0.5, 2 / 3), (WandaConfig(), 0.0, 0.5), (DejaVuConfig(), 0.5, 0.5)],
    )
    def test_eval_counts_what_it_costs(
        self, config: Any, sparsity: float, share: float, run: Callable[..., Any], dense_folder: Path, tmp_path: Path
    ) -> None:
        folder = self.save(config, dense_folder, tmp_path / "model")
        result = run("eval", folder, *DATA, "--json", tmp_path / "eval.json")
        assert result.exit_code == 0, result.output
        record = json.loads((tmp_path / "eval.json").read_text())
        assert record["method"] == config.name
        assert record["method_config"] == config.to_dict()
        assert record["sparsity"] == pytest.approx(sparsity, abs=0.05)
        weights = count_linear_weights(load_dense_model(dense_folder))
        read = weights.attention + share * sum(weights.ffn)
        assert 1 - record["weight_sparsity"] == pytest.approx(read / (weights.attention + sum(weights.ffn)), abs=0.03)
        assert "target 50%" in result.output

    def test_inspect_names_the_method(self, run: Callable[..., Any], dense_folder: Path, tmp_path: Path) -> None:
        folder = self.save(CatsConfig(), dense_folder, tmp_path / "model")
        result = run("inspect", folder, "--json", tmp_path / "inspect.json")
        assert result.exit_code == 0, result.output
        assert json.loads((tmp_path / "inspect.json").read_text())["method"] == "cats"
        assert "This model is dense" not in result.output

    def test_it_is_not_trained_as_an_lte_model(
        self, run: Callable[..., Any], dense_folder: Path, tmp_path: Path
    ) -> None:
        folder = self.save(CatsConfig(), dense_folder, tmp_path / "model")
        result = run("train", "--model", folder, "--output", tmp_path / "out", *SHORT)
        assert result.exit_code == 1
        assert "model must be dense, got LteLlamaForCausalLM, which a method changed" in result.stderr


class TestGenerate:
    def test_it_says_how_many_neurons_it_took(self, run: Callable[..., Any], trained: Any) -> None:
        result = run("generate", trained[0], "--prompt", "with open", "--max-new-tokens", 5)
        assert result.exit_code == 0, result.output
        assert result.stdout.startswith("with open")
        assert "% of the FFN neurons were used" in result.stderr

    def test_a_chat_template_that_fails(self, run: Callable[..., Any], dense_folder: Path, tmp_path: Path) -> None:
        folder = shutil.copytree(dense_folder, tmp_path / "model")
        (folder / "chat_template.jinja").write_text("{{ messages.first.of.all }}", encoding="utf-8")
        result = run("generate", folder, "--prompt", "a", "--chat")
        assert result.exit_code == 1
        assert "--chat must have a chat template that works, got one of" in result.stderr
        assert "that fails with UndefinedError" in result.stderr

    def test_sampling_repeats_with_its_seed(self, run: Callable[..., Any], trained: Any) -> None:
        flags = ["--prompt", "with", "--max-new-tokens", 8, "--temperature", 1.0]
        texts = [run("generate", trained[0], *flags, "--seed", seed).stdout for seed in (1, 1, 2)]
        assert texts[0] == texts[1] != texts[2]

    def test_a_dense_model_uses_all(self, run: Callable[..., Any], dense_folder: Path) -> None:
        result = run("generate", dense_folder, "--prompt", "with", "--max-new-tokens", 3)
        assert "all FFN neurons were used" in result.stderr

    def test_chat_uses_the_template(self, run: Callable[..., Any], dense_folder: Path) -> None:
        result = run("generate", dense_folder, "--prompt", "with", "--chat", "--max-new-tokens", 3)
        assert result.exit_code == 0, result.output
        assert not result.stdout.startswith("with")

    def test_an_empty_prompt(self, run: Callable[..., Any], dense_folder: Path) -> None:
        result = run("generate", dense_folder, "--prompt", "")
        assert result.exit_code == 1
        assert "prompt must hold at least one character" in result.stderr

    @pytest.mark.parametrize("model_type", ["gpt2", "opt"])
    def test_a_text_ends_where_the_positions_do(
        self, model_type: str, run: Callable[..., Any], dense_folder: Path, tmp_path: Path
    ) -> None:
        sizes = {"vocab_size": VOCAB_SIZE, "max_position_embeddings": 32}
        save_folder(tiny_sparse_model(model_type, **sizes), load_tokenizer(dense_folder), tmp_path)
        result = run("generate", tmp_path, "--prompt", "x" * 20, "--max-new-tokens", 40)
        assert result.exit_code == 0, result.output
        assert "The model has 32 positions: the answer ends after at most 12 tokens." in result.stderr
        assert "used for these 3" in result.stderr
        result = run("generate", tmp_path, "--prompt", "x" * 33)
        assert result.exit_code == 1
        assert "input_ids must hold at most 32 tokens in a row" in result.stderr

    def test_a_tokenizer_of_another_model(self, run: Callable[..., Any], dense_folder: Path, tmp_path: Path) -> None:
        save_folder(tiny_dense_model(vocab_size=200), load_tokenizer(dense_folder), tmp_path)
        result = run("generate", tmp_path, "--prompt", "while the")
        assert result.exit_code == 1
        assert "input_ids must lie in 0 to 199, the model's vocabulary" in result.stderr
        for command in (["eval", *DATA], ["train", *SHORT, "--output", tmp_path / "out", "--model"]):
            result = run(*command, tmp_path)
            assert result.exit_code == 1
            assert "input_ids must lie in 0 to 199, the model's vocabulary" in result.stderr


class TestBrokenFolders:
    """Every command says in one sentence which file is the matter and what to do."""

    @pytest.fixture
    def commands(self, tmp_path: Path) -> list[list[Any]]:
        return [["train", "--output", tmp_path / "out", "--model"], ["eval"], ["bench"], ["generate", "--prompt", "x"]]

    def test_a_missing_tensor(
        self, run: Callable[..., Any], dense_folder: Path, commands: list[list[Any]], tmp_path: Path
    ) -> None:
        folder = shutil.copytree(dense_folder, tmp_path / "model")
        weights = load_file(folder / "model.safetensors")
        del weights["model.layers.0.mlp.up_proj.weight"]
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        distilled = ["train", "--model", dense_folder, "--output", tmp_path / "other", *SHORT, "--distill-from"]
        for command in [*commands, distilled]:
            result = run(*command, folder)
            assert result.exit_code == 1
            assert f"{folder} must hold all weights of the model, got 1 missing: model.layers.0.mlp" in result.stderr

    def test_a_folder_without_a_model(
        self, run: Callable[..., Any], dense_folder: Path, commands: list[list[Any]], tmp_path: Path
    ) -> None:
        (tmp_path / "empty").mkdir()
        for command in commands:
            assert "must be a folder with a config.json" in run(*command, tmp_path / "empty").stderr
            file = run(*command, dense_folder / "model.safetensors").stderr
            assert "a file of another kind; give the folder that it lies in" in file or "output must be" in file


class TestInspect:
    def test_a_trained_folder(self, run: Callable[..., Any], trained: Any, tmp_path: Path) -> None:
        result = run("inspect", trained[0], "--json", tmp_path / "inspect.json")
        assert result.exit_code == 0, result.output
        found = json.loads((tmp_path / "inspect.json").read_text())
        record = json.loads((trained[0] / "result.json").read_text())
        assert (found["method"], found["family"]) == ("lte", "llama")
        assert (found["experts_per_layer"], found["expert_size"], found["layers"]) == (8, 8, 2)
        assert found["target_sparsity"] == 0.5
        assert found["measured_sparsity"] == record["sparsity"]
        assert found["gflops_per_token_sparse"] * GFLOP == pytest.approx(record["flops_per_token"])
        assert found["gflops_per_token_sparse"] < found["gflops_per_token_dense"]
        assert len(found["layers_measured"]) == 2
        assert "8 of 8 neurons" in result.output

    def test_it_reads_no_weights(self, run: Callable[..., Any], trained: Any, tmp_path: Path) -> None:
        (tmp_path / "config.json").write_bytes((trained[0] / "config.json").read_bytes())
        result = run("inspect", tmp_path)
        assert result.exit_code == 0
        assert "does not load" in result.stderr

    def test_a_folder_that_was_not_measured(self, run: Callable[..., Any], tmp_path: Path) -> None:
        model = lte.sparsify_(tiny_dense_model(), lte.LteConfig(expert_size=8))
        model.save_pretrained(tmp_path / "new")
        assert "No sparsity was measured" in run("inspect", tmp_path / "new").output

    def test_a_dense_folder(self, run: Callable[..., Any], dense_folder: Path) -> None:
        assert "This model is dense" in run("inspect", dense_folder).output

    def test_a_folder_without_a_model(self, run: Callable[..., Any], tmp_path: Path) -> None:
        result = run("inspect", tmp_path)
        assert result.exit_code == 1
        assert "model must be a folder with a config.json" in result.stderr

    def test_a_name_that_is_nowhere(self, run: Callable[..., Any]) -> None:
        result = run("inspect", "no-such-model")
        assert result.exit_code == 1
        assert "model no-such-model is no folder here and was not found on the hub" in result.stderr

    def test_a_family_without_a_row(self, run: Callable[..., Any], tmp_path: Path) -> None:
        (tmp_path / "config.json").write_text('{"model_type": "albert"}')
        result = run("inspect", tmp_path)
        assert result.exit_code == 1
        assert "model_type must be one of" in result.stderr


def test_damaged_weights_are_a_sentence(run: Callable[..., Any], trained: Any, tmp_path: Path) -> None:
    for path in trained[0].glob("*.json"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "model.safetensors").write_bytes((trained[0] / "model.safetensors").read_bytes()[:1000])
    torch.manual_seed(0)
    result = run("eval", tmp_path, *DATA)
    assert result.exit_code == 1
    assert "corrupt or cut short" in result.stderr
