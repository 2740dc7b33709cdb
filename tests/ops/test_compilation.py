"""Every kernel variant compiles for sm_80 and sm_90, without a GPU, with wide loads and without spills."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """A row per compiled kernel."""
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    env |= {"TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton")), "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}"}
    run = subprocess.run(
        [sys.executable, "-m", "tests.ops.compile_kernels"], env=env, cwd=ROOT, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    return [json.loads(line) for line in run.stdout.splitlines()]


def test_all_kernels_compile_for_both_architectures(kernels: list[dict[str, Any]]) -> None:
    found = {(row["kernel"], row["arch"]) for row in kernels}
    assert found == {(name, arch) for name in ("decode_one_kernel", "decode_many_kernel") for arch in (80, 90)}


def test_weights_are_read_16_bytes_at_a_time(kernels: list[dict[str, Any]]) -> None:
    for row in kernels:
        if "hidden=4096" in row["variant"]:
            assert row["wide_loads"] + row["wide_copies"] > 0, row


def test_hardly_anything_spills(kernels: list[dict[str, Any]]) -> None:
    for row in kernels:
        assert row["local"] == 0, row
        assert row["stack"] <= 32, row


def test_tensor_cores_from_two_tokens_on(kernels: list[dict[str, Any]]) -> None:
    for row in kernels:
        if "float32" not in row["variant"]:
            assert row["tensor_core"] == ("tokens=16" in row["variant"]), row


def test_the_programs_wait_for_the_routing_and_for_each_other(kernels: list[dict[str, Any]]) -> None:
    for row in kernels:
        assert row["waits"], row
        assert row["barriers"] == 1, row


def test_a_thread_asks_for_all_its_routing_words_at_once(kernels: list[dict[str, Any]]) -> None:
    found = {row["waits"] for row in kernels if row["kernel"] == "decode_one_kernel"}
    assert found == {1, 2, 4, 8}


def test_launches_overlap_with_the_kernel_before_where_the_gpu_can(kernels: list[dict[str, Any]]) -> None:
    for row in kernels:
        assert row["dependent"] == (row["arch"] >= 90), row


def test_the_down_projection_is_asked_for_early_where_that_is_wanted(kernels: list[dict[str, Any]]) -> None:
    found = {(row["arch"], row["variant"]): row["prefetches"] for row in kernels}
    wanted = [key for key in found if " tiles=" in key[1]]
    assert [arch for arch, _ in wanted] == [80, 90]
    for arch, variant in wanted:
        assert found[arch, variant] > found[arch, variant.partition(" tiles=")[0]]
