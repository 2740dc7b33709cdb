"""Doing the runs of a comparison, alone or shared with other processes."""

from __future__ import annotations

import math
import time
import traceback
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch

from lte.config import check_choice
from lte.data.rows import mean_row_tokens
from lte.methods import METHODS
from lte.records import PACKED_FILE, ResultRecord, find_record, write_record
from lte.runs.folders import Folders, Made, make_run
from lte.runs.measure import failure_record, measured_record
from lte.runs.memory import free_memory, others_fill_gpu
from lte.runs.plan import Run, children_of, parents_of
from lte.runs.settings import PHASES, ComparisonSettings
from lte.runs.workload import Workload, Workloads
from lte.train.objective import NonFiniteLossError

# What a run may fail by; anything else comes with a traceback.
EXPECTED = (ValueError, NonFiniteLossError, torch.OutOfMemoryError)
POLL_S = 1.0
# A run that other processes leave no room on the GPU is tried again.
MEMORY_TRIES = 5
MEMORY_WAIT_S = 30.0


class Runner:
    """Does what has no record yet.

    Args:
        comparison: settings.
        runs: of `plan_runs`.
        folders: where models and records go.
        workloads: the data.
        only: names of the runs that are wanted; empty wants all.
        report: gets a line per run.
        phase: train trains models and measures none, which another process can do meanwhile or later; measure leaves
            all training to others.

    Raises:
        ValueError: for an unknown phase.
    """

    def __init__(
        self,
        comparison: ComparisonSettings,
        runs: Sequence[Run],
        folders: Folders,
        workloads: Workloads,
        only: Collection[str] = (),
        report: Callable[[str], None] = print,
        phase: str = "both",
    ):
        check_choice("phase", phase, PHASES)
        self.comparison, self.runs, self.folders = comparison, runs, folders
        self.workloads, self.report, self.phase = workloads, report, phase
        self._tries: Counter[str] = Counter()
        self._later: dict[str, float] = {}
        self._announced: set[str] = set()
        self._has_read = False
        self.wanted = [run for run in runs if run.measured and (not only or run.name in only)]

    def begin(self) -> None:
        """Makes the folders, and tells of records that were made with other settings."""
        self.folders.output.mkdir(parents=True, exist_ok=True)
        self.folders.work.mkdir(parents=True, exist_ok=True)
        self.folders.clean_up()
        for run in self.wanted:
            path = self.folders.record(run)
            record = find_record(path)
            if record is not None and record.config.get("fingerprint") != run.fingerprint:
                if record.failure and path.exists():
                    # A mistake that was corrected since must not stand in the way.
                    path.unlink(missing_ok=True)
                    self.report(f"{run.name}: failed with other settings, done again.")
                    continue
                place = path if path.exists() else f"its line in {path.with_name(PACKED_FILE)}"
                self.report(f"{run.name}: kept, but made with other settings; delete {place} to do it again.")

    def advance(self) -> bool:
        """Does the first run of the plan that is ready and that nobody else does; says whether there was one.

        One at a time, so that a run that others have made ready meanwhile comes before those below it.
        """
        todo = self.todo()
        if todo and not self._has_read:
            # Data that cannot be read is no failure of a run.
            self.workloads.of(todo[0])
            self._has_read = True
        return any(self._try(run) for run in todo)

    def begin_to_wait(self, runs: Sequence[Run]) -> None:
        """Says what others are to do, and leaves them the memory."""
        # Of a run that waits for memory a line was written already.
        names = ", ".join(run.name for run in runs if run.name not in self._later)
        others = "a process that trains" if self.phase == "measure" else "other processes, which do"
        if names:
            self.report(f"Waiting for {others} {names}.")
        free_memory(_compiles(runs[0]))

    def failed(self) -> list[str]:
        """The names of the wanted runs whose record says why they failed."""
        # After training alone there is no record yet.
        records = {run.name: find_record(self.folders.record(run)) for run in self.wanted}
        return [name for name, record in records.items() if record is not None and record.failure]

    def todo(self) -> list[Run]:
        """The runs to do, and those whose models they need, in order."""
        names: set[str] = set()
        for run in reversed(self.runs):
            needed = any(child.name in names and self._needs(child, run) for child in children_of(run, self.runs))
            missing_record = run in self.wanted and self._lacks_record(run)
            if missing_record or (needed and not self._has_model(run)):
                names.add(run.name)
        return [run for run in self.runs if run.name in names and (self.phase != "train" or self._is_to_train(run))]

    def _is_to_train(self, run: Run) -> bool:
        return run.trains and not self._has_model(run)

    def _has_model(self, run: Run) -> bool:
        return self.folders.made(run) is not None

    def _try(self, run: Run) -> bool:
        """Does a run if it is still to do, nobody else does it, and its parents are there; says whether it did."""
        if not self._is_ready(run):
            return False
        with self.folders.lock(run) as mine:
            if not mine or run not in self.todo() or not self._is_ready(run):
                return False
            start = time.monotonic()
            try:
                record = self._do(run)
            except Exception as error:
                if isinstance(error, torch.OutOfMemoryError) and self._put_off(run):
                    return True
                if not isinstance(error, EXPECTED):
                    traceback.print_exc()
                self._fail(run, f"{type(error).__name__}: {' '.join(str(error).split())}")
                if not _device_works():
                    # Nothing else can run in this process.
                    raise
            else:
                self.report(_line(run, record, time.monotonic() - start))
        self._clean_up(run)
        return True

    def _put_off(self, run: Run) -> bool:
        """Leaves a run that did not fit beside other processes for later; says whether it may fit then."""
        if not self._may_fit_later(run):
            return False
        self._tries[run.name] += 1
        self.report(f"{run.name}: no room on the GPU beside other processes, tried again in {MEMORY_WAIT_S:.0f} s")
        self._later[run.name] = time.monotonic() + MEMORY_WAIT_S
        return True

    def _may_fit_later(self, run: Run) -> bool:
        return self._tries[run.name] < MEMORY_TRIES - 1 and others_fill_gpu()

    def _is_ready(self, run: Run) -> bool:
        if time.monotonic() < self._later.get(run.name, 0):
            return False
        if self.phase == "measure" and self._is_to_train(run):
            return False
        return all(self._has_model(parent) for parent in parents_of(run, self.runs) if self._needs(run, parent))

    def _needs(self, run: Run, parent: Run) -> bool:
        """Whether the parent's model is to make the run's, or to be timed beside it."""
        untimed = run.measured and not self.folders.has_record(run)
        return not self._has_model(run) or (untimed and parent.name == self._timed_beside(run))

    def _timed_beside(self, run: Run) -> str | None:
        """The dense model that a run without one of its own is timed beside."""
        smaller = run.method in METHODS and METHODS[run.method].removes_neurons
        return run.base if self.comparison.latency and smaller else None

    def _do(self, run: Run) -> ResultRecord | None:
        """Makes and measures a run; `None` without a record of its own."""
        free_memory(_compiles(run))
        work = self.workloads.of(run)
        for line in work.announcements:
            if line not in self._announced:
                self._announced.add(line)
                self.report(f"Data: {line}")
        made = self.folders.made(run)
        if made is not None and made.data_info["train"]["sha256"] != work.info["train"]["sha256"]:
            raise ValueError(
                f"data must be what the model in {self.folders.model(run)} was made with, got other rows; "
                "delete the work folder to make all models anew"
            )
        if made is None:
            base = next((parent for parent in parents_of(run, self.runs) if parent.name == run.base), None)
            before = None if base is None else self.folders.made(base)
            made = make_run(run, self.comparison.model, self.folders, work, before)
        if self.phase == "train" or run not in self.wanted:
            return None
        record = None
        if not self.folders.has_record(run):
            record = self._measure(run, work, made)
        for weights in self._rounded(run):
            try:
                self.report(f"{run.name} in {weights}: {_numbers(self._measure(run, work, made, weights))}")
            # Whatever it is, a GPU without a kernel say: the model as it is was measured.
            except Exception as error:
                if isinstance(error, torch.OutOfMemoryError) and self._may_fit_later(run):
                    raise
                failure = f"{type(error).__name__}: {' '.join(str(error).split())}"
                self.report(f"{run.name} in {weights}: FAILED {failure}")
                rounded = failure_record(run, self.comparison, work, failure, weights)
                write_record(self.folders.record(run, weights), rounded)
                if not _device_works():
                    raise
        return record

    def _measure(self, run: Run, work: Workload, made: Made, weights: str = "native") -> ResultRecord:
        """Measures a model, with its weights rounded or as they are, and writes the record."""
        beside = self._timed_beside(run)
        record = measured_record(run, self.comparison, self.folders, work, made, beside, weights)
        write_record(self.folders.record(run, weights), record)
        self.folders.questions(run, weights).unlink(missing_ok=True)
        return record

    def _rounded(self, run: Run) -> list[str]:
        """What the run's weights are still to be rounded to and measured; pruned ones are not, whose zeros would go."""
        if run.method in METHODS and METHODS[run.method].zeroes_weights:
            return []
        return [each for each in self.comparison.weights if find_record(self.folders.record(run, each)) is None]

    def _fail(self, run: Run, failure: str) -> None:
        """Writes what failed into the record of a run, and of those that need its model if there is none."""
        self.report(f"{run.name}: FAILED {failure}")
        if run in self.wanted and not self.folders.has_record(run):
            record = failure_record(run, self.comparison, self.workloads.unread(run), failure)
            write_record(self.folders.record(run), record)
        if self._has_model(run):
            return
        for child in children_of(run, self.runs):
            if not self._has_model(child):
                self._fail(child, f"it needs {run.name}, which failed: {failure}")

    def _clean_up(self, run: Run) -> None:
        """Deletes models that nobody needs any more."""
        for one in (run, *parents_of(run, self.runs)):
            if not one.options.keep and not self._is_needed(one):
                self.folders.delete_model(one)

    def _is_needed(self, run: Run) -> bool:
        """Whether a run of the whole comparison, wanted now or not, is to measure this model or to start from it."""
        # Of a run that failed when it was measured the model is kept: it need not train again.
        if self._lacks_record(run) or self._failed(run):
            return True
        return any(
            # A model is also measured beside its parents.
            self._lacks_record(child) or (not self._has_model(child) and self._is_needed(child))
            for child in children_of(run, self.runs)
        )

    def _lacks_record(self, run: Run) -> bool:
        """Whether the run is to be measured; with rounded weights alone if its model is still there."""
        if not run.measured:
            return False
        if not self.folders.has_record(run):
            return True
        return bool(self._rounded(run)) and self._has_model(run) and not self._failed(run)

    def _failed(self, run: Run) -> bool:
        record = find_record(self.folders.record(run)) if run.measured else None
        return record is not None and bool(record.failure)


