"""Tasks of lm-eval and a tiny model for the harness's tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from lte.hf.dense import load_tokenizer
from tests.cli.conftest import VOCAB_SIZE, save_tiny_model
from tests.tiny_models import tiny_sparse_model

MODULE = """
from datasets import Dataset

TEXTS = ["a file is open", "while the loop runs, it runs", "with", "the context manager of a statement is evaluated"]

def docs(**metadata):
    # "<pad>" is token 0, with which lm-eval fills rows: those tokens are text.
    choices = [[" and closed", " or not at all", "<pad>s", " s"]] * len(TEXTS)
    rows = [{"text": text, "choices": c, "label": i} for i, (text, c) in enumerate(zip(TEXTS, choices))]
    return {"test": Dataset.from_list(rows)}
"""
COMMON = "custom_dataset: !function toy.docs\ntest_split: test\ndoc_to_text: text\nmetadata: {version: 7}\n"
MEAN = "aggregation: mean, higher_is_better: true"
CHOICE = f"""{COMMON}output_type: multiple_choice
doc_to_choice: choices
doc_to_target: label
metric_list: [{{metric: acc, {MEAN}}}, {{metric: acc_norm, {MEAN}}}]
"""
FILES = {
    "choice.yaml": f"task: toy_choice\ntag: toy_tag\n{CHOICE}",
    "other.yaml": f"task: toy_other\ntag: toy_tag\n{CHOICE}",
    "group.yaml": "group: toy_group\ntask: [toy_choice, toy_other]\naggregate_metric_list: [{metric: acc}]\n",
    "plain_group.yaml": "group: toy_plain_group\ntask: [toy_choice, toy_other]\n",
    "generation.yaml": f"""task: toy_generation
{COMMON}output_type: generate_until
doc_to_target: text
generation_kwargs: {{until: ["zzzz"], max_gen_toks: 8, do_sample: false}}
metric_list: [{{metric: exact_match, {MEAN}}}]
""",
    "rolling.yaml": f"""task: toy_rolling
{COMMON}output_type: loglikelihood_rolling
doc_to_target: text
metric_list: [{{metric: word_perplexity}}]
""",
    "toy.py": MODULE,
}


def write_tasks(folder: Path) -> Path:
    """A folder with the task files."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in FILES.items():
        (folder / name).write_text(content)
    return folder


def toy_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of the command line's tests."""
    return load_tokenizer(save_tiny_model(folder))


def toy_model(model_type: str = "llama") -> Any:
    """A tiny LTE model that knows the tokenizer's tokens."""
    return tiny_sparse_model(model_type, vocab_size=VOCAB_SIZE, max_position_embeddings=256)
