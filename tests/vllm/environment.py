"""vLLM in an environment of its own, which `make vllm-env` makes; without it the tests that need it are skipped.

Where `CI` is set, as `.ci/run` does after it has made the environment, they fail instead.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
PYTHON = ROOT / ".vllm-env" / "bin" / "python"
PROGRAMS = Path(__file__).parent / "programs"

needs_vllm = pytest.mark.skipif(
    not PYTHON.exists() and not os.environ.get("CI"), reason="needs vLLM in .vllm-env: make vllm-env"
)


def vllm_environment(**changes: str) -> dict[str, str]:
    """The variables of a process of vLLM: its own packages, this checkout, one thread, no network."""
    own = {
        name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV", "TRITON"))
    }
    fixed = {
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "INFO",
        "PYTHONPATH": str(ROOT / "src"),
    }
    return {**own, **fixed, **changes}


def run_program(name: str, argument: Any, *, timeout_s: float = 240, **changes: str) -> list[Any]:
    """Runs a program of `tests/vllm/programs` with a JSON argument; the JSON after each `RESULT ` that it prints."""
    command = [PYTHON, PROGRAMS / name, json.dumps(argument)]
    done = subprocess.run(
        command, env=vllm_environment(**changes), capture_output=True, text=True, timeout=timeout_s, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return [json.loads(line[7:]) for line in done.stdout.splitlines() if line.startswith("RESULT ")]
