"""Whether the files of a saved model are those that were saved, and whether they load, without loading them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import transformers
from safetensors import safe_open

from lte.files import damage
from lte.hf.checkpoints import CHECKSUM_FILE, UnreadableModelError, is_finite, load_whole, read_checksums, reading
from lte.hf.dense import model_location
from lte.hf.families import family_of, saved_head
from lte.hf.loading import FP32_NAMES


def verify(folder: str | Path) -> list[str]:
    """What is wrong with a model's folder, a sentence each; an empty list if nothing is.

    All files are read: they must be those that were saved, bit by bit, hold the whole model, and no NaN or infinity. A
    folder without checksums, saved by lte 0.1 or by another tool, is read in the same way, but changed bits stay
    unknown: `lte.hf.checkpoints.read_checksums` returns `None` for it.

    Args:
        folder: of a sparse or dense model on this machine.

    Raises:
        ValueError: if there is no such folder.
    """
    path = Path(folder).expanduser()
    if not path.is_dir():
        raise ValueError(f"folder must be a model's folder on this machine, got folder={folder}")
    try:
        found = damage(path, read_checksums(path) or {})
    except ValueError as error:
        found = [f"{CHECKSUM_FILE} is damaged: {error}"]
    fault = loading_fault(path)
    found += [fault] if fault else [f"{name} holds NaN or infinity" for name in _not_finite(path, lambda name: True)]
    return found


def loading_fault(source: str | Path) -> str | None:
    """Why a model on this machine does not load, in a sentence; `None` if it does, or is on the hub alone.

    The names and shapes of all tensors are compared with the config, and routers and thresholds are read.

    Args:
        source: a folder, hub name or GGUF file.
    """
    path = Path(source).expanduser()
    if not path.is_dir():
        return None
    try:
        with reading(source):
            location = model_location(source)
            config = transformers.AutoConfig.from_pretrained(**location)
            auto_class = getattr(transformers, saved_head(config) or next(iter(family_of(config).models)))
        load_whole(auto_class, location, device_map="meta")
        wrong = list(_not_finite(path, lambda name: not FP32_NAMES.isdisjoint(name.split("."))))
    except UnreadableModelError as error:
        return str(error)
    return f"model must hold finite routers, got NaN or infinity in {', '.join(wrong[:3])}" if wrong else None


def _not_finite(folder: Path, wanted: Callable[[str], bool]) -> Iterator[str]:
    """The names of tensors in a folder's weight files that hold NaN or infinity."""
    for path in sorted(folder.glob("model*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in filter(wanted, file.keys()):
                tensor: Any = file.get_tensor(name)
                if not is_finite(tensor):
                    yield f"{path.name}: {name}"
