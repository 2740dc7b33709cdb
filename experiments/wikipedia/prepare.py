"""Turns the experiment's texts into token files for `run.py`: one `.npy` of uint16 tokens and one of document lengths.

    python experiments/wikipedia/prepare.py --data DATA --model MODEL.gguf --output CACHE

DATA holds `wikipedia/{train,valid}.jsonl.xz`, `books/books.jsonl.xz` (a `text` field per line) and
`wikitext2/wiki.test.raw.gz`. Every document ends with the end-of-text token.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import lzma
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from lte.hf.dense import load_tokenizer

SOURCES = {
    "wikipedia_train": "wikipedia/train.jsonl.xz",
    "wikipedia_valid": "wikipedia/valid.jsonl.xz",
    "books": "books/books.jsonl.xz",
    "wikitext2_test": "wikitext2/wiki.test.raw.gz",
}


def documents(path: Path) -> Iterator[str]:
    """The texts of a JSONL file, or a raw text file as one document."""
    if path.name.endswith(".jsonl.xz"):
        with lzma.open(path, "rt", encoding="utf-8") as lines:
            yield from (json.loads(line)["text"] for line in lines)
    else:
        with gzip.open(path, "rt", encoding="utf-8") as text:
            yield text.read()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    tokenizer = load_tokenizer(args.model)
    if len(tokenizer) > 1 << 16:
        raise SystemExit(f"the vocabulary must fit in 16 bits, got {len(tokenizer)} tokens")
    hashes = {}
    for name, relative in SOURCES.items():
        path = args.data / relative
        hashes[relative] = hashlib.sha256(path.read_bytes()).hexdigest()
        encoded = []
        texts = list(documents(path))
        for start in range(0, len(texts), 64):
            for ids in tokenizer(texts[start : start + 64], add_special_tokens=False)["input_ids"]:
                encoded.append(np.array([*ids, tokenizer.eos_token_id], dtype=np.uint16))
        np.save(args.output / f"{name}.npy", np.concatenate(encoded))
        np.save(args.output / f"{name}_lengths.npy", np.array([len(ids) for ids in encoded]))
        print(f"{name}: {len(encoded)} documents, {sum(map(len, encoded))} tokens")
    (args.output / "sha256.json").write_text(json.dumps(hashes, indent=1) + "\n")


if __name__ == "__main__":
    main()
