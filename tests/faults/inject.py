"""Faults put into training on purpose: kills, full disks and damaged files; what they did, as counts.

    python -m tests.faults.inject --kills 200 --output results/faults.json

All happens in children forked from this process, which has one thread and everything loaded. After each fault a child
resumes the run. It must end with the weights of a run that nothing disturbed; whatever counts as whole in between must
hold what that run wrote; and what was whole before the fault must still be there.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import json
import os
import random
import resource
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.update(CUDA_VISIBLE_DEVICES="", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")

import torch
from tqdm import tqdm
from typer.testing import CliRunner

from lte.eval import models
from lte.files import write_json_atomic
from lte.records import environment
from lte.runs import measure
from lte.train.checkpoints import MANIFEST_FILE, UNFINISHED_FILE, damage_of, newest_sound_checkpoint, resume_point
from lte.train.trainer import LteTrainer
from lte_cli import app
from tests.cli.conftest import SHORT, save_tiny_model
from tests.train.toy import STEPS, trainer_of

Message = dict[str, Any]
Send = Callable[[Message], None]
TIMEOUT_S = 120
DISK_SIZES = 20
# Of the kills, this share falls before file-system calls of saves; the others fall at random times of `lte train`.
SHARE_OF_SAVES = 0.8
PHASES = ("stage 1", "stage 2", "calibration", "saving", "measuring")
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
CALLS = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree"}


def forked(action: Callable[[Send], None], on_message: Callable[[int, Message], None] | None = None) -> list[Message]:
    """Runs an action in a child; returns what it sent, with an `error` last if it raised.

    Args:
        action: gets a function that sends.
        on_message: gets the child's id and each message, when it comes.
    """
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        _be_a_child(action, writer)
    os.close(writer)
    messages, rest, end = [], b"", time.monotonic() + TIMEOUT_S
    while select.select([reader], [], [], max(0.0, end - time.monotonic()))[0]:
        got = os.read(reader, 65536)
        if not got:
            break
        *lines, rest = (rest + got).split(b"\n")
        for line in lines:
            messages.append(json.loads(line))
            if on_message is not None:
                on_message(child, messages[-1])
    else:
        os.kill(child, signal.SIGKILL)
        messages.append({"error": "Timeout", "message": f"the child did not end within {TIMEOUT_S} s"})
    os.close(reader)
    os.waitpid(child, 0)
    return messages


def _be_a_child(action: Callable[[Send], None], writer: int) -> None:
    def send(message: Message) -> None:
        os.write(writer, json.dumps(message).encode() + b"\n")

    try:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)
        os.dup2(nowhere, 2)
        action(send)
    except BaseException as error:
        where = traceback.format_exc().splitlines()[-3:]
        send({"error": type(error).__name__, "message": str(error), "where": where})
    finally:
        os._exit(0)


def digest_of(model: Any) -> str:
    """SHA-256 of all weights."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode() + value.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def train(folder: Path, resume: bool, send: Send) -> None:
    """A short training; sends each checkpoint that is whole, warnings, and the digest of the weights at the end."""
    save = LteTrainer._save_checkpoint

    def told(self: LteTrainer, *args: Any, **kwargs: Any) -> None:
        save(self, *args, **kwargs)
        send({"saved": self.state.global_step})

    LteTrainer._save_checkpoint = told  # type: ignore[method-assign]
    trainer = trainer_of(folder, save_total_limit=1, disable_tqdm=True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.train(resume_from_checkpoint=resume and newest_sound_checkpoint(folder)[0] is not None)
    send({"digest": digest_of(trainer.model), "warnings": [str(each.message) for each in caught]})


def call_lte(*arguments: Any) -> None:
    """The command in this process; a failure raises with what it said."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exit_code:
        raise RuntimeError(f"exit code {result.exit_code}: {result.stderr[-500:]} {result.exception!r}")


def die_before_call(number: int, folder: Path, send: Send) -> None:
    """Kills this process before its n-th call that changes files in a folder; 0 counts them, and sends each."""
    seen = 0

    def hook(event: str, args: tuple[Any, ...]) -> None:
        nonlocal seen
        if event == "open":
            path, mode, flags = args
            changes = any(letter in mode for letter in "wax+") if isinstance(mode, str) else bool(flags & WRITES)
        else:
            path, changes = (args[0] if args else None), event in CALLS
        # What removes a folder names its files relative to an open one.
        if not changes or not isinstance(path, str | os.PathLike):
            return
        if os.path.isabs(path) and not str(path).startswith(str(folder)):  # noqa: PTH117
            return
        seen += 1
        if number == 0:
            send({"call": event})
        elif seen == number:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


class Faults:
    """All faults, one kind after the other.

    Args:
        work: an empty folder.
        kills: how many.
        seed: of the times at which they fall.
    """

    def __init__(self, work: Path, kills: int, seed: int):
        self.work, self.kills, self.random = work, kills, random.Random(seed)
        self.problems: list[str] = []
        self.number = 0

    def reference(self) -> None:
        """What undisturbed runs end with, and what their checkpoints hold."""
        self.checkpoints = self.work / "checkpoints"
        trainer = trainer_of(self.checkpoints, disable_tqdm=True)
        trainer.train()
        self.digest = digest_of(trainer.model)
        self.weights_at = {path.name: _model_sha256(path) for path in self.checkpoints.glob("checkpoint-*")}
        self.dense = save_tiny_model(self.work / "dense")
        self.command = ["train", "--model", self.dense, *SHORT, "--report-to", "none", "--save-steps", 2]
        call_lte(*self.command, "--output", self.work / "reference")
        self.trained = _sha256(self.work / "reference" / "model.safetensors")
        self.value = json.loads((self.work / "reference" / "result.json").read_text())["value"]

    def folder(self) -> Path:
        """A new one."""
        self.number += 1
        return self.work / f"run-{self.number}"

    def problem(self, what: str, *details: Any) -> None:
        """Notes that something went wrong."""
        self.problems.append(" ".join(map(str, (what, *details)))[:600])

    def check_between(self, folder: Path, messages: list[Message], what: str) -> None:
        """What is whole is right, and what was whole is there."""
        saved = max((message.get("saved", 0) for message in messages), default=0)
        newest, _ = newest_sound_checkpoint(folder)
        step = 0 if newest is None else int(newest.name.split("-")[1])
        if step < saved:
            self.problem(what, "lost a whole checkpoint: of step", saved, "is left that of", step)
        for checkpoint in folder.glob("checkpoint-*"):
            if not damage_of(checkpoint) and _model_sha256(checkpoint) != self.weights_at[checkpoint.name]:
                self.problem(what, checkpoint.name, "counts as whole and is not what was written")

    def check_resumed(self, folder: Path, what: str) -> Message:
        """Resumes a run; returns what it sent last."""
        last = forked(lambda send: train(folder, True, send))[-1]
        if last.get("digest") != self.digest:
            self.problem(what, "resumed otherwise than undisturbed:", last)
        left = [str(path.relative_to(folder)) for path in folder.rglob(".*") if path.name != ".lte.lock"]
        if left:
            self.problem(what, "left", left)
        shutil.rmtree(folder)
        return last

    def kills_in_saves(self) -> dict[str, Any]:
        """Kills before file-system calls of saves, spread over all of them."""

        def action(number: int, folder: Path) -> Callable[[Send], None]:
            def act(send: Send) -> None:
                die_before_call(number, folder, send)
                train(folder, False, send)

            return act

        folder = self.folder()
        calls = sum("call" in message for message in forked(action(0, folder)))
        wanted = round(SHARE_OF_SAVES * self.kills)
        killed = 0
        for index in range(wanted):
            number, folder = 1 + index * calls // wanted, self.folder()
            messages = forked(action(number, folder))
            killed += not any("digest" in message for message in messages)
            what = f"kill before call {number} of {calls}"
            if any("error" in message for message in messages):
                self.problem(what, messages[-1])
            self.check_between(folder, messages, what)
            self.check_resumed(folder, what)
        return {"file_system_calls": calls, "kills": killed, "resumed_bit_equal": wanted - self._new_problems()}

    def kills_in_phases(self) -> dict[str, Any]:
        """Kills of `lte train` at random times of its phases."""
        wanted = self.kills - round(SHARE_OF_SAVES * self.kills)
        killed = dict.fromkeys(PHASES, 0)
        took = self._phase_times()
        for index in range(wanted):
            phase, output = PHASES[index % len(PHASES)], self.folder()
            delay = self.random.uniform(0, 0.8 * took[phase])

            def kill(child: int, message: Message, phase: str = phase, delay: float = delay) -> None:
                if message.get("phase") == phase:
                    time.sleep(delay)
                    os.kill(child, signal.SIGKILL)

            def act(send: Send, output: Path = output) -> None:
                tell_phases(send)
                call_lte(*self.command, "--output", output)
                send({"done": True})

            def resume(send: Send, output: Path = output) -> None:
                call_lte("train", "--resume", "--output", output)
                send({"done": True})

            messages = forked(act, kill)
            killed[phase] += "done" not in messages[-1]
            what = f"kill {delay:.3f} s into {phase}"
            last = forked(resume)[-1]
            if "done" not in last:
                self.problem(what, "could not be resumed:", last)
            elif _sha256(output / "model.safetensors") != self.trained:
                self.problem(what, "resumed to other weights")
            elif json.loads((output / "result.json").read_text())["value"] != self.value:
                self.problem(what, "resumed to another result")
            left = [str(path.relative_to(output)) for path in output.rglob(".*partial*")]
            left += [str(path) for path in output.rglob(UNFINISHED_FILE)]
            if left:
                self.problem(what, "left", left)
            shutil.rmtree(output, ignore_errors=True)
        return {"kills": killed, "resumed_bit_equal": wanted - self._new_problems()}

    def _phase_times(self) -> dict[str, float]:
        """Seconds that each phase takes."""
        started: dict[str, float] = {}

        def act(send: Send) -> None:
            tell_phases(send)
            call_lte(*self.command, "--output", self.work / "timed")

        def note(child: int, message: Message) -> None:
            started.setdefault(message.get("phase", "end"), time.monotonic())

        messages = forked(act, note)
        if list(started) != list(PHASES):
            raise RuntimeError(f"lte train must go through {PHASES}, got {list(started)}: {messages[-1]}")
        ends = [*list(started.values())[1:], time.monotonic()]
        return {phase: end - start for (phase, start), end in zip(started.items(), ends, strict=True)}

    def full_disks(self) -> dict[str, Any]:
        """A largest size of files, as if the disk were full, from the start or from the second checkpoint on."""
        # The moments that the newest one lacks, since its stage is finished, are in those before it.
        largest = max(path.stat().st_size for path in self.checkpoints.glob("checkpoint-*/*"))
        failed = 0
        for index in range(DISK_SIZES):
            size, folder = round((largest + 1) ** (index / (DISK_SIZES - 1))), self.folder()
            late = index % 2 == 1

            def act(send: Send, size: int = size, late: bool = late, folder: Path = folder) -> None:
                signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
                limit = (size, resource.RLIM_INFINITY)

                def noted(message: Message) -> None:
                    send(message)
                    resource.setrlimit(resource.RLIMIT_FSIZE, limit)

                if not late:
                    resource.setrlimit(resource.RLIMIT_FSIZE, limit)
                train(folder, False, noted)

            messages = forked(act)
            what = f"files of at most {size} bytes, {'later' if late else 'from the start'}"
            last = messages[-1]
            if "error" in last:
                failed += 1
                named = f"{folder}/checkpoint-" in last["message"] and "free there" in last["message"]
                if last["error"] != "OSError" or not named or "delete " not in last["message"]:
                    self.problem(what, "is no message that names file and remedy:", last)
            elif last.get("digest") != self.digest:
                self.problem(what, "ended otherwise:", last)
            self.check_between(folder, messages, what)
            self.check_resumed(folder, what)
        return {"sizes": DISK_SIZES, "failed": failed, "resumed_bit_equal": DISK_SIZES - self._new_problems()}

    def damaged_files(self) -> dict[str, Any]:
        """Each file of the newest checkpoint cut, emptied, removed, or with one bit changed."""
        names = sorted(path.name for path in (self.checkpoints / f"checkpoint-{STEPS}").iterdir())
        # A run in CI takes two for each file.
        all_of_them, count = self.kills >= 200, 0
        for index, name in enumerate(names):
            damages = list(DAMAGES) if all_of_them else ["half", list(DAMAGES)[1 + index % (len(DAMAGES) - 1)]]
            for damage in damages:
                count += 1
                folder = self.folder()
                shutil.copytree(self.checkpoints, folder)
                checkpoint = folder / f"checkpoint-{STEPS}"
                DAMAGES[damage](checkpoint / name)
                what = f"{name}: {damage}"
                try:
                    resume_point(folder, str(checkpoint), {})
                    self.problem(what, "is accepted")
                except ValueError as error:
                    if str(checkpoint) not in str(error) or not (name in str(error) or MANIFEST_FILE in str(error)):
                        self.problem(what, "is not named:", error)
                last = self.check_resumed(folder, what)
                text = " ".join(last.get("warnings", []))
                if f"checkpoint-{STEPS}: " not in text or f"checkpoint-{STEPS - 2}" not in text:
                    self.problem(what, "is passed over without a word:", text)
        return {"files": len(names), "damages": count, "resumed_bit_equal": count - self._new_problems()}

    def _new_problems(self) -> int:
        """How many things went wrong in the kind that just ended."""
        count = len(self.problems) - getattr(self, "_counted", 0)
        self._counted = len(self.problems)
        return count


def _halved(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _flipped(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "half": _halved,
    "missing": Path.unlink,
    "one bit": _flipped,
    "empty": lambda path: path.write_bytes(b""),
}


def tell_phases(send: Send) -> None:
    """Makes `lte train` send where it is."""

    def before(owner: Any, name: str, phase: Callable[[Any], str]) -> None:
        original = getattr(owner, name)

        def told(*args: Any, **kwargs: Any) -> Any:
            send({"phase": phase(args[0] if args else None)})
            return original(*args, **kwargs)

        setattr(owner, name, told)

    before(LteTrainer, "begin_step", lambda t: f"stage {1 if t.state.global_step < t.schedule.stage1_steps else 2}")
    before(LteTrainer, "_set_thresholds", lambda _: "calibration")
    # The command imports these when it is called.
    before(models, "save_folder", lambda _: "saving")
    before(measure, "measure_folder", lambda _: "measuring")


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _model_sha256(checkpoint: Path) -> str | None:
    path = checkpoint / "model.safetensors"
    return _sha256(path) if path.exists() else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    tqdm.monitor_interval = 0  # Its thread would be missing in the children.
    start = time.monotonic()
    found: dict[str, Any] = {"command": f"python -m tests.faults.inject --kills {options.kills}", **environment()}
    with tempfile.TemporaryDirectory() as work:
        faults = Faults(Path(work), options.kills, options.seed)
        faults.reference()
        # Else each child would copy all pages of this process to look for garbage in them: 0.9 s.
        gc.freeze()
        for name in ("kills_in_saves", "kills_in_phases", "full_disks", "damaged_files"):
            began = time.monotonic()
            found[name] = {**getattr(faults, name)(), "seconds": round(time.monotonic() - began, 1)}
            print(name, found[name], flush=True)
    found |= {"seed": options.seed, "seconds": round(time.monotonic() - start, 1), "problems": faults.problems}
    write_json_atomic(options.output, found)
    print(f"{len(faults.problems)} problems", *faults.problems, sep="\n")


if __name__ == "__main__":
    main()
