"""What the inspector's tests look at: tiny models with random routers, and a tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoTokenizer

import lte
from lte.hf.dense import load_tokenizer
from lte.report.page import pack_base64
from tests.cli.conftest import save_tiny_model
from tests.tiny_models import EXPERT_SIZE, randomise_routers_, tiny_dense_model

NASTY = "with <script>document.title = 'taken'</script> & <b>open</b>\n\n\t😀 e\u0301 </script>"
PLAIN = "while the file is open, with open(path) as file: while True: read the file"
VOCAB_SIZE = 300


def save_sparse_model(folder: Path, model_type: str = "llama", seed: int = 0) -> Path:
    """A folder of an LTE model whose tokens switch on different experts, with a byte-level tokenizer."""
    save_tiny_model(folder, model_type)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = sparse_model(model_type, seed)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def sparse_model(model_type: str = "llama", seed: int = 0) -> Any:
    """The model of `save_sparse_model`."""
    model = tiny_dense_model(model_type, vocab_size=VOCAB_SIZE, max_position_embeddings=256)
    lte.sparsify_(model, lte.LteConfig(expert_size=EXPERT_SIZE, grouping="random"))
    return randomise_routers_(model, seed)


def byte_level_tokenizer(folder: Path) -> Any:
    """The tokenizer of `save_tiny_model`."""
    return load_tokenizer(save_tiny_model(folder))


def large_run(run: dict[str, Any], tokens: int = 2000, layers: int = 30, experts: int = 48) -> dict[str, Any]:
    """A run as of SmolLM2-135M on a long text, made from a small one: 40% of the experts are on, of some more often.

    Its reference is another text of as many tokens.
    """
    random = np.random.default_rng(0)
    use = random.beta(2, 3, (layers, 1, experts))
    active = random.random((layers, tokens, experts)) < use
    ids = random.zipf(1.3, tokens) % 49_000
    words = [f" wörd{identifier}" for identifier in ids]
    text = {"ids": ids.tolist(), "tokens": words, "entries": {}, "special": []}
    shape = (layers, experts, run["reference"]["strongest"])
    reference = run["reference"] | {
        "tokens": text,
        "use": _packed(use, "<f4"),
        "selectivity": _packed(random.random((layers, experts)), "<f4"),
        "positions": _packed(random.integers(tokens, size=shape), "<i4"),
        "scores": _packed(random.random(shape), "<f4"),
        "switched_on": _packed(random.integers(1, 5, shape), "<i4"),
    }
    following = {
        "surprise": _packed(random.gamma(2, 3, tokens), "<f4"),
        "entropy": _packed(random.gamma(2, 2, tokens), "<f4"),
        "words": words,
        "likeliest": _packed(random.integers(tokens, size=(tokens, 5)), "<i4"),
        "probabilities": _packed(random.random((tokens, 5)) / 5, "<f4"),
    }
    steps = np.linspace(0.05, 0.95, 20)
    counts = (layers * experts * (1 - steps[:, None]) * random.uniform(0.8, 1, tokens)).astype(int)
    what_if = {"thresholds": steps.tolist(), "own": 10, "counts": _packed(counts, "<u2")}
    packed = pack_base64(np.packbits(active, axis=-1).tobytes())
    shown = {"layers": layers, "experts": experts, "active": packed, "reference": reference}
    return {**run, **text, **shown, "next": following, "what_if": what_if}


def _packed(values: np.ndarray, dtype: str) -> str:
    return pack_base64(values.astype(dtype).tobytes())
