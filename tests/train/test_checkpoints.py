"""Checkpoints that are damaged, unfinished, of another run or of another process, and disks without room."""

from __future__ import annotations

import copy
import errno
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections import namedtuple
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from transformers import TrainerCallback

import lte
from lte.data.rows import LmCollator, TokenRows
from lte.train import checkpoints
from lte.train.checkpoints import (
    LOCK_FILE,
    UNFINISHED_FILE,
    clean_up,
    damage_of,
    folder_lock,
    newest_checkpoint,
    newest_sound_checkpoint,
    rotate_checkpoints,
)
from lte.train.disk_space import checkpoint_bytes
from lte.train.fingerprint import data_fingerprint
from lte.train.trainer import LteTrainer
from tests.tiny_models import PAD, tiny_dense_model
from tests.train.toy import STEPS, toy_rows, trainer_of


def trained(folder: Path, resume: Any = None, **options: Any) -> dict[str, torch.Tensor]:
    trainer = trainer_of(folder, **options)
    trainer.train(resume_from_checkpoint=resume)
    return trainer.model.state_dict()


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(one[name].equal(other[name]) for name in one)


def said(action: Any) -> tuple[Any, str]:
    """The result of an action, and what it warned of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = action()
    return result, " | ".join(str(each.message) for each in caught if issubclass(each.category, UserWarning))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    """A finished run with its checkpoints, and its weights."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    torch.manual_seed(0)
    return folder, trained(folder)


@pytest.fixture
def run(whole: Any, tmp_path: Path) -> Path:
    """A copy of the run whose newest checkpoint is that of step 4."""
    shutil.copytree(whole[0], tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / f"checkpoint-{STEPS}")
    return tmp_path / "run"


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("name", ["optimizer.pt", "model.safetensors", "lte_control.json", "lte_manifest.json"])
def test_a_changed_bit_is_found_and_the_checkpoint_before_is_taken(whole: Any, run: Path, name: str) -> None:
    flip_a_bit(run / "checkpoint-4" / name)
    weights, text = said(lambda: trained(run, resume=True))
    assert f"going on from {run / 'checkpoint-2'}, since a newer one cannot be used (checkpoint-4: " in text
    assert same(weights, whole[1])


def test_a_damaged_checkpoint_that_is_named_is_refused(run: Path) -> None:
    (run / "checkpoint-4" / "scheduler.pt").unlink()
    with pytest.raises(ValueError, match=r"got .*checkpoint-4, where scheduler.pt is missing; pass True to take"):
        trained(run, resume=str(run / "checkpoint-4"))


def test_a_run_without_a_sound_checkpoint_says_what_is_wrong_with_each(run: Path) -> None:
    (run / "checkpoint-2" / "optimizer.pt").write_bytes(b"cut")
    (run / "checkpoint-4" / "lte_control.json").write_text("{")
    reasons = r"checkpoint-4: lte_control.json has 1 bytes where .*checkpoint-2: optimizer.pt has 3 bytes where .*"
    with pytest.raises(ValueError, match=f"got none in .*{reasons}; delete its checkpoints to start anew"):
        trained(run, resume=True)


def make_earlier(checkpoint: Path) -> None:
    """Takes away what the version before did not write."""
    (checkpoint / "lte_manifest.json").unlink()
    path = checkpoint / "lte_control.json"
    state = json.loads(path.read_text())
    path.write_text(json.dumps({name: state[name] for name in ("eta", "controller", "tokens_trained")}))


def test_checkpoints_of_an_earlier_version_resume_with_a_warning(whole: Any, run: Path) -> None:
    for step in (2, 4):
        make_earlier(run / f"checkpoint-{step}")
    weights, text = said(lambda: trained(run, resume=True))
    assert "checkpoint-4 is of an earlier version, so it could not be checked" in text
    assert same(weights, whole[1])


