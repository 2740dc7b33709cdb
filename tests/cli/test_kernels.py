"""`--kernels` of `lte eval` and `lte generate`."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import lte
from lte.eval.kernels import use_kernels_
from lte.ops import dispatch
from lte.ops.dispatch import kernel_names
from lte.ops.step import engines
from lte.ops.step.reference import ReferenceEngine
from lte.train.processes import training_device
from tests.cli.conftest import SHORT, save_tiny_model
from tests.tiny_models import tiny_dense_model, tiny_sparse_model

DATA = [*SHORT[:2], *SHORT[4:6]]
# On the CPU numba and PyTorch, on a GPU Triton for both: `tests/ops/test_dispatch.py` names them one by one.
KERNELS = {"weights": "native", **kernel_names(training_device(), torch.float32)}
SAYS = f"Kernels: {KERNELS['decode']} for 1 to 16 tokens at a time, {KERNELS['prefill']} for more, native weights."


@pytest.fixture
def evaluate(run: Callable[..., Any], trained: Any, tmp_path: Path) -> Callable[..., Any]:
    """Evaluates the trained folder; returns the record and what stderr says."""

    def with_flags(*flags: str) -> tuple[dict[str, Any], str]:
        result = run("eval", trained[0], *DATA, "--batch-size", 4, "--json", tmp_path / "eval.json", *flags)
        assert result.exit_code == 0, result.output
        return json.loads((tmp_path / "eval.json").read_text()), result.stderr

    return with_flags


class TestEval:
    def test_auto_is_the_default_and_what_training_measured(self, evaluate: Any, trained: Any) -> None:
        record, stderr = evaluate()
        assert record["config"]["kernels"] == KERNELS
        assert json.loads((trained[0] / "result.json").read_text())["config"]["kernels"] == KERNELS
        assert SAYS in stderr

    def test_off(self, evaluate: Any) -> None:
        fast, _ = evaluate()
        record, stderr = evaluate("--kernels", "off")
        assert record["config"]["kernels"] is None
        assert "Kernels" not in stderr
        assert record["value"] == pytest.approx(fast["value"], rel=1e-4)
        assert record["sparsity"] == pytest.approx(fast["sparsity"], abs=1e-3)

    def test_int8(self, evaluate: Any) -> None:
        native, _ = evaluate()
        record, stderr = evaluate("--kernels", "int8")
        assert record["config"]["kernels"]["weights"] == "int8"
        assert "int8 weights." in stderr
        assert record["value"] == pytest.approx(native["value"], rel=0.05)
        assert record["value"] != pytest.approx(native["value"], rel=1e-7)

    def test_an_unknown_name(self, run: Callable[..., Any], trained: Any) -> None:
        result = run("eval", trained[0], *DATA, "--kernels", "of")
        assert result.exit_code == 1
        assert "kernels must be one of auto, off, int8, got kernels='of' (did you mean off?)" in result.stderr

    def test_a_dense_model(self, run: Callable[..., Any], dense_folder: Path, tmp_path: Path) -> None:
        result = run("eval", dense_folder, *DATA, "--json", tmp_path / "dense.json")
        assert result.exit_code == 0, result.output
        assert "Kernels" not in result.stderr
        assert json.loads((tmp_path / "dense.json").read_text())["config"]["kernels"] is None
        refused = run("eval", dense_folder, *DATA, "--kernels", "int8")
        assert refused.exit_code == 1
        assert "model must be an LTE model" in refused.stderr


class TestGenerate:
    def test_the_text_is_the_same(self, run: Callable[..., Any], trained: Any) -> None:
        command = ["generate", trained[0], "--prompt", "with open", "--max-new-tokens", 8]
        fast, plain = run(*command), run(*command, "--kernels", "off")
        assert fast.exit_code == plain.exit_code == 0
        assert fast.stdout == plain.stdout
        assert SAYS in fast.stderr
        assert "Kernels" not in plain.stderr

    def test_whole_decoding_steps(self, run: Callable[..., Any], trained: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        command = ["generate", trained[0], "--prompt", "with open", "--max-new-tokens", 8]
        monkeypatch.setattr(engines, "unfit", lambda plan, caches: "these are left out")
        plain = run(*command)
        monkeypatch.setattr(engines, "unfit", lambda plan, caches: None)
        monkeypatch.setattr(engines, "make_engine", ReferenceEngine)
        stepped = run(*command, "--compare-dense")
        assert plain.exit_code == stepped.exit_code == 0, stepped.output
        assert plain.stdout == stepped.stdout
        rate = r"\d+\.\d tokens per second"
        assert re.search(rate + r" \(median of 7 after the first\)\.", plain.stderr)
        assert re.search(rate + r" \(median of 7 after the first, by whole decoding steps\)\.", stepped.stderr)
        assert "with all neurons on" not in plain.stderr
        dense = rate + r" with all neurons on, the same weights in plain transformers; the sparse model takes \d+\.\d\d"
        assert re.search(dense, stepped.stderr)

    def test_only_an_lte_model_can_be_compared(self, run: Callable[..., Any], dense_folder: Path) -> None:
        result = run("generate", dense_folder, "--prompt", "with", "--compare-dense")
        assert result.exit_code == 1
        assert f"--compare-dense must be given with an LTE model, got model={dense_folder}" in result.stderr
        assert not result.stdout

    def test_a_dense_model_and_a_single_token(self, run: Callable[..., Any], dense_folder: Path) -> None:
        command = ["generate", dense_folder, "--prompt", "with", "--max-new-tokens"]
        assert "(median of 3 after the first)" in run(*command, 4).stderr
        assert "tokens per second" not in run(*command, 1).stderr

    def test_int8(self, run: Callable[..., Any], trained: Any) -> None:
        result = run("generate", trained[0], "--prompt", "with", "--max-new-tokens", 3, "--kernels", "int8")
        assert result.exit_code == 0, result.output
        assert "int8 weights." in result.stderr
        lines = result.stderr.splitlines()
        assert "Warning: generate runs the model module by module" in lines[1]
        reason = "the head size is 8" if torch.cuda.is_available() else "the CPU kernel takes no quantised weights"
        assert lines[1].endswith(f"as {reason}")

    def test_a_model_that_the_kernels_cannot_compute(self, run: Callable[..., Any], tmp_path: Path) -> None:
        folder = save_tiny_model(tmp_path / "tiny")
        model = tiny_dense_model(vocab_size=300, max_position_embeddings=256)
        lte.sparsify_(model, lte.LteConfig(expert_size=4)).save_pretrained(folder)
        result = run("generate", folder, "--prompt", "with", "--max-new-tokens", 3)
        assert result.exit_code == 0, result.output
        assert (
            "Kernels off: expert_size must be one of 8, 16, 32, 64 for the kernels, got expert_size=4" in result.stderr
        )
        refused = run("generate", folder, "--prompt", "with", "--kernels", "int8")
        assert refused.exit_code == 1


def test_auto_leaves_a_model_alone_that_gains_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(dispatch, "HAS_NUMBA", False)
    model = use_kernels_(tiny_sparse_model())
    assert not lte.is_accelerated(model)
    assert "Kernels off: no kernel for torch.float32 on cpu; on a CPU `pip install" in capsys.readouterr().err
    use_kernels_(model, tell=False)
    assert not capsys.readouterr().err
