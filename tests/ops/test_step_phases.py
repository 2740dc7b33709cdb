"""The time by phase of the CUDA decoding step, whose kernel runs on the CPU here."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from lte.ops.step.cuda import CudaEngine
from lte.ops.step.phases import PHASES, STAMPS, phase_us
from tests.ops.step_emulator import Emulator
from tests.ops.step_plans import Shape, new_caches, random_plan, step_inputs

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")


@pytest.mark.parametrize("shape", [Shape(), Shape(experts=0), Shape(post_norms=True, windows=(4, 0))], ids=str)
def test_each_phase_has_its_time(shape: Shape, tmp_path: Path) -> None:
    plan = random_plan(shape, torch.float32)
    machine = Emulator(blocks=3, threads=64, shared_bytes=80000, folder=tmp_path)
    step = CudaEngine(plan, machine).bind(new_caches(plan, 1, 8), TRACE=STAMPS)
    inputs = step_inputs(plan, 1, 0, [0])
    found = phase_us(step, inputs, shape.layers)
    assert [name.split(" ", 1)[1] for name in found] == list(PHASES)
    assert all(0 <= mean <= slowest for mean, slowest in found.values())
    assert found["9 neurons"][0] > 0
    noted = 3 + len(PHASES) * shape.layers
    with pytest.raises(ValueError, match=f"step must note {noted + 11} times in each block, got {noted} to {noted}"):
        phase_us(step, inputs, shape.layers + 1)
