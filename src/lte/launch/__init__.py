"""accelerate's configs for sharded training, shipped with the package: `lte configs` lists and copies them."""

from __future__ import annotations

from pathlib import Path

FOLDER = Path(__file__).parent


def shipped_configs() -> dict[str, str]:
    """What each config is for, by its name: the first comment of its file."""
    found = {}
    for path in sorted(FOLDER.glob("*.yaml")):
        first = path.read_text(encoding="utf-8").splitlines()[0]
        found[path.stem] = first.removeprefix("#").strip()
    return found