def execute_all(runners: Sequence[Runner]) -> list[str]:
    """Does all runs of some comparisons, or waits for other processes that do; returns the names of those that failed.

    Every process that is started with the same folders takes the next run that no other one has, of the first
    comparison that has one, and so goes on with the next comparison while others do the last runs of one.
    """
    for runner in runners:
        runner.begin()
    waiting = False
    while pending := [runner for runner in runners if runner.todo()]:
        if any(runner.advance() for runner in pending):
            waiting = False
            continue
        if not waiting:
            pending[0].begin_to_wait([run for runner in pending for run in runner.todo()])
        waiting = True
        time.sleep(POLL_S)
    return [name for runner in runners for name in runner.failed()]


def _compiles(run: Run) -> bool:
    return bool(run.values.get("compile"))


def _device_works() -> bool:
    """Whether the GPU still answers: after some errors of a kernel it does not, for this process."""
    try:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


def _line(run: Run, record: ResultRecord | None, seconds: float) -> str:
    if record is None:
        return f"{run.name}: made ({seconds:.0f} s)"
    return f"{run.name}: {_numbers(record)} ({seconds:.0f} s)"


def _numbers(record: ResultRecord) -> str:
    return (
        f"{record.metric} {record.value:.4f}, sparsity {100 * (record.sparsity or 0.0):.2f}%, "
        f"{(record.bytes_per_token or 0.0) / 1e6:.2f} MB per token"
    )


