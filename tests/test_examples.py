"""Every script in `examples/` runs on a tiny model, as it is."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from pydoc_data.topics import topics

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import lte

FOLDER = Path(__file__).parents[1] / "examples"
SCRIPTS = sorted(path.name for path in FOLDER.glob("*.py"))
SAYS = {
    "train.py": "The saved folder skips",
    "trl_sft.py": "eval_sparsity",
    "lora.py": "The merged model skips",
    "own_dataset.py": "distillation_loss",
    "compare_methods.py": "lte: ",
    "generate.py": "the kernels:",
    "calibrate.py": "calibrated again: 30.",
    "export_dense.py": "holds a LlamaForCausalLM",
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny random model and a tokenizer of words."""
    folder = tmp_path_factory.mktemp("tiny")
    backend = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    special = ["[PAD]", "[UNK]", "[EOS]"]
    backend.train_from_iterator(topics.values(), trainers.WordLevelTrainer(vocab_size=500, special_tokens=special))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]", eos_token="[EOS]"
    )
    tokenizer.save_pretrained(folder)
    sizes = {"hidden_size": 32, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=500, pad_token_id=0, eos_token_id=2, **sizes)).save_pretrained(folder)
    return folder


def test_there_are_as_many_as_the_readme_lists() -> None:
    listed = FOLDER.joinpath("README.md").read_text()
    assert all(f"[{name}]({name})" in listed for name in SCRIPTS)
    assert set(SCRIPTS) == set(SAYS)
    assert max(len(FOLDER.joinpath(name).read_text().splitlines()) for name in SCRIPTS) <= 50


@pytest.mark.parametrize("name", SCRIPTS)
def test_it_runs(
    name: str, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [name, str(tiny), str(tmp_path)])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    runpy.run_path(str(FOLDER / name), run_name="__main__")
    assert SAYS[name] in capsys.readouterr().out


def test_the_trained_folder_is_an_lte_model(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["train.py", str(tiny), str(tmp_path)])
    runpy.run_path(str(FOLDER / "train.py"), run_name="__main__")
    assert lte.sparse_ffns(AutoModelForCausalLM.from_pretrained(tmp_path / "model"))