@pytest.mark.parametrize("name", ["optimizer.pt", "rng_state.pth", "trainer_state.json", "model.safetensors"])
def test_those_that_are_cut_short_are_passed_over(whole: Any, run: Path, name: str) -> None:
    for step in (2, 4):
        make_earlier(run / f"checkpoint-{step}")
    path = run / "checkpoint-4" / name
    path.write_bytes(path.read_bytes()[:100])
    weights, text = said(lambda: trained(run, resume=True))
    assert f"checkpoint-4: {name} cannot be read" in text
    assert same(weights, whole[1])
    path.unlink()
    if name != "model.safetensors":
        assert damage_of(run / "checkpoint-4") == [f"{name} is missing"]


def test_an_older_one_goes_only_when_the_new_one_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[Path | None] = []
    complete = checkpoints.complete_checkpoint

    def spy(folder: Path, state: dict[str, Any]) -> None:
        found.append(newest_sound_checkpoint(tmp_path)[0])
        complete(folder, state)
        found.append(newest_sound_checkpoint(tmp_path)[0])

    monkeypatch.setattr("lte.train.trainer.complete_checkpoint", spy)
    trained(tmp_path, save_total_limit=1)
    assert [None if path is None else path.name for path in found] == [
        None, *("checkpoint-2", "checkpoint-2"), *("checkpoint-4", "checkpoint-4"), "checkpoint-6",
    ]  # fmt: skip
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-6"]


def test_rotation_keeps_the_best_and_takes_what_cannot_be_used_first(run: Path) -> None:
    for step, saved_at in ((6, 0.0), (8, 3.0)):
        shutil.copytree(run / "checkpoint-4", run / f"checkpoint-{step}")
        path = run / f"checkpoint-{step}" / "lte_control.json"
        path.write_text(json.dumps({"saved_at": saved_at})) if saved_at else path.unlink()
    rotate_checkpoints(run / "checkpoint-4", 3, str(run / "checkpoint-2"))
    assert sorted(path.name for path in run.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4", "checkpoint-8"]
    rotate_checkpoints(run / "checkpoint-4", 1, str(run / "checkpoint-2"))
    assert sorted(path.name for path in run.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]


def test_a_second_training_in_the_same_folder_goes_on_from_its_own_checkpoint(whole: Any, tmp_path: Path) -> None:
    shutil.copytree(whole[0], tmp_path / "run")

    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 3:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "run", callbacks=[Stop()])
    assert newest_checkpoint(tmp_path / "run") == tmp_path / "run" / "checkpoint-2"
    assert same(trained(tmp_path / "run", resume=True), whole[1])


def test_what_killed_processes_left_goes_and_nothing_else(run: Path) -> None:
    (run / ".run.yaml.123.partial").write_text("half")
    (run / ".run.partial-abc").mkdir()
    (run / ".run.partial-abc" / "model.safetensors").write_text("half")
    (run / "checkpoint-6").mkdir()
    (run / "checkpoint-6" / UNFINISHED_FILE).touch()
    (run / "checkpoint-4" / UNFINISHED_FILE).touch()
    # Of a stock trainer, which writes no mark.
    (run / "checkpoint-7").mkdir()
    (run / "checkpoint-7" / "model.safetensors").write_text("of somebody else")
    (run / ".notes").write_text("mine")
    (run / "checkpoint-9").write_text("no folder")
    clean_up(run)
    names = {path.name for path in run.iterdir()}
    assert names >= {"checkpoint-2", "checkpoint-4", "checkpoint-7", ".notes"}
    assert not names & {".run.yaml.123.partial", ".run.partial-abc", "checkpoint-6"}
    assert not (run / "checkpoint-4" / UNFINISHED_FILE).exists()


def test_a_folder_is_that_of_one_training_at_a_time(tmp_path: Path) -> None:
    with folder_lock(tmp_path), pytest.raises(ValueError, match=f"got {tmp_path}, into which another one trains now"):
        trained(tmp_path)
    assert not (tmp_path / LOCK_FILE).exists()
    with folder_lock(tmp_path):
        trained(tmp_path, save_strategy="no")  # writes nothing there
    with folder_lock(tmp_path / "new"):
        assert (tmp_path / "new" / LOCK_FILE).exists()
    assert not (tmp_path / "new").exists()


