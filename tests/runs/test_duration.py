"""The estimate of a run's time, from its first steps."""

from __future__ import annotations

from pathlib import Path

import pytest

from lte.runs.duration import RunShape
from lte.train.callbacks import StepTimes
from lte.train.config import TrainConfig
from tests.train.toy import trainer_of


def shape(**options: object) -> RunShape:
    config = TrainConfig(save_steps=100, calibration_tokens=10_000, report_to="none")
    given = {"config": config, "stages": (1, 2), "tokens_per_step": 1000, "tokens_measured": 50_000, "teaches": True}
    sizes = {"checkpoint_bytes": 10**10, "model_bytes": 2 * 10**9}
    return RunShape(**{**given, **sizes, **options})  # type: ignore[arg-type]


def test_all_parts_are_in_it() -> None:
    # A step of 4 passes over 1000 tokens: 0.5 ms a token and pass.
    assert shape().parts(step_s=2.0, steps=250) == pytest.approx(
        {"training": 500, "checkpoints": 60, "thresholds": 20, "saving": 4, "measuring": 25}
    )
    assert shape(teaches=False).parts(1.5, 10)["thresholds"] == pytest.approx(20)
    assert shape(stages=(1,)).parts(2.0, 10)["thresholds"] == 0
    assert shape(measured_s=7.0).parts(2.0, 10)["measuring"] == 7
    said = shape().sentence(elapsed_s=61.0, step_s=2.0, steps=250)
    assert said == "About 11 min in all: 61 s until now, 8 min training, 60 s checkpoints, 20 s thresholds, " + (
        "4.0 s saving, 25 s measuring."
    )
    assert "in all, without the answers that it will write: " in shape().sentence(1.0, 2.0, 250, writes_answers=True)


@pytest.mark.parametrize(("after", "calls"), [(3, 1), (4, 1), (6, 0)])
def test_steps_are_told_of_once(tmp_path: Path, after: int, calls: int) -> None:
    told: list[tuple[float, int]] = []
    times = StepTimes(lambda step_s, steps: told.append((step_s, steps)), after)
    times.SKIPPED = 1
    trainer = trainer_of(tmp_path, callbacks=[times], save_strategy="no")
    trainer.train()
    assert len(told) == calls
    if calls:
        assert told[0][1] == 6 - (after + 1)
        assert 0 < told[0][0] < 60
    # In a second training it is measured anew.
    trainer.train()
    assert len(told) == 2 * calls
