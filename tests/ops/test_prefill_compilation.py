"""The kernels for many tokens compile for sm_80 and sm_90, without a GPU, with wide accesses and without spills."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.ops.compile_prefill_kernels import NAMES

ROOT = Path(__file__).parents[2]
Rows = list[dict[str, Any]]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Rows:
    """A row per compiled kernel."""
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    env |= {"TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton")), "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}"}
    command = [sys.executable, "-m", "tests.ops.compile_prefill_kernels"]
    run = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return [json.loads(line) for line in run.stdout.splitlines()]


def test_all_kernels_compile_for_both_architectures(rows: Rows) -> None:
    assert {(row["kernel"], row["arch"]) for row in rows} == {(name, arch) for name in NAMES for arch in (80, 90)}


def test_nothing_spills(rows: Rows) -> None:
    for row in rows:
        assert row["local"] == 0, row
        assert row["stack"] == 0, row


def test_products_are_read_16_bytes_at_a_time(rows: Rows) -> None:
    # 4 tokens and 512 neurons of a program of 128 threads: 16 numbers of each tensor by each thread.
    wide = [r for r in rows if r["kernel"] == "masked_activation_kernel" and "tokens=2048" in r["variant"]]
    assert len(wide) >= 10
    for row in wide:
        tensors = 1 if "gated=False" in row["variant"] else 2
        loads_per_tensor = 4 if "float32" in row["variant"] else 2
        assert row["wide_loads"] >= tensors * loads_per_tensor, row


def test_weights_and_states_are_copied_16_bytes_at_a_time(rows: Rows) -> None:
    grouped = [row for row in rows if row["kernel"] == "grouped_kernel" and "hidden=4096" in row["variant"]]
    assert len(grouped) >= 10
    for row in grouped:
        assert row["wide_copies"] > 0, row


def test_skinny_products_copy_16_bytes_at_a_time(rows: Rows) -> None:
    skinny = [row for row in rows if row["kernel"] == "skinny_product_kernel"]
    assert len(skinny) >= 16
    for row in skinny:
        assert row["wide_copies"] > 0, row


def test_skinny_products_run_on_tensor_cores(rows: Rows) -> None:
    for row in rows:
        if row["kernel"] == "skinny_product_kernel":
            assert row["tensor_core"], row
            # Warp groups have 4 warps and take 64 rows of the first factor: of x only from 33 tokens on.
            small = "warps=2" in row["variant"] or ("x_first=True" in row["variant"] and "tokens=17" in row["variant"])
            assert row["warp_group"] == (row["arch"] == 90 and not small), row


def test_the_launcher_takes_skinny_products_on_sm_90_alone(rows: Rows) -> None:
    taken = {r["arch"] for r in rows if r["kernel"] == "skinny_product_kernel" and "path=masked" in r["variant"]}
    assert taken == {90}


def test_products_of_16_bits_run_on_tensor_cores(rows: Rows) -> None:
    for row in rows:
        if row["kernel"] == "grouped_kernel" and "float32" not in row["variant"]:
            assert row["tensor_core"], row
            # Tiles of 64 tokens or more, in the form that only sm_90 has.
            assert row["warp_group"] == (row["arch"] == 90 and "tokens=2048" in row["variant"]), row
