"""Texts, completions and chats of a language whose words are w0, w1, ..., and how they are loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lte.data.rows import DataConfig, load_lm_datasets

TURN = "{{ m.role }} : {{ m.content }} END "
TEMPLATE = f"{{% for m in messages %}}{TURN}{{% endfor %}}{{% if add_generation_prompt %}}assistant : {{% endif %}}"
TAGGED = (
    "{% for m in messages %}{{ m.role }} : {% if m.role == 'assistant' %}{% generation %}{{ m.content }} END "
    "{% endgeneration %}{% else %}{{ m.content }} END {% endif %}{% endfor %}"
)
# Turns before the last are written differently, as reasoning models do.
UNSTABLE = "{% for m in messages %}{{ m.role }} : {{ '' if loop.last else 'w9 ' }}{{ m.content }} END {% endfor %}"
DOCUMENTS = [f"w{i} w{i + 1} w{i + 2} w{i + 3} w{i + 4}" for i in range(0, 200, 5)]
CHAT = [("user", "w1"), ("assistant", "w2 w3"), ("user", "w4"), ("assistant", "w5")]


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return str(path)


def load(tokenizer: Any, **options: Any) -> Any:
    return load_lm_datasets(DataConfig(**options), tokenizer, progress=False)


def labelled(rows: Any) -> list[int]:
    return [token for row in rows for token in row["labels"].tolist() if token != -100]
