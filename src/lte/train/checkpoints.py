"""Checkpoints that are whole, or known not to be: what is written last, which one a run goes on from, what is stale.

While a checkpoint is written, a hidden file marks it. When all its files have reached the disk, their sizes and
checksums are written, and the mark goes.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import shutil
import time
import warnings
import zipfile
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from safetensors import SafetensorError, safe_open

from lte.files import LOCK_FILE as LOCK_FILE
from lte.files import checksums, damage, sync, write_json_atomic
from lte.files import folder_lock as folder_lock
from lte.train.fingerprint import differences

CONTROL_STATE_FILE, MANIFEST_FILE, UNFINISHED_FILE = "lte_control.json", "lte_manifest.json", ".unfinished"
# What an earlier version wrote into a checkpoint, together or, with `save_only_model`, not at all.
_STATES = ("optimizer.pt", "scheduler.pt", "rng_state*.pth")


def clean_up(folder: Path) -> None:
    """Removes what killed processes left in a folder that this process holds: half-written files and checkpoints."""
    for partial in (*folder.glob(".*.partial"), *folder.glob(".*.partial-*")):
        shutil.rmtree(partial) if partial.is_dir() else partial.unlink(missing_ok=True)
    for mark in folder.glob(f"checkpoint-*/{UNFINISHED_FILE}"):
        if _is_half_written(mark.parent):
            shutil.rmtree(mark.parent)
        else:
            mark.unlink()


def begin_checkpoint(folder: Path) -> None:
    """Makes a folder that is known as unfinished; one that was there goes."""
    if folder.exists():
        discard_checkpoint(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / UNFINISHED_FILE).touch()
    sync(folder)


def complete_checkpoint(folder: Path, state: dict[str, Any]) -> None:
    """Brings a checkpoint to the disk and writes last what says that it is whole.

    Args:
        folder: with all that the trainer writes.
        state: for `lte_control.json`.
    """
    now = time.time()
    write_json_atomic(folder / CONTROL_STATE_FILE, {**state, "saved_at": now})
    for path in folder.rglob("*"):
        sync(path)
    sync(folder)
    files = checksums(folder)
    write_json_atomic(folder / MANIFEST_FILE, {"saved_at": now, "files": files, "sha256": _digest(files)})
    (folder / UNFINISHED_FILE).unlink(missing_ok=True)
    sync(folder.parent)


def discard_checkpoint(folder: Path) -> None:
    """Removes a checkpoint so that what is left of it if the process dies is known as unfinished."""
    with suppress(OSError):  # The disk may be full, which is why it goes.
        (folder / UNFINISHED_FILE).touch()
    (folder / MANIFEST_FILE).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def discard_checkpoints(folder: Path) -> None:
    """Removes the checkpoints of a run that is finished, the newest one last."""
    for path in reversed(in_order(folder)):
        discard_checkpoint(path)


def rotate_checkpoints(newest: Path, limit: int | None, best: str | None) -> None:
    """Removes the oldest checkpoints beside a whole one, unfinished and damaged ones first, so that `limit` remain.

    Args:
        newest: a whole checkpoint, which stays.
        limit: how many remain; `None` or 0 keeps all.
        best: another one that stays.
    """
    if not limit or limit < 0:
        return
    kept = {newest.resolve(), *([Path(best).resolve()] if best else [])}
    others = [path for path in in_order(newest.parent) if path.resolve() not in kept]
    # First those that cannot be gone on from.
    others.sort(key=lambda path: (path / CONTROL_STATE_FILE).is_file(), reverse=True)
    for path in others[max(0, limit - len(kept)) :]:
        discard_checkpoint(path)


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that was finished; its files are not looked at."""
    return next((path for path in in_order(folder) if is_finished(path)), None)


def has_checkpoint(folder: Path) -> bool:
    """Whether there is a checkpoint, damaged or not, other than those that a killed process had begun to write."""
    return any(not _is_half_written(path) for path in in_order(folder))


def newest_sound_checkpoint(folder: Path) -> tuple[Path | None, dict[Path, list[str]]]:
    """The newest checkpoint of which every file is as it was written.

    Returns:
        Its folder, `None` if there is none, and by folder what is wrong with those that come before it.
    """
    passed: dict[Path, list[str]] = {}
    for path in in_order(folder):
        found = damage_of(path)
        if not found:
            return path, passed
        passed[path] = found
    return None, passed


