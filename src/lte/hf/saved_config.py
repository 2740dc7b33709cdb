"""Changing fields of the config of a saved folder, whose weights stay as they are."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lte.files import explained_write_errors, write_text_atomic
from lte.hf.checkpoints import read_checksums, reading, record_checksums

CONFIG_FILE = "config.json"


def rewrite_config(folder: str | Path, changes: Mapping[str, Any]) -> None:
    """Replaces fields of a folder's `config.json`, and what its checksums say of that file; all else stays, bit by bit.

    Each of the two files is replaced as a whole. A process that dies between them leaves a folder that loads with the
    new config, of which `lte inspect --verify` says that its config has changed.

    Args:
        folder: of a saved model.
        changes: the fields, JSON-ready.

    Raises:
        UnreadableModelError: if the config cannot be read.
        OSError: if a file cannot be written; the config is then as it was.
    """
    path = Path(folder) / CONFIG_FILE
    with reading(folder):
        fields = json.loads(path.read_text(encoding="utf-8"))
    # As transformers writes it.
    text = json.dumps({**fields, **changes}, indent=2, sort_keys=True, allow_nan=False) + "\n"
    with explained_write_errors(path):
        write_text_atomic(path, text)
        if read_checksums(folder) is not None:
            record_checksums(folder, [CONFIG_FILE])
