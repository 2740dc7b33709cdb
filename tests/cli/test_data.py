"""`lte data`: what is read of a file, without training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

ROWS = [
    {"conversations": [{"from": "human", "value": f"q{i}"}, {"from": "gpt", "value": f"a{i}"}], "id": i}
    for i in range(3)
]


@pytest.fixture
def chats(tmp_path: Path) -> str:
    (tmp_path / "chats.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    return str(tmp_path / "chats.jsonl")


def test_says_which_columns_are_used_and_shows_a_row(run: Any, chats: str, dense_folder: Path) -> None:
    used = f"{chats}: 3 documents of kind chat (messages from conversations); not used: id; trained is what stands in"
    assert run("data", chats).stdout == f"{used} [[ ]]: user: q0\\nassistant: [[a0]]\\n\n"
    seen = run("data", chats, "--model", dense_folder).stdout.splitlines()
    assert seen[0].startswith(f"{used} [[ ]]: user: q0\\n")
    assert seen[0].endswith("[[assistant: a0\\n]]")
    assert seen[1].endswith(" of which train.")


def test_makes_prompts_of_columns(run: Any, tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("question,hint,output\nWho?,none,me\n")
    options = ["--prompt-template", "{question}\\n({hint})\\n", "--completion-field", "output"]
    shown = run("data", tmp_path / "x.csv", *options).stdout
    assert shown.endswith("Who?\\n(none)\\n[[me]]\n")
    assert "(completion from output, prompt from question and hint)" in shown


def test_faults_of_any_row_are_a_sentence(run: Any, chats: str, dense_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "template.jinja").write_text("{{ messages[0].content + messages[0].missing }}")
    template = ["--chat-template", tmp_path / "template.jinja"]
    failed = run("data", chats, "--model", dense_folder, *template)
    assert failed.exit_code == 1
    assert "Error: the chat template must write every chat, got UndefinedError for" in failed.stderr
    assert "chats.jsonl, line 1" in failed.stderr
    (tmp_path / "template.jinja").write_text("{% if %}")
    failed = run("data", chats, "--model", dense_folder, *template)
    assert "chat_template must be a Jinja template, got chat_template=" in failed.stderr
    assert "with an error in line 1" in failed.stderr
    assert "chat_template must be given with a model" in run("data", chats, *template).stderr