def test_the_lock_of_a_killed_process_does_not_block(tmp_path: Path) -> None:
    # What `folder_lock` takes, without all that the trainer imports.
    code = "import filelock, os, time\n"
    code += f"with filelock.FileLock({str(tmp_path / LOCK_FILE)!r}):\n"
    # A worker of the data loader outlives its parent by moments.
    code += "    if os.fork() == 0: time.sleep(1); os._exit(0)\n    print('held', flush=True); time.sleep(60)\n"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with pytest.raises(ValueError, match="another one trains now"), folder_lock(tmp_path):
            pass
        other.send_signal(signal.SIGKILL)
        other.wait()
        start = time.monotonic()
        with folder_lock(tmp_path):
            assert time.monotonic() - start < 2
    with folder_lock(tmp_path):
        pass


def other_rows() -> TokenRows:
    """The rows of the run but for one token of the last one."""
    rows = toy_rows(16, 16)
    changed = [row.copy() for row in rows.input_ids]
    changed[-1][-1] = 5 if changed[-1][-1] != 5 else 6
    return TokenRows(changed, rows.labels)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rows": other_rows()}, r"training_data=\(sha256 \w+\) where it began with training_data=\(sha256 \w+\)"),
        ({"rows": toy_rows(20, 16)}, r"training_data=\(rows 20, sha256 \w+\) where it began with .*\(rows 16, "),
        ({"target": 0.25}, r"target_sparsity=0.25 where it began with target_sparsity=0.5"),
        ({"recipe": "annealed"}, r"recipe=annealed where it began with recipe=straight_through"),
        ({"learning_rate": 1e-3}, r"learning_rate=0.001 where it began with learning_rate=0.003"),
        ({"max_steps": 8}, r"steps=\(max_steps 8\) where it began with steps=\(max_steps 6\)"),
        ({"seed": 1}, r"seed=1 where it began with seed=42"),
        ({"per_device_train_batch_size": 8}, r"rows_per_pass=8 where it began with rows_per_pass=4"),
        ({"lr_scheduler_type": "cosine"}, r"lr_scheduler_type=cosine where it began with lr_scheduler_type=linear"),
        ({"teacher": tiny_dense_model()}, r"distillation_weight=1.0 where it began with distillation_weight=0.0"),
    ],
    ids=["data", "rows", "target", "recipe", "rate", "steps", "seed", "batch", "schedule", "teacher"],
)
def test_other_data_and_settings_are_refused(run: Path, options: dict[str, Any], message: str) -> None:
    before = sorted(path.name for path in run.rglob("*"))
    with pytest.raises(ValueError, match=f"must keep its data and settings, got some that differ: .*{message}"):
        trained(run, resume=True, **options)
    assert sorted(path.name for path in run.rglob("*")) == before


def test_a_model_of_other_shapes_or_another_teacher_is_refused(tmp_path: Path) -> None:
    trained(tmp_path, teacher=tiny_dense_model(), max_steps=2)
    teacher = tiny_dense_model()
    with torch.no_grad():
        teacher.lm_head.weight[0] += 1
    with pytest.raises(ValueError, match=r"differ: teacher=\w+ where it began with teacher=\w+ \("):
        trained(tmp_path, resume=True, teacher=teacher, max_steps=2)
    trainer = trainer_of(tmp_path, teacher=tiny_dense_model(), max_steps=2)
    trainer.model.lm_head.weight.requires_grad_(False)
    with pytest.raises(ValueError, match=r"differ: model=\(shapes .* parameters, \w+\) where"):
        trainer.train(resume_from_checkpoint=True)