@dataclass(frozen=True)
class Estimate:
    """One line of a dry run.

    Attributes:
        run: which.
        steps: optimiser steps.
        tokens: about, in all forward passes with a backward pass.
        done: whether its record exists.
    """

    run: Run
    steps: int
    tokens: int
    done: bool


def estimate_run(run: Run, workloads: Workloads, folders: Folders) -> Estimate:
    """Steps and tokens of a run, from the rows that it would train on."""
    done = run.measured and folders.has_record(run)
    if not run.trains:
        return Estimate(run, 0, 0, done)
    rows, config = workloads.of(run).train, run.train_config
    whole, rest = divmod(len(rows), config.batch_size)
    batches = whole + bool(rest and not config.leaves_out_last_batch(len(rows)))
    per_epoch = max(1, math.ceil(batches / config.gradient_accumulation_steps))
    budget = {1: (config.stage1_steps, config.stage1_epochs), 2: (config.stage2_steps, config.stage2_epochs)}
    steps = sum(
        given if given > 0 else math.ceil(epochs * per_epoch)
        for stage, (given, epochs) in budget.items()
        if stage in run.stages
    )
    per_step = config.batch_size * config.gradient_accumulation_steps * mean_row_tokens(rows)
    return Estimate(run, steps, round(steps * per_step), done)
