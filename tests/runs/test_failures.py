"""Runs that fail: what their records say, and what goes on."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lte.bench.gate import GateError
from lte.files import write_json_atomic
from lte.runs import folders, latency, runner
from lte.runs.folders import MADE_FILE
from lte.runs.runner import execute_all
from lte.train.objective import NonFiniteLossError
from tests.runs.conftest import FIELDS, records_of, runner_of


def failing(function: Callable[..., Any], error: Exception, fails: Callable[[Any], bool]) -> Callable[..., Any]:
    """A function of a run that raises for some runs."""

    def call(run: Any, *args: Any) -> Any:
        if fails(run):
            raise error
        return function(run, *args)

    return call


def test_a_failure_is_a_record_and_the_others_go_on(mrpc: Callable[..., Path], tmp_path: Path) -> None:
    file = mrpc({"method": "sigma_moe", "expert_size": 7}, "wina")
    first, lines = runner_of(file, tmp_path)
    assert execute_all([first]) == ["sigma_moe-0.5-seed0"]
    records = records_of(tmp_path)
    failed = records["sigma_moe-0.5-seed0"]
    assert failed["value"] is None
    assert failed["failure"].startswith("ValueError: expert_size must divide")
    assert (failed["metric"], failed["split"], failed["method"]) == ("accuracy", "validation", "sigma_moe")
    assert set(failed) >= FIELDS
    assert records["wina-0.5-seed0"]["value"] is not None
    # It stays failed until its record is deleted.
    second, lines = runner_of(file, tmp_path)
    assert execute_all([second]) == ["sigma_moe-0.5-seed0"]
    assert lines == []


def test_what_needs_a_failed_model_fails_with_it(
    mrpc: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    error = NonFiniteLossError("the loss is nan")
    diverges = failing(folders.make_run, error, lambda run: run.name == "control-seed0")
    monkeypatch.setattr(runner, "make_run", diverges)
    first, _ = runner_of(mrpc("cats", "lte"), tmp_path)
    assert execute_all([first]) == ["cats-0.5-seed0"]
    failure = records_of(tmp_path)["cats-0.5-seed0"]["failure"]
    assert failure == "it needs control-seed0, which failed: NonFiniteLossError: the loss is nan"


def test_data_that_is_not_there_is_no_failure_of_a_run(mrpc: Callable[..., Path], tmp_path: Path) -> None:
    broken, _ = runner_of(mrpc("lte"), tmp_path, data_dir="/no/such")
    with pytest.raises(ValueError, match="data_dir must be an existing folder"):
        execute_all([broken])
    assert not list((tmp_path / "records").iterdir())


@pytest.mark.parametrize(("shared", "always", "tries"), [(True, False, 3), (True, True, 5), (False, False, 1)])
def test_what_finds_no_room_beside_others_is_tried_again(
    mrpc: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shared: bool, always: bool, tries: int
) -> None:
    seen: list[str] = []

    def measures(run: Any, *args: Any) -> Any:
        seen.append(run.name)
        if run.method == "lte" and (always or seen.count(run.name) < 3):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return measured(run, *args)

    def makes(run: Any, *args: Any) -> Any:
        made.append(run.name)
        return folders.make_run(run, *args)

    made: list[str] = []
    measured = runner.measured_record
    monkeypatch.setattr(runner, "make_run", makes)
    monkeypatch.setattr(runner, "measured_record", measures)
    monkeypatch.setattr(runner, "others_fill_gpu", lambda: shared)
    monkeypatch.setattr(runner, "MEMORY_WAIT_S", 0.3)
    monkeypatch.setattr(runner, "POLL_S", 0.01)
    first, lines = runner_of(mrpc("lte", {"method": "wina", "base": "start"}), tmp_path)
    fits = shared and not always
    assert execute_all([first]) == ([] if fits else ["lte-0.5-seed0"])
    assert seen.count("lte-0.5-seed0") == tries
    # The others did not wait for it.
    assert seen.index("wina-0.5-seed0") == 1
    assert (records_of(tmp_path)["lte-0.5-seed0"].get("failure") is None) == fits
    assert sum("no room on the GPU" in line for line in lines) == tries - 1
    assert made.count("lte-0.5-seed0") == 1


def test_an_error_of_any_kind_is_a_record(
    mrpc: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    error = RuntimeError("cuBLAS:\nno workspace")
    monkeypatch.setattr(runner, "make_run", failing(folders.make_run, error, lambda run: run.method == "lte"))
    first, _ = runner_of(mrpc("lte", "wina"), tmp_path)
    assert execute_all([first]) == ["lte-0.5-seed0"]
    assert records_of(tmp_path)["lte-0.5-seed0"]["failure"] == "RuntimeError: cuBLAS: no workspace"
    assert records_of(tmp_path)["wina-0.5-seed0"]["value"] is not None
    assert "Traceback" in capsys.readouterr().err


def test_a_gpu_that_answers_no_more_ends_the_process_after_the_record(
    mrpc: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    error = RuntimeError("an illegal memory access")
    monkeypatch.setattr(runner, "make_run", failing(folders.make_run, error, lambda run: True))
    monkeypatch.setattr(runner, "_device_works", lambda: False)
    first, _ = runner_of(mrpc("lte", "wina"), tmp_path)
    with pytest.raises(RuntimeError, match="illegal"):
        execute_all([first])
    assert "illegal" in records_of(tmp_path)["lte-0.5-seed0"]["failure"]


def test_a_run_whose_own_data_cannot_be_read_has_a_record(mrpc: Callable[..., Path], tmp_path: Path) -> None:
    first, _ = runner_of(mrpc("wina", {"method": "lte", "sequence_length": 100_000}), tmp_path)
    assert execute_all([first]) == ["lte-0.5-seed0"]
    failed = records_of(tmp_path)["lte-0.5-seed0"]
    assert failed["failure"].startswith("ValueError: sequence_length must be at most")
    assert (failed["task"], failed["metric"], failed["data_sha256"]["train"]) == ("mrpc", "accuracy", None)
    assert records_of(tmp_path)["wina-0.5-seed0"]["value"] is not None


def test_a_failed_measurement_leaves_what_needs_the_model(
    mrpc: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    error = RuntimeError("out of memory")
    fails = failing(runner.measured_record, error, lambda run: run.method == "dense")
    monkeypatch.setattr(runner, "measured_record", fails)
    first, _ = runner_of(mrpc("dense", "wina"), tmp_path)
    assert execute_all([first]) == ["dense-0-seed0"]
    assert records_of(tmp_path)["wina-0.5-seed0"]["value"] is not None
    # Its own stays, too: what is measured again need not train again.
    assert first.folders.made(first.wanted[0]) is not None


def test_a_failure_does_not_stand_in_the_way_of_the_corrected_file(mrpc: Callable[..., Path], tmp_path: Path) -> None:
    first, _ = runner_of(mrpc({"method": "sigma_moe", "expert_size": 7}), tmp_path)
    assert execute_all([first]) == ["sigma_moe-0.5-seed0"]
    second, lines = runner_of(mrpc({"method": "sigma_moe", "expert_size": 8}), tmp_path)
    assert execute_all([second]) == []
    assert lines[0] == "sigma_moe-0.5-seed0: failed with other settings, done again."
    assert records_of(tmp_path)["sigma_moe-0.5-seed0"]["failure"] is None


def test_a_model_stays_until_it_is_measured(mrpc: Callable[..., Path], tmp_path: Path) -> None:
    first, _ = runner_of(mrpc("dense", "wina"), tmp_path)
    assert execute_all([first]) == []
    again, _ = runner_of(mrpc("dense", "wina"), tmp_path, "wina-0.5-seed0")
    again.folders.record(again.wanted[0]).unlink()
    dense = next(run for run in again.runs if run.name == "dense-0-seed0")
    # Its record is still to come, from another process say.
    again.folders.record(dense).unlink()
    assert execute_all([again]) == []
    assert again.folders.made(dense) is not None


def test_a_model_that_is_being_deleted_is_not_there(
    mrpc: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, _ = runner_of(mrpc({"method": "dense", "keep": True}), tmp_path)
    execute_all([first])
    assert first.folders.made(first.wanted[0]) is not None
    monkeypatch.setattr(Path, "exists", lambda path, **options: True)
    first.folders.delete_model(first.wanted[0])
    assert first.folders.made(first.wanted[0]) is None


def test_models_of_other_data_are_not_taken(mrpc: Callable[..., Path], tmp_path: Path) -> None:
    file = mrpc({"method": "dense", "keep": True})
    first, _ = runner_of(file, tmp_path)
    execute_all([first])
    dense = first.wanted[0]
    first.folders.record(dense).unlink()
    made = first.folders.made(dense)
    assert made is not None
    other = {**made.data_info, "train": {**made.data_info["train"], "sha256": "0"}}
    content = dataclasses.asdict(dataclasses.replace(made, data_info=other))
    write_json_atomic(first.folders.model(dense) / MADE_FILE, content)
    assert execute_all([first]) == ["dense-0-seed0"]
    assert "data must be what the model" in records_of(tmp_path)["dense-0-seed0"]["failure"]


def test_wrong_kernels_are_a_failure(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def differs(*args: Any) -> Any:
        raise GateError("relative RMS of the FFN of layer 0 must be at most 0.01, got 1.0e+00; nothing was timed")

    monkeypatch.setattr(latency, "run_benchmarks", differs)
    with pytest.raises(GateError):
        latency.time_decoding(llama, llama, [1, 2, 3], 1)