def test_settings_that_change_no_weights_are_free(whole: Any, run: Path) -> None:
    options = {"logging_steps": 3, "save_steps": 3, "save_total_limit": 1, "dataloader_num_workers": 1}
    weights, text = said(lambda: trained(run, resume=True, **options))
    assert same(weights, whole[1])
    assert "resumed run" not in text


def test_other_devices_are_told_of(run: Path) -> None:
    options = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    _, text = said(lambda: trained(run, resume=True, **options))
    assert "may not end with the same numbers: it has rows_per_pass=2 where it began with rows_per_pass=4; " in text


@dataclass
class OwnArguments(lte.LteTrainingArguments):
    """Arguments with a field of the user's own."""

    note: str = "a"


def test_fields_that_users_add_are_told_of(whole: Any, run: Path) -> None:
    def resumed() -> dict[str, torch.Tensor]:
        args = trainer_of(run).args
        own = OwnArguments(**{each.name: getattr(args, each.name) for each in fields(args) if each.init}, note="b")
        trainer = trainer_of(run)
        trainer.routing = own
        trainer.train(resume_from_checkpoint=True)
        return trainer.model.state_dict()

    weights, text = said(resumed)
    assert "it has own_settings=(note b) where it began with own_settings=(note None)" in text
    assert same(weights, whole[1])


