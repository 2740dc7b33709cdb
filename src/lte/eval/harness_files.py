"""Documents of lm-eval's tasks, read from local files in place of a hub: what `harness_tasks/*.yaml` name.

Each function returns splits of rows with the fields of the hub's data set, so that lm-eval's own prompts fit. Files are
gzip; `folder` is `HarnessConfig.harness_data`. docs/evaluation.md lists the files and what differs from the originals.
"""

from __future__ import annotations

import csv
import functools
import gzip
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from datasets import Dataset

Rows = list[dict[str, Any]]
Splits = dict[str, Dataset]


def mmlu(*, subject: str, folder: str | None = None, **metadata: Any) -> Splits:
    """Splits `test` and `dev` of one subject: question, choices [4], answer (0 to 3), subject.

    Raises:
        ValueError: without a folder or a file in it, as everywhere here, or for a subject that a file does not have.
    """
    found = {}
    for split in ("test", "dev"):
        path = _path(folder, f"mmlu/{split}.csv.gz")
        by_subject = _mmlu_rows(path, path.stat().st_mtime_ns)
        if subject not in by_subject:
            raise ValueError(f"{path} must hold questions on {subject}, got {', '.join(by_subject)}")
        found[split] = Dataset.from_list(by_subject[subject])
    return found


@functools.lru_cache(maxsize=2)
def _mmlu_rows(path: Path, changed_ns: int) -> dict[str, Rows]:
    """The rows of a file by subject, read once for all 57."""
    found: dict[str, Rows] = {}
    for row in _read_csv(path):
        choices, answer = [row[letter] for letter in "ABCD"], "ABCD".index(row["answer"])
        question = {"question": row["question"], "choices": choices, "answer": answer, "subject": row["subject"]}
        found.setdefault(row["subject"], []).append(question)
    return found


def piqa(*, folder: str | None = None, **metadata: Any) -> Splits:
    """Split `test`: goal, sol1, sol2, label (0 or 1)."""
    rows = _multiple_choice(_path(folder, "qa/piqa.test.jsonl.gz"), "Solution", 2, separator="\n\n")
    return _test([{"goal": q, "sol1": options[0], "sol2": options[1], "label": label} for q, options, label in rows])


def openbookqa(*, folder: str | None = None, **metadata: Any) -> Splits:
    """Splits `test` and `train`: question_stem, choices (text [4], label [4]), answerKey (A to D)."""
    return {
        split: Dataset.from_list(
            [
                {"question_stem": q, "choices": {"text": options, "label": list("ABCD")}, "answerKey": "ABCD"[label]}
                for q, options, label in _multiple_choice(_path(folder, f"qa/openbookqa.{split}.jsonl.gz"), "Answer", 4)
            ]
        )
        for split in ("test", "train")
    }


def social_iqa(*, folder: str | None = None, **metadata: Any) -> Splits:
    """Split `test`: context_question (the two with a space between), answerA, answerB, answerC, label (1 to 3)."""
    rows = _multiple_choice(_path(folder, "qa/social_i_qa.test.jsonl.gz"), "Answer", 3)
    names = ("answerA", "answerB", "answerC")
    return _test(
        [
            {"context_question": q, **dict(zip(names, options, strict=True)), "label": str(label + 1)}
            for q, options, label in rows
        ]
    )


def winogrande(*, folder: str | None = None, **metadata: Any) -> Splits:
    """Split `test`: sentence with `_` where an option belongs, option1, option2, answer (1 or 2)."""
    rows = _multiple_choice(_path(folder, "qa/winogrande.test.jsonl.gz"), "Option", 2, end=" ")
    return _test(
        [
            {"sentence": q, "option1": options[0], "option2": options[1], "answer": str(label + 1)}
            for q, options, label in rows
        ]
    )


def boolq(*, folder: str | None = None, **metadata: Any) -> Splits:
    """Split `test`: passage, question (without a question mark), label (1 for yes)."""
    path = _path(folder, "qa/boolq.validation_with_passage.tsv.gz")
    rows = _read_csv(path, delimiter="\t", quoting=csv.QUOTE_NONE)
    return _test([{"passage": row["passage"], "question": row["question"], "label": int(row["label"])} for row in rows])


def gsm8k(*, folder: str | None = None, **metadata: Any) -> Splits:
    """Splits `test` and `train`: question, answer (the steps, then `#### ` and the number)."""
    paths = {split: _path(folder, f"gsm8k/{split}.jsonl.gz") for split in ("test", "train")}
    return {split: Dataset.from_list(list(_read_jsonl(path))) for split, path in paths.items()}


def truthfulqa(*, folder: str | None = None, **metadata: Any) -> Splits:
    """Split `test`: question, mc1_targets and mc2_targets (choices, labels), the right answers first."""
    rows = []
    for row in _read_csv(_path(folder, "qa/truthfulqa.csv.gz")):
        right, wrong = _answers(row["Correct Answers"]), _answers(row["Incorrect Answers"])
        targets = {"mc1_targets": ([row["Best Answer"].strip()], wrong), "mc2_targets": (right, wrong)}
        choices = {
            name: {"choices": [*true, *false], "labels": [1] * len(true) + [0] * len(false)}
            for name, (true, false) in targets.items()
        }
        rows.append({"question": row["Question"], **choices})
    return _test(rows)


def _answers(cell: str) -> list[str]:
    """The answers of a cell, which semicolons part; once each."""
    return list(dict.fromkeys(answer.strip() for answer in cell.split(";") if answer.strip()))


def _multiple_choice(
    path: Path, word: str, num_options: int, *, separator: str = " ", end: str = "\n\n"
) -> list[tuple[str, list[str], int]]:
    """Question, options and the right one's index of each row in instruction form.

    Args:
        path: a JSON Lines file with the fields `instruction` and `answer`.
        word: before each option, with its number and a colon: `Answer1: `.
        num_options: how many options there are.
        separator: between options.
        end: between the last option and the format of the answer.
    """
    options = re.escape(separator).join(f"{word}{i}: (.*?)" for i in range(1, num_options + 1))
    form = re.compile(
        rf"Please choose the correct .+? (?:question|sentence): (.*?)\n\n{options}{re.escape(end)}Answer format: .*",
        re.DOTALL,
    )
    found = []
    for number, row in enumerate(_read_jsonl(path), 1):
        match = form.fullmatch(row["instruction"])
        answer = re.fullmatch(rf"{word.lower()}([1-{num_options}])", row["answer"])
        if match is None or answer is None:
            raise ValueError(
                f"{path} must hold questions with {word}1 to {word}{num_options} and an answer among them, got line "
                f"{number}: {row['instruction'][:80]!r}, answer={row['answer']!r}"
            )
        question, *choices = match.groups()
        found.append((question, choices, int(answer[1]) - 1))
    return found


def _test(rows: Rows) -> Splits:
    return {"test": Dataset.from_list(rows)}


def _path(folder: str | None, name: str) -> Path:
    if folder is None:
        raise ValueError(f"harness_data must be a folder that holds {name}, got none; pass --harness-data")
    path = Path(folder).expanduser() / name
    if not path.is_file():
        raise ValueError(f"harness_data must be a folder that holds {name}, got harness_data={folder}")
    return path


def _read_csv(path: Path, **form: Any) -> Iterator[dict[str, str]]:
    # utf-8-sig: TruthfulQA begins with a byte-order mark.
    with gzip.open(path, "rt", encoding="utf-8-sig", newline="") as file:
        yield from csv.DictReader(file, **form)


def _read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        yield from map(json.loads, file)