def resume_point(folder: Path, wanted: str | Path | Literal[True], fingerprint: dict[str, Any]) -> Path:
    """The checkpoint to go on from, of the same run.

    Args:
        folder: of the checkpoints.
        wanted: a checkpoint; `True` takes the newest one of which every file is as it was written.
        fingerprint: of the run that is to go on, see `lte.train.fingerprint`.

    Raises:
        ValueError: if there is none, if that one is damaged, or if its run had other data or settings.
    """
    checkpoint: Path | None
    if wanted is True:
        checkpoint, passed = newest_sound_checkpoint(folder)
        reasons = "; ".join(f"{path.name}: {phrase(found)}" for path, found in passed.items())
        if checkpoint is None:
            raise ValueError(
                f"output_dir must hold a complete checkpoint to resume, got none in {folder}"
                + (f" ({reasons}); delete its checkpoints to start anew" if reasons else "")
            )
        if passed:
            warnings.warn(f"going on from {checkpoint}, since a newer one cannot be used ({reasons})", stacklevel=4)
    else:
        checkpoint = Path(wanted)
        found = damage_of(checkpoint)
        if found:
            raise ValueError(
                f"resume_from_checkpoint must be a complete checkpoint of this trainer, got {checkpoint}, where "
                f"{phrase(found)}; pass True to take the newest complete one"
            )
    before = control_state_of(checkpoint).get("fingerprint")
    if before is None:
        warnings.warn(
            f"{checkpoint} is of an earlier version, so it could not be checked that its files are as they were "
            "written and that data and settings are still the same",
            stacklevel=4,
        )
        return checkpoint
    other, doubtful = differences(before, fingerprint)
    if other:
        raise ValueError(
            f"a resumed run must keep its data and settings, got some that differ: {'; '.join(other)} ({checkpoint}); "
            "give it what it began with, or start a new run with another output folder"
        )
    if doubtful:
        warnings.warn(f"the resumed run may not end with the same numbers: it has {'; '.join(doubtful)}", stacklevel=4)
    if not any(path.name.startswith(("optimizer", "global_step")) for path in checkpoint.iterdir()):
        warnings.warn(
            f"{checkpoint} holds weights alone (save_only_model), so training goes on with a new optimiser and ends "
            "with other numbers",
            stacklevel=4,
        )
    return checkpoint


def damage_of(checkpoint: Path) -> list[str]:
    """What is wrong with a checkpoint, a phrase for each file; nothing if a run can go on from it."""
    if not checkpoint.is_dir():
        return ["it is no folder"]
    if _is_half_written(checkpoint):
        return ["it was not finished"]
    try:
        if is_of_earlier_version(checkpoint):
            return _damage_of_earlier(checkpoint)
        manifest = _read(checkpoint / MANIFEST_FILE)
        if manifest["sha256"] != _digest(manifest["files"]):
            return [f"{MANIFEST_FILE} has changed since it was written"]
        return damage(checkpoint, manifest["files"])
    except FileNotFoundError as error:
        return [f"{Path(error.filename).name} is missing"]
    except (ValueError, KeyError, TypeError):
        unread = MANIFEST_FILE if (checkpoint / MANIFEST_FILE).exists() else CONTROL_STATE_FILE
        return [f"{unread} cannot be read"]


def is_of_earlier_version(checkpoint: Path) -> bool:
    """Whether a checkpoint was written before there were checksums."""
    return not (checkpoint / MANIFEST_FILE).exists() and "saved_at" not in _read(checkpoint / CONTROL_STATE_FILE)


def control_state_of(checkpoint: Path) -> dict[str, Any]:
    """The content of `lte_control.json`."""
    return _read(checkpoint / CONTROL_STATE_FILE)


def phrase(found: list[str]) -> str:
    """Some damages as the part of a sentence."""
    return ", ".join(found[:3]) + (f" and {len(found) - 3} more" if len(found) > 3 else "")


def _damage_of_earlier(checkpoint: Path) -> list[str]:
    """Whether the files can be read at all: archives and tensor files that were cut short cannot."""
    found = [] if (checkpoint / "trainer_state.json").is_file() else ["trainer_state.json is missing"]
    missing = [name for name in _STATES if next(checkpoint.glob(name), None) is None]
    # DeepSpeed and FSDP write folders in their place.
    if 0 < len(missing) < len(_STATES) and not any(path.is_dir() for path in checkpoint.iterdir()):
        found += [f"{name.replace('*', '')} is missing" for name in missing]
    for path in checkpoint.iterdir():
        try:
            if path.suffix == ".json":
                _read(path)
            elif path.suffix == ".safetensors":
                with safe_open(path, "pt"):
                    pass
            elif path.suffix in (".pt", ".pth") and not zipfile.is_zipfile(path):
                raise ValueError
        except (ValueError, OSError, SafetensorError):
            found.append(f"{path.name} cannot be read")
    return found


def in_order(folder: Path) -> list[Path]:
    """The checkpoints of a folder, newest first: by the time at which they were written, else by their step."""
    found = [path for path in folder.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    found = [path for path in found if path.is_dir()]
    return sorted(found, key=lambda path: (_saved_at(path), int(path.name.split("-")[-1])), reverse=True)


def _saved_at(checkpoint: Path) -> float:
    for name in (CONTROL_STATE_FILE, MANIFEST_FILE):
        with suppress(OSError, ValueError, TypeError):
            return float(_read(checkpoint / name).get("saved_at", 0.0))
    # Of this one nothing is known, and it is said why it is passed over.
    return math.inf


def is_finished(checkpoint: Path) -> bool:
    return (checkpoint / CONTROL_STATE_FILE).is_file() and not _is_half_written(checkpoint)


def _is_half_written(checkpoint: Path) -> bool:
    return (checkpoint / UNFINISHED_FILE).exists() and not (checkpoint / MANIFEST_FILE).exists()


def _read(path: Path) -> dict[str, Any]:
    content = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold an object, got {type(content).__name__}")
    return content


def _digest(files: Any) -> str:
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()
