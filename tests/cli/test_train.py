"""`lte train`: what it writes and says, YAML and flags, resuming, and what it refuses."""

from __future__ import annotations

import errno
import gzip
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors import safe_open
from transformers import AutoModelForCausalLM

import lte
from lte.cli.train import merge_settings
from lte.data.config import DataConfig, read_documents
from lte.hf import loading
from lte.runs.precision import Precision
from lte.runs.workload import TextWorkload
from lte.train import disk_space
from lte.train.checkpoints import folder_lock, newest_checkpoint
from lte.train.trainer import LteTrainer
from tests.cli.conftest import SHORT, save_tiny_model
from tests.processes import run_processes
from tests.tiny_models import EXPERT_SIZE, randomise_routers_


def state(folder: Path) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_a_run_leaves_a_loadable_folder_and_its_report(trained: Any) -> None:
    output, text = trained
    model = AutoModelForCausalLM.from_pretrained(output)
    assert len(lte.sparse_ffns(model)) == 2
    names = {path.name for path in output.iterdir()}
    reports = {"training_log.json", "result.json", "router_health.md", "router_health.png", "training.png"}
    assert names >= {"config.json", "model.safetensors", "tokenizer.json", "run.yaml", "checkpoints"} | reports
    record = json.loads((output / "result.json").read_text())
    measured = model.config.lte_measurement
    assert measured["sparsity"] == record["sparsity"] == pytest.approx(0.5, abs=0.05)
    assert len(measured["active_fraction"]) == 2
    assert measured["split"] == "validation"
    assert f"measured {100 * record['sparsity']:.2f}%" in text
    card = (output / "README.md").read_text()
    assert f"| measured sparsity | {100 * record['sparsity']:.1f}% |" in card
    assert f"| perplexity before training | {record['perplexity_before']:.4g} |" in card
    assert f"| perplexity of this model | {record['value']:.4g} |" in card
    assert "| base model | dense |" in card
    assert f"{record['perplexity_before']:.3f} before training, {record['value']:.3f} after" in text
    assert {entry["stage"] for entry in json.loads((output / "training_log.json").read_text())} == {1, 2}


def test_a_yaml_file_does_what_flags_do_and_flags_override_it(
    dense_folder: Path, run: Callable[..., Any], trained: Any, tmp_path: Path
) -> None:
    settings = {flag[2:]: value for flag, value in zip(SHORT[::2], SHORT[1::2], strict=True)}
    settings |= {"model": str(dense_folder), "stage1_steps": 99, "learning-rate": "1e-3", "stages": "both"}
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump({k: v for k, v in settings.items() if k != "stage1-steps"}))
    result = run("train", "--config", config, "--output", tmp_path / "out", "--stage1-steps", 6)
    assert result.exit_code == 0, result.output
    assert same(state(tmp_path / "out"), state(trained[0]))


@pytest.fixture
def texts(tmp_path: Path) -> list[str]:
    """Two files of documents, one of them packed."""
    lines = [json.dumps({"text": text}) for text in read_documents("pydoc-topics", DataConfig())]
    (tmp_path / "first.jsonl").write_text("\n".join(lines[:40]))
    (tmp_path / "second.jsonl.gz").write_bytes(gzip.compress("\n".join(lines[40:]).encode()))
    return [str(tmp_path / "first.jsonl"), str(tmp_path / "second.jsonl.gz")]


def test_train_may_be_a_list_of_files(
    dense_folder: Path, run: Callable[..., Any], trained: Any, tmp_path: Path, texts: list[str]
) -> None:
    config, output = tmp_path / "run.yaml", tmp_path / "out"
    config.write_text(yaml.safe_dump({"train": texts}))
    result = run("train", "--config", config, "--model", dense_folder, "--output", output, *SHORT)
    assert result.exit_code == 0, result.output
    assert f"Data: {', '.join(texts)}, " in result.output
    # Together they hold the built-in text.
    assert same(state(output), state(trained[0]))
    assert yaml.safe_load((output / "run.yaml").read_text())["train"] == texts
    # The list is that of the run, which is finished.
    result = run("train", "--resume", "--output", output, "--config", config)
    assert "output must hold an unfinished run to resume" in result.stderr
    record = json.loads((output / "result.json").read_text())
    assert record["task"] == ", ".join(texts)
    flags = ["--sequence-length", 32, "--max-validation-tokens", 512, "--json", tmp_path / "eval.json"]
    result = run("eval", output, "--train", texts[0], "--train", texts[1], *flags)
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "eval.json").read_text())
    assert found["config"]["data_info"]["validation"] == record["config"]["data_info"]["validation"]