class Noisy(torch.utils.data.Dataset):
    """Rows with noise in them."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": torch.randint(3, 9, (5,))}


class Augmented(Noisy):
    """Rows of which the last alone has noise in it."""

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return super().__getitem__(index) if index == 3 else {"input_ids": torch.arange(5)}


class Stream(torch.utils.data.IterableDataset):
    """A stream that knows its length."""

    def __len__(self) -> int:
        return 16

    def __iter__(self) -> Any:
        return iter(uneven_rows())


@pytest.mark.parametrize("options", [{"lr_scheduler_type": "constant"}, {"recipe": "annealed"}, {"rows": Stream()}])
def test_a_finished_run_takes_no_step_more(tmp_path: Path, options: dict[str, Any]) -> None:
    first, second = trainer_of(tmp_path, **options), trainer_of(tmp_path, **options)
    first.train()
    second.train(resume_from_checkpoint=True)
    assert second.state.global_step == STEPS
    assert second.tokens_trained == first.tokens_trained > 0
    assert same(first.model.state_dict(), second.model.state_dict())


def test_weights_alone_are_gone_on_from_with_a_warning(tmp_path: Path) -> None:
    trained(tmp_path, save_only_model=True, max_steps=4)
    shutil.rmtree(tmp_path / "checkpoint-4")
    _, text = said(lambda: trained(tmp_path, resume=True, save_only_model=True, max_steps=4))
    assert "checkpoint-2 holds weights alone (save_only_model)" in text


def test_the_fingerprint_of_data_is_that_of_its_rows() -> None:
    rows = {"input_ids": [[1, 2], [3], [4, 5, 6]], "labels": [[1, 2], [3], [4, 5, 6]], "text": ["a", "b", None]}
    data = datasets.Dataset.from_dict(rows)
    found = data_fingerprint(data)
    assert found is not None
    assert found["rows"] == 3
    pieces = datasets.concatenate_datasets([data.select([0]), data.select([1, 2])])
    assert data_fingerprint(pieces) == data_fingerprint(data.with_format("torch")) == found
    assert data_fingerprint(data.select([0, 2, 1])) != found
    # The same tokens in rows of other lengths.
    assert data_fingerprint(datasets.Dataset.from_dict({**rows, "input_ids": [[1], [2, 3], [4, 5, 6]]})) != found
    stream = data.to_iterable_dataset()
    assert data_fingerprint(stream) == data_fingerprint(data.to_iterable_dataset())
    assert data_fingerprint(stream) != data_fingerprint(data.select([1, 2]).to_iterable_dataset())
    assert data_fingerprint(None) is None


def test_data_that_cannot_be_compared_is_left_alone() -> None:
    state = torch.get_rng_state()
    assert data_fingerprint(Noisy()) is None
    assert torch.equal(torch.get_rng_state(), state)
    objects = [{"input_ids": [1], "kept": object()}]
    assert data_fingerprint(objects) == data_fingerprint([{"input_ids": [1], "kept": object()}])
    once = iter([{"input_ids": [1]}, {"input_ids": [2]}])
    assert data_fingerprint(once) is None
    assert len(list(once)) == 2
    assert data_fingerprint(Augmented()) is None
    assert data_fingerprint([]) == {"rows": 0, "sha256": hashlib.sha256().hexdigest()[:16]}


def test_rows_of_any_kind_have_a_fingerprint() -> None:
    texts = [np.array([letter * 9, "b"], dtype=object) for letter in "aa"]
    arrays = [data_fingerprint([{"kept": text, 3: torch.eye(2).to_sparse()}]) for text in texts]
    assert arrays[0] == arrays[1]
    assert arrays[0] != data_fingerprint([{"kept": texts[0][::-1], 3: torch.eye(2).to_sparse()}])
    # The order of what is in a set is another one in each process.
    assert data_fingerprint([{"tags": {1, 9, 17}}]) == data_fingerprint([{"tags": {17, 9, 1}}])
    found = data_fingerprint(Stream())
    assert found is not None
    assert found["rows"] is None


def test_of_large_files_spread_rows_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = {"image": [{"bytes": b"x" * 100, "path": str(index)} for index in range(8)]}
    data = datasets.Dataset.from_dict(rows)
    monkeypatch.setattr("lte.train.fingerprint._CHUNK", 1)
    found = data_fingerprint(data)
    rows["image"][3] = {"bytes": b"x" * 99 + b"y", "path": "3"}
    changed = datasets.Dataset.from_dict(rows)
    assert data_fingerprint(changed) != found
    monkeypatch.setattr("lte.train.fingerprint.READ_BYTES", data.data.nbytes / 2)
    assert data_fingerprint(changed) == data_fingerprint(data) != found


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        RuntimeError("[enforce fail at inline_container.cc:665] . unexpected pos 4160 vs 4054"),
        RuntimeError("PytorchStreamWriter failed writing file data/3: file write failed"),
    ],
)
def test_a_disk_that_fills_is_a_sentence_and_the_run_goes_on_later(
    whole: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    save, calls = torch.save, []

    def full(*args: Any, **kwargs: Any) -> None:
        calls.append(args)
        if len(calls) > 9:
            raise error
        save(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        remedy = "delete checkpoint-2 beside it, then resume from checkpoint-4"
        message = rf"{tmp_path}/checkpoint-6 could not be written \([\d.]+ MB are free there\): .*; {remedy}"
        with pytest.raises(OSError, match=message):
            trained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-2", "checkpoint-4"]
    assert same(trained(tmp_path, resume=True), whole[1])


def test_a_disk_without_room_for_a_checkpoint_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = trainer_of(tmp_path / "out", save_total_limit=2)
    size = sum(p.numel() for p in trainer.model.parameters()) * (4 + 8)
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(size - 1))
    with pytest.raises(ValueError, match=r"must have room for a checkpoint of about .* GB free; delete other"):
        trainer.train()
    assert not list((tmp_path / "out").iterdir())
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(2 * size))
    assert "3 checkpoints of about" in said(lambda: trained(tmp_path / "out", save_total_limit=2))[1]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(3 * size))
    assert "checkpoints of about" not in said(lambda: trained(tmp_path / "more", save_total_limit=2))[1]


def test_the_moments_of_narrow_weights_are_narrow(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path)
    trainer.model.to(torch.bfloat16)
    assert checkpoint_bytes(trainer) == 6 * sum(p.numel() for p in trainer.model.parameters())


def test_a_folder_that_cannot_be_written_is_refused_before_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read_only(dir: Path) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    trainer = trainer_of(tmp_path)
    monkeypatch.setattr("lte.files.tempfile.TemporaryFile", read_only)
    with pytest.raises(ValueError, match=f"^output_dir must be .* got output_dir={tmp_path}: Read-only file system"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_an_upload_that_fails_is_no_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Refused(OSError):
        """As the errors of clients of the hub."""

    def refused(self: LteTrainer, *args: Any) -> None:
        raise Refused("401 Unauthorized")

    monkeypatch.setattr(LteTrainer, "_save_scaler", refused)
    with pytest.raises(Refused, match=r"^401 Unauthorized$"):
        trained(tmp_path)
    assert (tmp_path / "checkpoint-2" / "model.safetensors").exists()
    assert newest_checkpoint(tmp_path) is None


def test_other_errors_stay_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(torch, "save", broken)
    with pytest.raises(RuntimeError, match=r"^a bug$"):
        trained(tmp_path)


def padded_left(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    batch = LmCollator(PAD)(rows)
    batch.setdefault("attention_mask", torch.ones_like(batch["input_ids"]))
    flipped = {name: value.flip(1) for name, value in batch.items()}
    return {**flipped, "position_ids": (flipped["attention_mask"].cumsum(1) - 1).clamp(min=0)}


LENGTHS = [4 + index % 9 for index in range(16)]


def uneven_rows(packed: bool = False) -> list[dict[str, torch.Tensor]]:
    rows = [{"input_ids": torch.arange(3, 3 + n), "labels": torch.arange(3, 3 + n)} for n in LENGTHS]
    for row in rows if packed else []:
        n = len(row["input_ids"])
        # Two documents in a row; the first label of each is not trained.
        row["position_ids"] = torch.cat([torch.arange(2), torch.arange(n - 2)])
        row["labels"][[0, 2]] = -100
    return rows


@pytest.mark.parametrize("kind", ["right", "left", "packed"])
@pytest.mark.parametrize("passes", [1, 3, 8])
def test_tokens_are_counted_whatever_the_padding_and_the_accumulation(tmp_path: Path, kind: str, passes: int) -> None:
    trainer = trainer_of(
        tmp_path, rows=uneven_rows(kind == "packed"), save_strategy="no", max_steps=-1, num_train_epochs=2,
        gradient_accumulation_steps=passes,
    )  # fmt: skip
    trainer.data_collator = padded_left if kind == "left" else LmCollator(PAD)
    trainer.train()
    assert trainer.tokens_trained == 2 * sum(LENGTHS)


def test_tokens_go_on_from_those_of_the_checkpoint(tmp_path: Path) -> None:
    options = {"rows": uneven_rows(), "max_steps": -1, "num_train_epochs": 3, "gradient_accumulation_steps": 2}
    first = trainer_of(tmp_path, **copy.deepcopy(options))
    first.train()
    shutil.rmtree(tmp_path / "checkpoint-6")
    second = trainer_of(tmp_path, **copy.deepcopy(options))
    second.train(resume_from_checkpoint=True)
    assert first.tokens_trained == second.tokens_trained == 3 * sum(LENGTHS)


def test_counting_prompts_knows_padding_on_the_left() -> None:
    rows = uneven_rows()[:2]
    mask = lte.data.rows.PromptsCounted(padded_left)(rows)["token_mask"]
    assert mask.sum(1).tolist() == LENGTHS[:2]
    assert mask[:, -1].all()


def test_a_checkpoint_reaches_the_disk_before_its_manifest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    synced, renamed = os.fsync, Path.replace

    def fsync(descriptor: int) -> None:
        events.append(Path(f"/proc/self/fd/{descriptor}").readlink().name)
        synced(descriptor)

    def replace(self: Path, target: Path) -> Path:
        events.append(f"-> {Path(target).name}")
        return renamed(self, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "replace", replace)
    trained(tmp_path, max_steps=2)
    before = events[: events.index("-> lte_manifest.json")]
    names = {path.name for path in (tmp_path / "checkpoint-2").iterdir()} - {"lte_manifest.json"}
    assert names <= set(before)
    assert events[-1] == tmp_path.name
