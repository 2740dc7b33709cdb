"""Packs the records of finished runs: the JSON files of each folder become lines of its `records.jsonl`.

    python results/pack.py results

What is no result record stays a file, written anew with each row of a benchmark on a line where that is smaller.
Nothing is lost: before a file goes, what its line reads as is compared with it. `lte report`, `lte compare` and
`lte.records` read lines and files alike; this shows the records of a folder:

    python -m json.tool --json-lines results/compare/mrpc/records.jsonl | less
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lte.files import write_text_atomic
from lte.records import FILE_KEY, PACKED_FILE, REQUIRED_FIELDS, packed_record, parse_json


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, help="folders; those below them are packed, too")
    for folder in parser.parse_args().folders:
        for path in sorted({file.parent for file in folder.rglob("*.json")}):
            pack(path)


def pack(folder: Path) -> None:
    """Packs the records that lie in a folder itself."""
    lines: dict[str, str] = {}
    packed = folder / PACKED_FILE
    if packed.exists():
        lines = {json.loads(line)[FILE_KEY]: line for line in packed.read_text(encoding="utf-8").splitlines()}
    done = []
    for path in sorted(folder.glob("*.json")):
        content = parse_json(path.read_text(encoding="utf-8"))
        if not isinstance(content, Mapping) or not set(REQUIRED_FIELDS) <= set(content):
            text = checked(content, file_text(content))
            if len(text.encode()) < path.stat().st_size:
                write_text_atomic(path, text)
            continue
        text = json.dumps(packed_record(content), separators=(",", ":"), allow_nan=False)
        lines[path.name] = f'{{"{FILE_KEY}":{json.dumps(path.name)},{checked(content, text)[1:]}'
        done.append(path)
    if done:
        write_text_atomic(packed, "".join(f"{lines[name]}\n" for name in sorted(lines)))
        for path in done:
            path.unlink()


def file_text(content: Any) -> str:
    """A file's text, the rows of a benchmark on a line each."""
    rows = content.get("rows") if isinstance(content, Mapping) else None
    if not rows or not isinstance(rows, list):
        return json.dumps(content, indent=1, allow_nan=False) + "\n"
    text = json.dumps({**content, "rows": []}, indent=1, allow_nan=False)
    lines = ",\n  ".join(json.dumps(row, allow_nan=False) for row in rows)
    # One space before it is the outermost level, and a line break within a text is an escape.
    return text.replace('\n "rows": []', f'\n "rows": [\n  {lines}\n ]') + "\n"


def checked(content: Any, text: str) -> str:
    """The text, if it reads as the content, every number bit for bit.

    Raises:
        ValueError: if it does not.
    """
    if repr(parse_json(text)) != repr(content):
        raise ValueError("a packed file must read as it was, got another content; this is an error of lte.records")
    return text


if __name__ == "__main__":
    main()