def test_of_two_processes_one_writes_the_folder(dense_folder: Path, trained: Any, tmp_path: Path) -> None:
    shared = [*SHORT, "--batch-size", "2"]
    said = run_processes(2, "lte", "train", "--model", dense_folder, "--output", tmp_path / "out", *shared)
    assert said.count("Saved to") == 1
    mine, theirs = state(tmp_path / "out"), state(trained[0])
    for name in theirs:
        torch.testing.assert_close(mine[name], theirs[name], rtol=1e-3, atol=1e-4, msg=name)
    record = json.loads((tmp_path / "out" / "result.json").read_text())
    assert record["tokens_trained"] == 12 * 4 * 32
    assert newest_checkpoint(tmp_path / "out" / "checkpoints") is None


class TestSettingsFile:
    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ("target_sparcity: 0.3", "got target_sparcity (did you mean target_sparsity?)"),
            ("learning_rate: fast", "learning_rate must be a number, got learning_rate='fast' in"),
            ("stage1_steps: 1.5", "stage1_steps must be a whole number, got stage1_steps=1.5"),
            ("bf16: 'yes please'", "bf16 must be true or false"),
            ("- a\n- b", "config must hold `name: value` lines, got a list"),
            ("a: [", "while parsing"),
            ("train:", "train must be text or a list, got train=None in"),
            ("train: [a.jsonl, [b.jsonl]]", "train must be text, got train=['b.jsonl'] in"),
            ("validation: [a.jsonl]", "validation must be text, got validation=['a.jsonl'] in"),
            ("a: " + "[" * 3000, "nested too deeply"),
            (
                "seed: 1\nbf16: true\nseed: 2",
                "run.yaml must be YAML, got an error in line 3, column 1: the key seed is",
            ),
            ("learning_rate: 1\nlearning-rate: 2", "run.yaml must hold every setting once, got learning_rate"),
            ("learning_rate: .inf", "learning_rate must be a number, got learning_rate=inf"),
        ],
    )
    def test_a_mistake_is_named(self, run: Callable[..., Any], tmp_path: Path, content: str, message: str) -> None:
        (tmp_path / "run.yaml").write_text(content)
        result = run("train", "--config", tmp_path / "run.yaml")
        assert result.exit_code == 1
        assert message in result.stderr
        assert len(result.stderr.strip().splitlines()) == 1

    def test_a_missing_file_is_named(self, run: Callable[..., Any], tmp_path: Path) -> None:
        result = run("train", "--config", tmp_path / "no.yaml")
        assert result.exit_code == 1
        assert "config must be an existing YAML file, got config=" in result.stderr


def interrupt_at(monkeypatch: pytest.MonkeyPatch, stage: int, step: int) -> None:
    """Presses Ctrl-C in a stage after a step."""
    control = LteTrainer.control_sparsity

    def interrupted(self: LteTrainer) -> None:
        control(self)
        if self.state.global_step == step + 6 * (stage == 2):
            raise KeyboardInterrupt

    monkeypatch.setattr(LteTrainer, "control_sparsity", interrupted)


@pytest.mark.parametrize(("stage", "step"), [(1, 2), (1, 5), (2, 4)])
def test_an_interrupted_run_resumes_to_the_same_weights(
    dense_folder: Path,
    run: Callable[..., Any],
    trained: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    stage: int,
    step: int,
) -> None:
    output = tmp_path / "out"
    with monkeypatch.context() as patch:
        interrupt_at(patch, stage, step)
        result = run("train", "--model", dense_folder, "--output", output, *SHORT)
    assert result.exit_code == 130
    assert f"Go on with: lte train --resume --output {output}" in result.stderr
    assert not (output / "config.json").exists()
    result = run("train", "--resume", "--output", output)
    assert result.exit_code == 0, result.output
    assert same(state(output), state(trained[0]))


