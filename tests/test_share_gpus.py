"""The script that shares comparisons over GPUs, with a stand-in for Python."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

SCRIPT = Path(__file__).parents[1] / "experiments" / "share_gpus.sh"
STAND_IN = """#!/usr/bin/env bash
echo "$CUDA_VISIBLE_DEVICES $OMP_NUM_THREADS $4 $5 [$7]"
[[ $4 != bad.yaml ]] || exit 3
"""


def share(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    python = folder / "python"
    python.write_text(STAND_IN)
    python.chmod(0o755)
    env = {**os.environ, "PYTHON": str(python), "CUDA_VISIBLE_DEVICES": "2,5", "OMP_NUM_THREADS": "1"}
    command = ["bash", str(SCRIPT), *arguments]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False)


def test_each_gpu_has_its_processes_that_begin_with_different_files(tmp_path: Path) -> None:
    found = share(tmp_path, "2", "a/mrpc.yaml", "rte.yaml", "--", "--data-dir", "my glue")
    assert (found.returncode, found.stdout, found.stderr) == (0, "", "")
    logs = {path.name: path.read_text().strip() for path in (tmp_path / "runs" / "logs").iterdir()}
    assert logs == {
        "gpu2.1.log": "2 1 a/mrpc.yaml rte.yaml [my glue]",
        "gpu5.1.log": "5 1 rte.yaml a/mrpc.yaml [my glue]",
        "gpu2.2.log": "2 1 a/mrpc.yaml rte.yaml [my glue]",
        "gpu5.2.log": "5 1 rte.yaml a/mrpc.yaml [my glue]",
    }


def test_one_that_fails_fails_the_script(tmp_path: Path) -> None:
    assert share(tmp_path, "1", "good.yaml", "bad.yaml").returncode == 1
    assert len(list((tmp_path / "runs" / "logs").iterdir())) == 2


def test_it_says_how_to_call_it(tmp_path: Path) -> None:
    for wrong in (["0", "a.yaml"], ["two", "a.yaml"], ["1", "--", "a.yaml"]):
        found = share(tmp_path, *wrong)
        assert found.returncode == 2
        assert "share_gpus.sh PROCESSES FILE... -- FLAG..." in found.stderr
