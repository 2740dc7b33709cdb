"""Small data sets in the forms in which tasks read them."""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from pathlib import Path

GOOD = ("a fine film", "fine , and a joy", 'a "fine" comedy of manners and of much else')
BAD = ("a dull film", "dull , and a bore", 'a "dull" comedy of manners and of much else')


def write(path: Path, *lines: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def write_sst2(folder: Path) -> Path:
    """SST-2 in which a word gives the label away, in sentences of very different lengths."""
    rows = [
        f"{text} {'again ' * (i % 7)}\t{label}"
        for i in range(16)
        for label, texts in enumerate((BAD, GOOD))
        for text in texts
    ]
    write(folder / "train.tsv", "sentence\tlabel", *rows)
    write(folder / "dev.tsv", "sentence\tlabel", *rows[:30])
    return folder


def write_stsb(folder: Path) -> Path:
    """STS-B in which equal sentences score 5."""
    rows = [f"{i}\t{GOOD[i % 3]}\t{(GOOD, BAD)[i % 2][i % 3]}\t{5.0 - 4 * (i % 2):.3f}" for i in range(24)]
    for name in ("train", "dev"):
        write(folder / f"{name}.tsv", "index\tsentence1\tsentence2\tscore", *rows)
    return folder


def write_e2e(folder: Path) -> Path:
    """E2E with two references for each meaning, and with the quotation marks that its files have."""
    places = ("The Vaults", "Blue Spice", "Alimentum", "Zizzi")
    rows = [
        f'"name[{place}], eatType[{kind}]","{place}, the {kind}{end}"'
        for place in places
        for kind in ("pub", "coffee shop")
        for end in (".", ', called ""nice"".')
    ]
    for name in ("trainset", "devset", "testset_w_refs"):
        write(folder / f"{name}.csv", "mr,ref", *rows)
    return folder


def write_xsum(folder: Path) -> Path:
    """XSum with four stories in each split."""
    rows = [json.dumps({"document": f"The river rose {i} feet. " * 9, "summary": f"It rose {i}."}) for i in range(4)]
    for split in ("train", "validation", "test"):
        write(folder / f"{split}.jsonl", *rows)
    return folder


def write_wikitext(folder: Path) -> Path:
    """WikiText with an article of thirty lines in each split."""
    lines = ["", " = River = ", "", *(f" The river runs past house {i} to the sea . " for i in range(30))]
    for split in ("train", "valid", "test"):
        write(folder / f"wiki.{split}.raw", *lines)
    return folder


def write_tulu(folder: Path) -> Path:
    """Tulu with forty chats, half of which have a system message."""
    roles = ("system", "user", "assistant", "user", "assistant")
    chat = [{"role": role, "content": f"{role} speaks"} for role in roles]
    write(folder / "tulu.jsonl", *(json.dumps({"messages": chat[i % 2 :], "id": i}) for i in range(40)))
    return folder


def write_mmlu(folder: Path, subjects: Sequence[str]) -> Path:
    """MMLU with a question and five examples for each subject."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, count in (("dev", 5), ("test", 1)):
        rows = [f"{subject},Which {i}?,a,b,c,d,{'ABCDA'[i]}\n" for subject in subjects for i in range(count)]
        text = "subject,question,A,B,C,D,answer\n" + "".join(rows)
        (folder / f"{split}.csv.gz").write_bytes(gzip.compress(text.encode()))
    return folder
