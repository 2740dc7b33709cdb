"""Where a comparison keeps its models, records and locks, and making the model of a run there."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from filelock import SoftFileLock, Timeout

from lte.eval.models import save_folder
from lte.files import write_json_atomic
from lte.records import find_record
from lte.runs.memory import peak_memory_bytes
from lte.runs.pipeline import ModelSettings, make_model
from lte.runs.plan import Run
from lte.runs.workload import Workload

MADE_FILE, SETTINGS_FILE = "made.json", "settings.json"
STALE_S = 3600


@dataclass(frozen=True)
class Made:
    """What a model folder says of how it was made.

    Attributes:
        fingerprint: of the run.
        tokens_trained: by this run alone.
        tokens_since_start: by this run and what it started from, without the start of the seed.
        tokens_start: by the start of the seed.
        wall_time_s: seconds of training, or of fitting where nothing trained.
        data_info: counts and checksums of the data.
        eta: weight of the efficiency loss at the end, of LTE.
        layer_history: each layer's active fraction over training, see `lte.train.summary.TrainingSummary`.
        peak_memory_bytes: the most memory while it was made.
    """

    fingerprint: str
    tokens_trained: int
    tokens_since_start: int
    tokens_start: int
    wall_time_s: float
    data_info: dict[str, Any]
    eta: float | None = None
    layer_history: dict[str, list[Any]] | None = None
    peak_memory_bytes: int = 0


@dataclass(frozen=True)
class Folders:
    """The files of a comparison.

    Attributes:
        output: of the records.
        work: of models, checkpoints and locks.
    """

    output: Path
    work: Path

    def record(self, run: Run, weights: str = "native") -> Path:
        """The file of a run's record, or of that with rounded weights."""
        return self.output / f"{run.name}{'' if weights == 'native' else f'-{weights}'}.json"

    def questions(self, run: Run, weights: str = "native") -> Path:
        """The file of the question sets that a run has answered so far."""
        return self.work / f"{self.record(run, weights).stem}.questions.json"

    def has_record(self, run: Run) -> bool:
        """Whether the record is there, as a file or packed with others."""
        return find_record(self.record(run)) is not None

    def model(self, run: Run) -> Path:
        """The folder of a run's model."""
        return self.work / run.name

    def made(self, run: Run) -> Made | None:
        """What is said of a run's model, `None` if it is not there or was made with other settings.

        Raises:
            ValueError: if that cannot be read.
        """
        path = self.model(run) / MADE_FILE
        try:
            made = Made(**json.loads(path.read_text(encoding="utf-8")))
        # Another process may delete it at any time.
        except FileNotFoundError:
            return None
        except (ValueError, TypeError) as error:
            raise ValueError(
                f"{path} must say how the model was made, got what cannot be read ({error}); delete {path.parent} to "
                "make it anew"
            ) from None
        return made if made.fingerprint == run.fingerprint else None

    def checkpoints(self, run: Run) -> Path:
        """The folder of a run's checkpoints; those of other settings are dropped."""
        folder = self.work / f"{run.name}.checkpoints"
        settings = folder / SETTINGS_FILE
        if folder.exists():
            fingerprint = None
            with suppress(FileNotFoundError, ValueError):
                fingerprint = json.loads(settings.read_text(encoding="utf-8"))
            if fingerprint != run.fingerprint:
                shutil.rmtree(folder)
        if not folder.exists():
            write_json_atomic(settings, run.fingerprint)
        return folder

    def save(self, run: Run, model: Any, tokenizer: Any, made: Made) -> None:
        """Saves a model so that its folder appears when it is complete, and drops the checkpoints."""
        folder = self.model(run)
        partial = folder.with_name(f"{run.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        save_folder(model, tokenizer, partial)
        write_json_atomic(partial / MADE_FILE, asdict(made))
        self.delete_model(run)
        partial.replace(folder)
        shutil.rmtree(self.work / f"{run.name}.checkpoints", ignore_errors=True)

    def delete_model(self, run: Run) -> None:
        """Removes a model; another process may do so at the same time."""
        doomed = self.work / f"{run.name}.deleted-{os.getpid()}"
        with suppress(FileNotFoundError):
            self.model(run).rename(doomed)
        # Another process may clean up at the same time.
        shutil.rmtree(doomed, ignore_errors=True)

    def clean_up(self) -> None:
        """Removes what processes left that died while they deleted a model or, an hour ago, wrote a file."""
        for doomed in self.work.glob("*.deleted-*"):
            shutil.rmtree(doomed, ignore_errors=True)
        for partial in (*self.work.glob(".*.partial"), *self.output.glob(".*.partial")):
            # Others may write here now.
            with suppress(FileNotFoundError):
                if time.time() - partial.stat().st_mtime > STALE_S:
                    partial.unlink()

    @contextmanager
    def lock(self, run: Run) -> Iterator[bool]:
        """Gives whether this process alone works on a run now.

        The lock file names process and host, also across hosts that share the folder. That of a process of this host
        which is dead is taken over at the second try.
        """
        lock = SoftFileLock(self.work / f"{run.name}.lock", timeout=0)
        try:
            lock.acquire()
        except Timeout:
            yield False
            return
        try:
            yield True
        finally:
            lock.release()


def make_run(run: Run, model: str, folders: Folders, work: Workload, before: Made | None) -> Made:
    """Makes a run's model and saves it to its folder.

    Args:
        run: what to make.
        model: that the comparison starts from.
        folders: where the run's base and its teacher are.
        work: its data.
        before: what is said of the run's base; `None` where that is `model`.

    Raises:
        ValueError: if the settings do not fit the model.
        NonFiniteLossError: if the training diverges.
    """
    teacher = run.teacher if run.trains else None
    settings = ModelSettings(
        start=model if run.base is None else str(folders.work / run.base),
        config=run.method_config,
        train=run.train_config,
        trains=run.trains,
        stages=run.stages,
        teacher=str(folders.work / teacher) if teacher and (folders.work / teacher).exists() else teacher,
        relu=run.relu,
    )
    trained, summary = make_model(settings, work, folders.checkpoints(run) if run.trains else folders.work, resume=True)
    tokens = summary.tokens_trained
    made = Made(
        fingerprint=run.fingerprint,
        tokens_trained=tokens,
        tokens_since_start=0 if run.is_start else tokens + (before.tokens_since_start if before else 0),
        tokens_start=tokens if run.is_start else (before.tokens_start if before else 0),
        wall_time_s=summary.wall_time_s,
        data_info=work.info,
        eta=summary.eta,
        layer_history=summary.layer_history(),
        peak_memory_bytes=peak_memory_bytes(),
    )
    folders.save(run, trained, work.tokenizer, made)
    return made
