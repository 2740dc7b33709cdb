"""The Python of the pages that teach runs, page by page, on a tiny model in place of the one that they name."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import datasets
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForLanguageModeling

import lte
from tests.cli.conftest import save_tiny_model
from tests.tiny_models import EXPERT_SIZE, randomise_routers_

DOCS = Path(__file__).parents[1] / "docs"
MODEL = "HuggingFaceTB/SmolLM2-135M"
SMALL = "per_device_train_batch_size=4, router_fit_tokens=512, calibration_tokens=2048, use_cpu=True, max_steps=4"


@pytest.fixture
def work_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a tiny model and a text, where the pages run."""
    monkeypatch.chdir(tmp_path)
    save_tiny_model(tmp_path / "tiny")
    lines = [json.dumps({"text": f"the river runs past house number {i} and on to the sea"}) for i in range(64)]
    (tmp_path / "my-text.jsonl").write_text("\n".join(lines))
    return tmp_path


def run_page(name: str, monkeypatch: pytest.MonkeyPatch, **given: Any) -> dict[str, Any]:
    """The names that a page leaves behind; only what makes it small enough for a test is changed."""
    code = "\n".join(re.findall(r"```python\n(.*?)```", (DOCS / name).read_text(), flags=re.DOTALL))
    code = code.replace(MODEL, "./tiny").replace("max_length=512", "max_length=32")
    code = code.replace("target_sparsity=0.5", f"target_sparsity=0.5, expert_size={EXPERT_SIZE}")
    code = re.sub(r"per_device_train_batch_size=\d+,", "", code)
    code = re.sub(r"(eval|save)_steps=\d+", r"\1_steps=2", code)
    code, trainings = re.subn(r"max_steps=\d+", SMALL, code)
    assert trainings
    # As a module: a checkpoint pickles the page's class of arguments by its name there.
    module = ModuleType("page")
    monkeypatch.setitem(sys.modules, "page", module)
    vars(module).update(given)
    exec(compile(code, name, "exec"), vars(module))
    return vars(module)


def given_names() -> dict[str, Any]:
    """What the other pages take over from the tour."""
    tokenizer = AutoTokenizer.from_pretrained("tiny")
    texts = datasets.load_dataset("json", data_files="my-text.jsonl", split="train")
    rows = texts.map(lambda row: tokenizer(row["text"], truncation=True, max_length=32), remove_columns="text")
    return {
        "tokenizer": tokenizer,
        "model": AutoModelForCausalLM.from_pretrained("tiny"),
        "dense": AutoModelForCausalLM.from_pretrained("tiny"),
        "collator": DataCollatorForLanguageModeling(tokenizer, mlm=False),
        "dataset": rows,
        "held_out": rows.select(range(8)),
        "texts": texts["text"][:20],
        "chats": datasets.Dataset.from_dict({"messages": [[{"role": "user", "content": "Hi"}]] * 16}),
    }


def test_the_tour(work_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    names = run_page("tour.md", monkeypatch)
    assert lte.is_accelerated(names["model"])
    assert "'eval_sparsity'" in capsys.readouterr().out


def test_training(work_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("trl")
    names = run_page("training.md", monkeypatch, **given_names())
    assert lte.sparse_ffns(AutoModelForCausalLM.from_pretrained("my-sparse-model"))
    assert {entry.get("stage") for entry in names["trainer"].state.log_history} == {1, 2}


def test_lora(work_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("peft")
    names = run_page("lora.md", monkeypatch, **given_names())
    assert lte.is_accelerated(names["merged"])
    ids = torch.arange(3, 35)[None]
    saved = AutoModelForCausalLM.from_pretrained("my-sparse-model")
    with torch.no_grad():
        expected = names["trainer"].model.eval()(ids).logits
        torch.testing.assert_close(saved.eval()(ids).logits, expected, rtol=1e-4, atol=1e-5)


def test_calibration(work_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dense, tokenizer = AutoModelForCausalLM.from_pretrained("tiny"), AutoTokenizer.from_pretrained("tiny")
    model = AutoModelForCausalLM.from_pretrained("tiny")
    lte.sparsify_(model, lte.LteConfig(expert_size=EXPERT_SIZE, grouping="random"))
    names: dict[str, Any] = {"lte": lte, "AutoModelForCausalLM": AutoModelForCausalLM, "dense": dense}
    names |= {"model": randomise_routers_(model), "tokenizer": tokenizer}
    names |= {"articles": ["the river runs past house and on to the sea"] * 40, "code": ["with open(x) as y: 1"] * 40}
    later, python = re.findall(r"```python\n(.*?)```", (DOCS / "calibration.md").read_text(), flags=re.DOTALL)
    exec(python, names)
    assert names["curve"].chosen.point.sparsity == pytest.approx(0.6, abs=0.02)
    exec(later, names)
    assert names["model"].config.lte_curve["chosen"]["asked"] == {"max_perplexity_ratio": 1.05}
