"""A program that never imports lte must fail to load a saved folder, not run it dense."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from tests.tiny_models import MODEL_TYPES, logits_of, row_of, tiny_sparse_model

LOADERS = ("AutoConfig", "AutoModel", "Auto class", "stock class", "pipeline")
TASKS = {"CausalLM": "text-generation", "MaskedLM": "fill-mask", "Seq2SeqLM": "any-to-any"}

PROGRAM = """
import json, sys
import transformers

results = {}
for folder, (auto_name, stock_name, task) in json.loads(sys.argv[1]).items():
    loaders = {
        "AutoConfig": lambda: transformers.AutoConfig.from_pretrained(folder),
        "AutoModel": lambda: transformers.AutoModel.from_pretrained(folder),
        "Auto class": lambda: getattr(transformers, auto_name).from_pretrained(folder),
        "stock class": lambda: getattr(transformers, stock_name).from_pretrained(folder),
        "pipeline": lambda: transformers.pipeline(task, model=folder),
    }
    results[folder] = {}
    for name, load in loaders.items():
        try:
            results[folder][name] = ["loaded", str(type(load()))]
        except Exception as error:
            results[folder][name] = [type(error).__name__, str(error)]
assert not any(name.split(".")[0] == "lte" for name in sys.modules)
print(json.dumps(results))
"""


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, list[str]]]:
    """What each loader of stock transformers made of each family's folder."""
    root = tmp_path_factory.mktemp("folders")
    classes = {}
    for model_type in MODEL_TYPES:
        tiny_sparse_model(model_type).save_pretrained(root / model_type)
        auto_name, stock_name = next(iter(row_of(model_type).models.items()))
        task = TASKS[auto_name.removeprefix("AutoModelFor")]
        classes[str(root / model_type)] = (auto_name, stock_name, task)
    command = [sys.executable, "-c", PROGRAM, json.dumps(classes)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout.splitlines()[-1])
    return {Path(folder).name: result for folder, result in results.items()}


@pytest.mark.parametrize("loader", LOADERS)
def test_stock_transformers_refuses_the_folder(
    model_type: str, loader: str, outcomes: dict[str, dict[str, list[str]]]
) -> None:
    kind, message = outcomes[model_type][loader]
    assert kind != "loaded", f"{loader} loaded {message} and would run it dense"
    assert f"lte_{row_of(model_type).model_type}" in message or "import lte" in message, message


def test_a_folder_with_the_guard_of_an_earlier_version_loads(tmp_path: Path, tokens: Tensor) -> None:
    model = tiny_sparse_model("llama")
    model.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    config["hidden_act"] = "silu (an LTE model: `pip install lte` and `import lte` before loading it)"
    file.write_text(json.dumps(config))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.hidden_act == "silu"
    assert torch.equal(logits_of(loaded, tokens), logits_of(model, tokens))