def begin(run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, *flags: Any) -> None:
    """Begins a run that ends after its second checkpoint, in stage 2."""
    with monkeypatch.context() as patch:
        interrupt_at(patch, 2, 1)
        assert run("train", *flags, *SHORT).exit_code == 130


def test_a_resumed_run_keeps_its_text(
    dense_folder: Path, run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text, output = tmp_path / "text.jsonl", tmp_path / "out"

    def write(word: str) -> None:
        text.write_text("\n".join(json.dumps({"text": f"{word} number {i} " * 9}) for i in range(60)))

    write("some text")
    flags = ["--model", dense_folder, "--train", text]
    assert run("train", *flags, "--output", tmp_path / "whole", *SHORT).exit_code == 0
    begin(run, monkeypatch, *flags, "--output", output)
    write("other text")
    result = run("train", "--resume", "--output", output)
    assert result.exit_code == 1
    assert "a resumed run must keep its data and settings, got some that differ: training_data=(" in result.stderr
    assert not (output / "config.json").exists()
    write("some text")
    # A refused batch size is not kept; another one with as many rows in a step goes on.
    refused = run("train", "--resume", "--output", output, "--batch-size", "2")
    assert "some that differ: rows_per_pass=2 where it began with rows_per_pass=4" in refused.stderr
    assert (output / "run.yaml").read_text().startswith("batch_size: 4")
    halves = ["--batch-size", "2", "--gradient-accumulation-steps", "2"]
    assert run("train", "--resume", "--output", output, *halves).exit_code == 0
    assert (output / "run.yaml").read_text().startswith("batch_size: 2")
    for name, tensor in state(tmp_path / "whole").items():
        torch.testing.assert_close(state(output)[name], tensor, rtol=1e-3, atol=1e-4)


def test_a_run_has_one_resume_point_and_says_so_if_that_is_damaged(
    dense_folder: Path, run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"
    begin(run, monkeypatch, "--model", dense_folder, "--output", output)
    (checkpoint,) = (output / "checkpoints").glob("checkpoint-*")
    assert checkpoint.name == "checkpoint-6"
    # The end of a stage: the next one starts without moments.
    assert (checkpoint / "optimizer.pt").stat().st_size < (checkpoint / "model.safetensors").stat().st_size
    (checkpoint / "optimizer.pt").write_bytes(b"cut")
    result = run("train", "--resume", "--output", output)
    assert result.exit_code == 1
    assert "checkpoint-6: optimizer.pt has 3 bytes" in result.stderr


def test_a_finished_run_leaves_no_checkpoint_and_does_not_begin_anew(run: Callable[..., Any], trained: Any) -> None:
    assert newest_checkpoint(trained[0] / "checkpoints") is None
    before = (trained[0] / "model.safetensors").stat().st_mtime_ns
    result = run("train", "--resume", "--output", trained[0])
    assert result.exit_code == 1
    assert "output must hold an unfinished run to resume, got output=" in result.stderr
    assert (trained[0] / "model.safetensors").stat().st_mtime_ns == before


def test_the_folder_has_the_dtype_asked_for(dense_folder: Path, run: Callable[..., Any], tmp_path: Path) -> None:
    result = run("train", "--model", dense_folder, "--output", tmp_path / "out", *SHORT, "--save-dtype", "bfloat16")
    assert result.exit_code == 0, result.output
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        dtypes = {name: file.get_tensor(name).dtype for name in file.keys()}  # noqa: SIM118
    assert all(dtype == (torch.float32 if ".router." in name else torch.bfloat16) for name, dtype in dtypes.items())
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    result = run("train", "--model", dense_folder, "--output", tmp_path / "x", "--save-dtype", "int8")
    assert "save_dtype must be one of float32, bfloat16, float16" in " ".join((result.stderr or result.output).split())


def test_a_model_that_trains_in_bf16_is_measured_in_it(
    dense_folder: Path, run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[torch.dtype, bool]] = []
    measure = TextWorkload.measure

    def watched(self: TextWorkload, model: Any) -> Any:
        seen.append((model.get_input_embeddings().weight.dtype, torch.is_autocast_enabled("cpu")))
        return measure(self, model)

    monkeypatch.setattr(TextWorkload, "measure", watched)
    monkeypatch.setattr(Precision, "of_training", lambda *args: Precision("bfloat16"))
    flags = ["--weights-dtype", "bfloat16", "--optim", "adamw_torch"]
    with pytest.warns(UserWarning, match="rounds weights in bfloat16"):
        result = run("train", "--model", dense_folder, "--output", tmp_path / "out", *SHORT, *flags)
    assert result.exit_code == 0, result.output
    assert seen == [(torch.float32, True), (torch.bfloat16, False)]
    record = json.loads((tmp_path / "out" / "result.json").read_text())
    assert record["config"]["dtype"] == "bfloat16"
    tokens = record["config"]["data_info"]["validation"]["tokens"]
    for what in ("model before training", "saved model"):
        assert f"Measuring the {what}: {tokens} held-out tokens, in bfloat16." in result.output


def test_a_run_says_what_it_takes_and_how_long_its_parts_took(
    dense_folder: Path, run: Callable[..., Any], tmp_path: Path
) -> None:
    flags = ["--stage1-steps", "12", "--distill-from", "initial"]
    result = run("train", "--model", dense_folder, "--output", tmp_path / "out", *SHORT, *flags)
    assert result.exit_code == 0, result.output
    told = ["Grouping neurons: ", "Memory for training: about ", "Disk: up to ", "Fitting routers: ", "About "]
    told += ["Setting thresholds, round 1: ", "Measuring: "]
    places = [result.output.index(start) for start in told]
    assert places == sorted(places)
    assert re.search(r"About \S+ \w+ in all: \S+ \w+ until now, \S+ \w+ training, .*\.\n", result.output)


def test_a_disk_without_room_for_a_run_is_refused_before_it_trains(
    dense_folder: Path, run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk_space, "free_bytes", lambda path: 1000)
    result = run("train", "--model", dense_folder, "--output", tmp_path / "out", *SHORT)
    assert result.exit_code == 1
    assert "output must have room for up to " in result.stderr
    assert f"got {tmp_path / 'out'} with 1e-06 GB free; delete other files on that disk, take another" in result.stderr
    assert not (tmp_path / "out" / "run.yaml").exists()


def test_a_disk_that_is_full_at_the_end_says_what_must_stay(
    dense_folder: Path, run: Callable[..., Any], trained: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"

    publish = loading.publish_folder

    def full(partial: Path, target: Path) -> None:
        if target == output:
            raise OSError(errno.ENOSPC, "No space left on device")
        publish(partial, target)

    with monkeypatch.context() as patch:
        patch.setattr(loading, "publish_folder", full)
        result = run("train", "--model", dense_folder, "--output", output, *SHORT)
    assert result.exit_code == 1
    kept = output / "checkpoints" / "checkpoint-12"
    assert f"delete other files on that disk; {kept} holds what was trained and must stay" in result.stderr
    assert run("train", "--resume", "--output", output).exit_code == 0
    assert same(state(output), state(trained[0]))


def test_a_folder_in_use_is_refused(dense_folder: Path, run: Callable[..., Any], trained: Any, tmp_path: Path) -> None:
    with folder_lock(tmp_path / "out"):
        result = run("train", "--model", dense_folder, "--output", tmp_path / "out", *SHORT)
        assert result.exit_code == 1
        assert f"got {tmp_path / 'out'}, into which another one trains now" in result.stderr
        assert (
            "into which another one trains now"
            in run("demo", "--model", dense_folder, "--output", tmp_path / "out").stderr
        )


def test_a_resumed_run_keeps_its_settings(run: Callable[..., Any], trained: Any) -> None:
    result = run("train", "--resume", "--output", trained[0], "--learning-rate", "1e-4")
    assert result.exit_code == 1
    assert "a resumed run must keep its settings, got learning_rate=0.0001" in result.stderr
    # Other processes share a step's rows otherwise.
    values = {"resume": True, "output": str(trained[0]), "batch_size": 2, "gradient_accumulation_steps": 2}
    assert merge_settings(values, None)["batch_size"] == 2
    # Versions before had another default.
    assert merge_settings({**values, "tf32": False}, None)["tf32"] is False


def test_an_adapter_is_no_model_to_start_from(run: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    result = run("train", "--model", tmp_path, "--output", tmp_path / "out")
    assert result.exit_code == 1
    assert "an adapter of peft; merge it into its base (merge_and_unload) and save that" in result.stderr


def test_stages_one_by_one(dense_folder: Path, run: Callable[..., Any], tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    result = run("train", "--model", dense_folder, "--output", first, "--stages", 1, *SHORT)
    assert result.exit_code == 0, result.output
    assert "train on with --stages 2" in result.output
    flags = ["--target-sparsity", "0.4"]
    result = run("train", "--model", first, "--output", second, "--stages", 2, *SHORT, *flags)
    assert result.exit_code == 0, result.output
    assert AutoModelForCausalLM.from_pretrained(second).lte_config.target_sparsity == 0.4


def test_the_dense_control_is_a_stock_model(dense_folder: Path, run: Callable[..., Any], tmp_path: Path) -> None:
    flags = ["--recipe", "dense", "--distill-from", "initial"]
    result = run("train", "--model", dense_folder, "--output", tmp_path / "out", *SHORT, *flags)
    assert result.exit_code == 0, result.output
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "llama"
    record = json.loads((tmp_path / "out" / "result.json").read_text())
    assert record["method"] == "dense"
    assert record["config"]["train"]["distillation_weight"] == 1.0
    # The student equals its teacher: there is nothing to learn but the rounding errors that AdamW blows up, on some
    # processors to 2%. Trained on the text it would end at half.
    assert record["value"] == pytest.approx(record["perplexity_before"], rel=0.1)


@pytest.mark.parametrize("grouping", ["coactivation", "contribution", "chunks"])
def test_grouping_by_activity_gets_its_text(
    dense_folder: Path, run: Callable[..., Any], tmp_path: Path, grouping: str
) -> None:
    flags = ["--grouping", grouping]
    result = run("train", "--model", dense_folder, "--output", tmp_path / "out", *SHORT, *flags)
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "model must be given: --model on the command line or model: in the YAML file"),
        (["--model", "MODEL"], "output must be given: --output"),
        (["--model", "/no/such", "--output", "OUT"], "got /no/such, which does not exist"),
        (["--model", "MODEL", "--output", "OUT", "--recipe", "papper"], "did you mean paper?"),
        (["--model", "MODEL", "--output", "OUT", "--stages", "3"], "stages must be one of both, 1, 2"),
        (["--model", "MODEL", "--output", "OUT", "--stages", "2"], "stages=2 must start from an LTE folder"),
        (["--model", "MODEL", "--output", "OUT", "--target-sparsity", "1"], "target_sparsity must lie in [0, 1)"),
        (["--model", "MODEL", "--output", "OUT", "--train", "no.jsonl"], "which matches nothing"),
        (["--model", "MODEL", "--output", "OUT", "--distillation-weight", "1"], "must have a teacher"),
        (["--model", "MODEL", "--output", "OUT", "--expert-size", "7"], "expert_size must divide"),
        (["--model", "MODEL", "--output", "OUT", "--match-weight", "0.5"], "match_to must be own without a teacher"),
        (
            ["--model", "MODEL", "--output", "OUT", "--margin-weight", "0.1", "--stages", "1"],
            "margin_weight must be 0 without stage 2",
        ),
        (
            ["--model", "MODEL", "--output", "OUT", "--regroup-count", "2", "--lora-rank", "4"],
            "regroup_count must be 0 for a model with adapters",
        ),
        (
            ["--model", "MODEL", "--output", "OUT", "--regroup-count", "2", "--optim", "adamw_bnb_8bit"],
            "optim must keep its moments as one number for each weight where neurons move with regroup_count, got "
            "optim=adamw_bnb_8bit",
        ),
        (
            ["--model", "MODEL", "--output", "OUT", "--union-weight", "1", "--union-tokens", "64"],
            "union_tokens must be at most sequence_length=32",
        ),
        (
            ["--model", "MODEL", "--output", "OUT", "--price-on", "union", "--union-tokens", "64"],
            "union_tokens must be at most sequence_length=32",
        ),
        (
            ["--model", "MODEL", "--output", "OUT", "--dropped-bias", "--lora-rank", "4"],
            "dropped_bias must be false for a model with adapters",
        ),
        (
            ["--model", "MODEL", "--output", "OUT", "--dropped-bias", "--router-fit-tokens", "0"],
            "router_fit_tokens must be positive with dropped_bias",
        ),
        (
            ["--model", "MODEL", "--output", "OUT", "--dropped-bias", "--recipe", "paper"],
            "dropped_bias must be false where no controller holds the target",
        ),
        (
            [
                *("--model", "MODEL", "--output", "OUT", "--expert-size", "8"),
                "--always-on",
                "0.01",
                "--target-sparsity",
                "0.9",
            ],
            "target_sparsity must be at most 0.875 where 1 of 8 experts are always on, got target_sparsity=0.9",
        ),
    ],
)
def test_a_mistake_is_one_sentence(
    dense_folder: Path,
    run: Callable[..., Any],
    tmp_path: Path,
    flags: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(TextWorkload, "load_model", _not_to_be_called)
    names = {"MODEL": str(dense_folder), "OUT": str(tmp_path / "out")}
    result = run("train", "--sequence-length", 32, *(names.get(flag, flag) for flag in flags))
    assert result.exit_code == 1
    assert message in result.stderr
    assert "Traceback" not in result.output


def _not_to_be_called(*arguments: Any) -> None:
    raise AssertionError("a model is loaded for a run that is refused")


def test_a_control_ignores_settings_of_routing(dense_folder: Path, run: Callable[..., Any], tmp_path: Path) -> None:
    flags = ["--recipe", "dense", "--union-weight", "1", "--union-tokens", "64", "--dropped-bias"]
    result = run("train", "--model", dense_folder, "--output", tmp_path / "out", *SHORT, *flags)
    assert result.exit_code == 0, result.output


@pytest.fixture
def with_always_on(tmp_path: Path) -> Path:
    """An LTE folder of which 1 of 8 experts is always on, and whose FFNs have biases."""
    folder = save_tiny_model(tmp_path / "always-on")
    config = lte.LteConfig(expert_size=8, always_on=0.01, dropped_bias=True, target_sparsity=0.4)
    model = AutoModelForCausalLM.from_pretrained(folder)
    lte.sparsify_(model, config, calibration=[{"input_ids": torch.arange(3, 35)[None]}])
    randomise_routers_(model).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--target-sparsity", "0.995"], "target_sparsity must be at most 0.875 where 1 of 8 experts are always on"),
        (["--target-sparsity", "0.9"], "target_sparsity must be at most 0.875 where 1 of 8 experts are always on"),
        (["--always-on", "0.25"], "always_on must stay 0.01 for an LTE model, got always_on=0.25"),
        (["--lora-rank", "4"], "dropped_bias must be false for a model with adapters"),
    ],
)
def test_what_an_lte_model_cannot_be_is_refused_before_it_is_loaded(
    with_always_on: Path,
    run: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    flags: list[str],
    message: str,
) -> None:
    monkeypatch.setattr(TextWorkload, "load_model", _not_to_be_called)
    result = run("train", "--model", with_always_on, "--output", tmp_path / "out", "--sequence-length", 32, *flags)
    assert result.exit_code == 1
    assert message in result.stderr


def test_the_record_of_a_model_that_is_trained_on_holds_its_own_config(
    with_always_on: Path, run: Callable[..., Any], tmp_path: Path
) -> None:
    flags = [*SHORT[:-4], "--target-sparsity", "0.3"]
    result = run("train", "--model", with_always_on, "--output", tmp_path / "out", *flags)
    assert result.exit_code == 0, result.output
    saved = json.loads((tmp_path / "out" / "config.json").read_text())["lte"]
    assert json.loads((tmp_path / "out" / "result.json").read_text())["config"]["lte"] == saved
    assert (saved["always_on"], saved["dropped_bias"], saved["target_sparsity"]) == (0.01, True, 0.3)


def test_a_folder_with_a_model_is_not_overwritten(dense_folder: Path, run: Callable[..., Any], trained: Any) -> None:
    result = run("train", "--model", dense_folder, "--output", trained[0], *SHORT)
    assert result.exit_code == 1
    assert "output must be a new folder" in result.stderr


def test_an_lte_model_keeps_its_experts(run: Callable[..., Any], trained: Any, tmp_path: Path) -> None:
    flags = [*SHORT, "--expert-size", "16"]
    result = run("train", "--model", trained[0], "--output", tmp_path / "out", *flags)
    assert result.exit_code == 1
    assert "expert_size must stay 8 for an LTE model, got expert_size=16" in result.stderr


class TestWhatFollowsTheSave:
    """Nothing that fails once the model is trained may cost it."""

    @pytest.mark.parametrize(
        ("target", "code", "what"),
        [
            ("lte.report.figures.save_figure", 0, "drawing its report failed: no room for it"),
            ("lte.hf.card.model_card", 0, None),
            ("lte.report.router_health.router_health_table", 0, "printing its numbers failed: no room for it"),
            ("lte.runs.measure.use_kernels_", 1, "measuring it failed: no room for it"),
        ],
    )
    def test_a_failure_is_a_warning(
        self,
        dense_folder: Path,
        run: Callable[..., Any],
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        target: str,
        code: int,
        what: str | None,
    ) -> None:
        def fails(*arguments: Any, **settings: Any) -> None:
            raise OSError("no room for it")

        output = tmp_path / "out"
        with monkeypatch.context() as patch:
            patch.setattr(target, fails)
            result = run("train", "--model", dense_folder, "--output", output, *SHORT)
        assert result.exit_code == code, result.output
        assert AutoModelForCausalLM.from_pretrained(output).lte_config.expert_size == EXPERT_SIZE
        if what is not None:
            again = f"lte train --resume --output {output}"
            assert f"Warning: the model is saved in {output}, but {what}; to do that again: {again}" in result.stderr
        if code == 1:
            assert not (output / "result.json").exists()
            assert run("train", "--resume", "--output", output).exit_code == 0
        assert (output / "result.json").exists()


class TestAMistakeBlocksNothing:
    @pytest.mark.parametrize(
        ("flags", "message"),
        [
            (["--expert-size", "7"], "expert_size must divide"),
            (
                ["--chat-template", "broken.jinja"],
                "chat_template must be a Jinja template, got chat_template=broken.jinja",
            ),
            (["--distill-from", "gemma"], "distill_from must have the vocabulary of the model"),
        ],
    )
    def test_the_corrected_command_runs_in_the_same_folder(
        self,
        dense_folder: Path,
        run: Callable[..., Any],
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        flags: list[str],
        message: str,
    ) -> None:
        monkeypatch.chdir(tmp_path)
        Path("broken.jinja").write_text("{% for m in messages %}", encoding="utf-8")
        save_tiny_model(tmp_path / "gemma", vocab_size=310)
        result = run("train", "--model", dense_folder, "--output", "out", *SHORT, *flags)
        assert result.exit_code == 1
        assert message in result.stderr
        assert not Path("out/run.yaml").exists()
        short = [*SHORT, "--stage1-steps", "1", "--stage2-steps", "1"]
        assert run("train", "--model", dense_folder, "--output", "out", *short).exit_code == 0

    @pytest.mark.parametrize("more", [[], ["--resume"]])
    def test_what_earlier_versions_left_of_a_failed_start(
        self, dense_folder: Path, run: Callable[..., Any], tmp_path: Path, more: list[str]
    ) -> None:
        output = tmp_path / "out"
        (output / "checkpoints").mkdir(parents=True)
        (output / "run.yaml").write_text("model: no/such\nexpert_size: 7\n", encoding="utf-8")
        short = [*SHORT, "--stage1-steps", "1", "--stage2-steps", "1"]
        result = run("train", "--model", dense_folder, "--output", output, *short, *more)
        assert result.exit_code == 0, result.stderr
        assert yaml.safe_load((output / "run.yaml").read_text())["expert_size"] == EXPERT_SIZE
