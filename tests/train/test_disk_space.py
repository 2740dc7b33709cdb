"""What a run writes, against the files that it has written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import lte
from lte.train import disk_space
from lte.train.config import TrainConfig
from lte.train.disk_space import (
    RunFiles,
    check_run_space,
    checkpoint_bytes,
    checkpoints_of,
    what_to_delete_of_run,
)
from lte.train.optimisers import cast_weights_
from lte.train.two_stage import stage_steps, train_two_stage
from tests.tiny_models import tiny_dense_model
from tests.train.toy import toy_rows


def model_of() -> Any:
    model = tiny_dense_model(hidden_size=128, head_dim=32, intermediate_size=512)
    return lte.sparsify_(model, lte.LteConfig(expert_size=8, grouping="contiguous"))


def config(**options: Any) -> TrainConfig:
    sizes = {"stage1_steps": 3, "stage2_steps": 3, "batch_size": 4, "save_steps": 2, "report_to": "none"}
    return TrainConfig(**{**sizes, "router_fit_tokens": 0, "calibration_tokens": 0, **options})


def bytes_in(folder: Path, *patterns: str) -> int:
    return sum(path.stat().st_size for pattern in patterns for path in folder.glob(pattern))


@pytest.mark.parametrize("options", [{}, {"weights_dtype": "bfloat16", "optim": "adamw_torch"}, {"trainable": "ffn"}])
def test_a_resume_point_has_the_bytes_that_were_estimated(
    tmp_path: Path, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    files = RunFiles.of(model_of(), config(**options))
    written = []
    complete = lte.train.trainer.complete_checkpoint

    def measured(folder: Path, state: Any) -> None:
        written.append(bytes_in(folder, "model.safetensors", "optimizer.pt"))
        complete(folder, state)

    monkeypatch.setattr("lte.train.trainer.complete_checkpoint", measured)
    train_two_stage(model_of(), toy_rows(64), config(**options), tmp_path)
    # The last one is of a stage that is finished.
    assert written[0] == pytest.approx(files.checkpoint, rel=0.1)
    assert written[-1] < 0.6 * written[0]
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-6"]


@pytest.mark.parametrize(("dtype", "narrow"), [(None, 4), ("float32", 4), ("bfloat16", 2), ("float16", 2)])
def test_a_trained_folder_has_the_bytes_that_were_estimated(tmp_path: Path, dtype: str | None, narrow: int) -> None:
    model = model_of()
    files = RunFiles.of(model, config(), dtype)
    if dtype is not None:
        cast_weights_(model, getattr(torch, dtype))
    model.save_pretrained(tmp_path)
    assert bytes_in(tmp_path, "*.safetensors") == pytest.approx(files.model, rel=0.02)
    routers = sum(p.numel() for ffn in lte.sparse_ffns(model).values() for p in ffn.router.parameters())
    assert files.model == narrow * (sum(p.numel() for p in model.parameters()) - routers) + 4 * routers


def test_adapters_have_small_resume_points_and_a_base() -> None:
    whole, adapted = (RunFiles.of(model_of(), config(lora_rank=rank)) for rank in (None, 4))
    assert whole.base == 0
    assert adapted.base > whole.model
    assert adapted.checkpoint < whole.checkpoint / 4


def test_the_most_at_a_time_is_two_resume_points_or_one_and_the_model() -> None:
    assert RunFiles(checkpoint=30, model=10).most == 60
    assert RunFiles(checkpoint=30, model=40, at_once=1, base=5).most == 75
    assert RunFiles.of(model_of(), config()).at_once == 2
    assert RunFiles.of(model_of(), config(save_steps=6)).at_once == 1


@pytest.mark.parametrize(
    ("save_steps", "steps", "expected"),
    [(1000, (3, 3), (1, False)), (6, (3, 3), (1, False)), (3, (3, 3), (2, False)), (2, (3, 3), (3, True)),
     (4, (0, 8), (2, True)), (8, (8, 0), (1, False)), (4, (4, 8), (3, True))],
)  # fmt: skip
def test_checkpoints_are_counted_and_those_of_finished_stages_have_no_moments(
    save_steps: int, steps: tuple[int, int], expected: tuple[int, bool]
) -> None:
    assert checkpoints_of(save_steps, steps) == expected


@pytest.mark.parametrize("save_steps", [1000, 3])
def test_no_moments_are_counted_where_none_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, save_steps: int
) -> None:
    options = config(save_steps=save_steps)
    files, kept = RunFiles.of(model_of(), options), RunFiles.of(model_of(), config())
    assert kept.checkpoint > 2.5 * files.checkpoint
    written, counted = [], []
    complete = lte.train.trainer.complete_checkpoint

    def measured(folder: Path, state: Any) -> None:
        written.append(bytes_in(folder, "model.safetensors", "optimizer.pt"))
        complete(folder, state)

    def check(folder: Path, trainer: Any) -> None:
        counted.append(checkpoint_bytes(trainer))

    monkeypatch.setattr("lte.train.trainer.complete_checkpoint", measured)
    monkeypatch.setattr("lte.train.trainer.check_space", check)
    train_two_stage(model_of(), toy_rows(64), options, tmp_path)
    assert max(written) == pytest.approx(files.checkpoint, rel=0.1)
    assert max(written) == pytest.approx(counted[0], rel=0.1)


def test_steps_of_epochs_are_counted_where_they_are_known() -> None:
    epochs = config(stage1_steps=-1, stage2_steps=-1, save_steps=1000)
    assert RunFiles.of(model_of(), epochs).at_once == 2
    steps = stage_steps(epochs, 64, (1, 2))
    assert steps == (16, 16)
    known = RunFiles.of(model_of(), epochs, steps=steps)
    assert known.at_once == 1
    assert known.most < RunFiles.of(model_of(), epochs).most / 2
    assert stage_steps(epochs, 64, (2,)) == (0, 16)


def test_a_disk_without_room_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = RunFiles(checkpoint=3 * 10**9, model=2 * 10**9)
    monkeypatch.setattr(disk_space, "free_bytes", lambda path: 6 * 10**9)
    check_run_space(tmp_path, files)
    monkeypatch.setattr(disk_space, "free_bytes", lambda path: 5 * 10**9)
    message = (
        r"output must have room for up to 6 GB while it trains \(a resume point has 3 GB\), 2 GB when it is finished; "
        r"got .* with 5 GB free; delete other files on that disk, take another folder, or write less: --save-dtype"
    )
    with pytest.raises(ValueError, match=message):
        check_run_space(tmp_path, files)


def test_what_can_go_is_named_and_what_must_stay(tmp_path: Path) -> None:
    train_two_stage(model_of(), toy_rows(64), config(), tmp_path / "checkpoints")
    (tmp_path / ".out.partial-1").mkdir()
    newest = tmp_path / "checkpoints" / "checkpoint-6"
    partial = tmp_path / ".out.partial-1"
    said = f"delete {partial} or other files on that disk; {newest} holds what was trained and must stay"
    assert what_to_delete_of_run(tmp_path) == said
