"""The commands of experiments/paper: their numbers are the paper's, and they run on tiny models of the families."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from transformers import AutoTokenizer

from lte.bench import timing
from lte.cli.train import RunConfig
from lte.config import LteConfig
from lte.data.config import DataConfig
from lte.data.tasks import TaskConfig, get_task
from lte.eval.harness import TASK_FILES
from lte.runs.pipeline import ModelSettings
from lte_cli import load_command
from tests.cli.conftest import run, save_tiny_model
from tests.data.tasks.made_up import (
    write_e2e,
    write_mmlu,
    write_sst2,
    write_stsb,
    write_tulu,
    write_wikitext,
    write_xsum,
)
from tests.paper_commands import COMMANDS, FOLDER, HUB, README, ROOT, Command, place

__all__ = ["run"]

GLUE = {"sst2", "mrpc", "rte", "cola", "stsb", "qnli", "mnli", "qqp"}
TEXTS = {"xsum", "e2e", "wikitext103"}
TRAINING = [command for command in COMMANDS if command.name == "train"]


@dataclass(frozen=True)
class Table:
    """A row of the paper's table of training settings; sets where it gives several values."""

    stage1_rate: set[float]
    stage2_rate: set[float]
    batch: set[int]
    stage1_epochs: set[float]
    stage2_epochs: set[float]
    tasks: set[str]


GPT2 = {"stage1_rate": {5e-5}, "stage2_rate": {5e-5}, "batch": {8}, "stage1_epochs": {1}}
PAPER = {
    "roberta-base": Table({2e-5, 5e-5}, {5e-5}, {16, 32}, {1, 10}, {1, 3, 10}, GLUE),
    "roberta-large": Table({2e-6, 5e-6, 3e-5}, {2e-6, 5e-6, 3e-5}, {16, 32}, {1, 2, 3, 10}, {3, 5, 10}, GLUE),
    "gpt2-medium": Table(**GPT2, stage2_epochs={1, 3}, tasks=TEXTS),
    "llama-7b": Table({1.5e-5}, {1.5e-5}, {16}, {1}, {1}, TEXTS),
    "llama2-7b": Table({2e-5}, {2e-5}, {128}, {1}, {4}, {"tulu"}),
}


class TrainingSettings(NamedTuple):
    """What `lte train` has read when it begins."""

    run: RunConfig
    model: ModelSettings
    data: DataConfig
    task: TaskConfig
    output: Path


@pytest.fixture
def work_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in which the commands find the settings files."""
    (tmp_path / "experiments").symlink_to(ROOT / "experiments")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def settings_of(run: Callable[..., Any], work_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """The settings that a command trains with, as `lte train` reads them."""
    runs: list[TrainingSettings] = []
    # The folders that earlier commands make, and the data, are not here.
    monkeypatch.setattr("lte.cli.train.check_inputs", lambda *inputs: None)
    monkeypatch.setattr("lte.cli.train.execute", lambda *settings: runs.append(TrainingSettings(*settings[:5])))

    def read(command: Command, *flags: str) -> TrainingSettings:
        result = run(*command.arguments, *flags)
        assert result.exit_code == 0, result.output + result.stderr
        return runs.pop()

    return read


def test_every_model_and_task_has_its_commands_in_order() -> None:
    made: set[str] = set()
    found: dict[tuple[str, str], list[str]] = {}
    for command in COMMANDS:
        source = command.value("--model") if command.name == "train" else command.arguments[1]
        if source.startswith("runs/"):
            assert source in made, f"{source} is used before it is made"
        if command.name == "train":
            made.add(command.value("--output"))
        folder = command.value("--output") if command.name == "train" else source
        model, task, what = place(folder)
        found.setdefault((model, task), []).append(f"{command.name} {what}")
    assert set(found) == {(model, task) for model, row in PAPER.items() for task in row.tasks}
    for (model, _), steps in found.items():
        expected = ["train dense", "train lte", "eval lte"]
        expected += ["eval dense", "eval lte"] if model == "llama2-7b" else []
        assert steps == expected + ([] if "roberta" in model else ["bench lte"])
    outputs = [command.value("--output") + command.value("--json") for command in COMMANDS]
    assert len(set(outputs)) == len(outputs)


def test_every_settings_file_is_used() -> None:
    used = {command.value("--config") for command in TRAINING}
    assert used == {str(path.relative_to(ROOT)) for path in FOLDER.glob("*.yaml")}


@pytest.mark.parametrize("command", TRAINING, ids=lambda command: command.value("--output"))
def test_the_numbers_are_the_papers(settings_of: Callable[..., TrainingSettings], command: Command) -> None:
    found = settings_of(command)
    model, task, what = place(str(found.output))
    train, row = found.model.train, PAPER[model]
    assert found.task.task == task
    assert found.run.model == (HUB[model] if what == "dense" else f"runs/{model}/{task}/dense")
    batch = train.batch_size * train.gradient_accumulation_steps * command.processes
    assert batch in row.batch
    assert train.warmup_ratio == 0.06
    # So that a batch counts examples; rows of classifications never hold several.
    assert task in GLUE or not found.data.pack
    if "7b" in model:
        assert train.bf16
        assert train.gradient_checkpointing
        assert command.processes == 8
    if what == "dense":
        check_plain_fine_tuning(found, task)
        return
    rate = train.stage2_learning_rate or train.learning_rate
    assert train.learning_rate in row.stage1_rate
    assert rate in row.stage2_rate
    assert rate == train.learning_rate or model == "roberta-base"
    assert train.stage1_epochs in row.stage1_epochs
    assert train.stage2_epochs in row.stage2_epochs
    if model == "gpt2-medium":
        assert train.stage2_epochs == {"xsum": 1, "e2e": 1, "wikitext103": 3}[task]
    assert (train.recipe, train.separability_weight, train.weight_decay, train.eta) == ("paper", 0.5, 0.0, None)
    assert (found.model.stages, train.stage1_steps, train.stage2_steps) == ((1, 2), -1, -1)
    lte_config = found.model.config
    assert isinstance(lte_config, LteConfig)
    assert (lte_config.threshold, lte_config.expert_size, lte_config.grouping) == (0.5, 32, "kmeans")
    if model == "llama-7b":
        assert lte_config.target_sparsity == {"xsum": 0.84, "e2e": 0.93, "wikitext103": 0.69}[task]
    if task in GLUE:
        assert 0.8 <= lte_config.target_sparsity <= 0.95


def check_plain_fine_tuning(found: TrainingSettings, task: str) -> None:
    train = found.model.train
    assert train.recipe == "dense"
    # One decaying learning rate.
    assert found.model.stages == (2,)
    assert train.stage2_steps == -1
    if task not in GLUE:
        assert (train.stage2_epochs, train.weight_decay) == (3, 0)
        return
    assert (train.stage2_epochs, train.weight_decay) == (10, 0.1)
    assert train.stage2_learning_rate is None
    # RoBERTa's search space.
    assert train.learning_rate in {1e-5, 2e-5, 3e-5}


def test_the_other_ways_to_a_sparsity_are_settings(settings_of: Callable[..., TrainingSettings]) -> None:
    command = next(command for command in TRAINING if command.value("--output").endswith("lte"))
    (flags,) = re.findall(r"`(--recipe straight_through[^`]*)`", README)
    own = settings_of(command, *flags.split(), "--output", "own").model.train
    assert own.holds_target
    assert own.separability_weight == 0
    for path in FOLDER.glob("*.yaml"):
        (eta,) = re.findall(r"^# eta: ([\d.]+)$", path.read_text(), re.MULTILINE) or (
            ["0"] if "dense" in path.name else []
        )
        assert 0 <= float(eta) <= 2
    fixed = settings_of(command, "--eta", "0.5", "--output", "fixed").model.train
    assert fixed.eta == 0.5


@pytest.mark.parametrize(
    "command",
    [command for command in COMMANDS if command.name != "train"],
    ids=lambda command: " ".join((command.name, *command.arguments[1:4])),
)
def test_measuring_commands_have_known_flags(command: Command) -> None:
    assert command.processes == 1
    context = load_command(command.name).make_context(command.name, list(command.arguments[1:]))
    task = context.params.get("task")
    if task is None:
        return
    get_task(task)
    # The rows of the training run.
    model, own_task, _ = place(command.arguments[1])
    assert task == own_task
    files = {"gpt2-medium": 1024, "llama-7b": 2048, "llama2-7b": 2048}
    assert (context.params["sequence_length"] or 512) == files.get(model, 512)


@pytest.fixture(scope="session")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with tiny models under the names of the hub: 4 experts of 32, and positions as the real ones."""
    folder = tmp_path_factory.mktemp("hub")
    sizes = {"roberta": ("intermediate_size", 514), "gpt2": ("n_inner", 1024), "llama": ("intermediate_size", 2048)}
    for name in HUB.values():
        family = next(family for family in sizes if family in name.lower().rpartition("/")[2].replace("-", ""))
        neurons, positions = sizes[family]
        save_tiny_model(folder / name, family, **{neurons: 128, "max_position_embeddings": positions})
        if family != "roberta":
            # As in the originals: nothing to pad with, no chats.
            (folder / name / "chat_template.jinja").unlink()
            tokenizer = AutoTokenizer.from_pretrained(folder / name)
            tokenizer.pad_token = None
            tokenizer.save_pretrained(folder / name)
    data = folder / "data"
    write_sst2(data / "SST-2")
    write_stsb(data / "STS-B")
    write_e2e(data / "e2e")
    write_xsum(data / "xsum")
    write_wikitext(data / "wikitext103")
    write_tulu(data / "tulu")
    write_mmlu(data / "mmlu", re.findall(r"subject: (\w+)", (TASK_FILES / "mmlu_files.yaml").read_text()))
    return folder


@pytest.fixture
def with_hub(hub: Path, work_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The work folder with the tiny models in it: a name of the hub is a folder here."""
    for name in [*{name.split("/")[0] for name in HUB.values()}, "data"]:
        (work_folder / name).symlink_to(hub / name)
    monkeypatch.setattr(timing, "SWEEP_BYTES", 1 << 12)
    return work_folder


# What makes a command small; the last of several flags counts.
ON_FEW = ["--data-dir", "data", "--limit", "2", "--max-new-tokens", "4"]
SMALL = {
    "train": [*ON_FEW, "--stage1-steps", "2", "--stage2-steps", "2"],
    "eval": ON_FEW,
    "bench": ["--quick", "--repeats", "1", "--sparsities", "own", "--context-length", "16", "--no-compile"],
}
# Together every file, family and kind of task, and both loops of GLUE.
RUNNING = [
    "roberta-base/sst2", "roberta-large/stsb", "gpt2-medium/xsum", "gpt2-medium/wikitext103", "llama-7b/e2e",
    pytest.param("llama2-7b/tulu", marks=pytest.mark.slow),
]  # fmt: skip
# The commands of `lte bench` differ in the folder alone: one for each family is enough.
TIMED = ("gpt2-medium/xsum", "llama2-7b/tulu")


@pytest.mark.parametrize("name", RUNNING)
def test_the_commands_run_on_a_tiny_model(run: Callable[..., Any], with_hub: Path, name: str) -> None:
    model, task = name.split("/")
    mine = [command for command in COMMANDS if any(f"runs/{name}/" in part for part in command.arguments)]
    for command in mine:
        if command.name == "bench" and name not in TIMED:
            continue
        flags = SMALL[command.name]
        if command.processes > 1:
            flags = [*flags, "--gradient-accumulation-steps", "2"]
        if command.value("--harness"):
            pytest.importorskip("lm_eval")
            assert command.value("--harness") == "mmlu"
            flags = ["--harness", "mmlu_files", "--harness-data", "data"]
        result = run(*command.arguments, *flags)
        assert result.exit_code == 0, (command, result.output, result.stderr)
    records = {
        path.relative_to("runs").as_posix(): json.loads(path.read_text()) for path in Path("runs").rglob("*.json")
    }
    dense, sparse = (records[f"{name}/{what}/result.json"] for what in ("dense", "lte"))
    assert (dense["method"], sparse["method"]) == ("dense", "lte")
    assert dense["metric"] == sparse["metric"] == get_task(task).main_metric
    assert sparse["config"]["lte"]["expert_size"] == 32
    assert records[f"{name}/lte.json"]["metrics"] == pytest.approx(sparse["metrics"], rel=0.05, nan_ok=True)
    if model == "llama2-7b":
        assert records[f"{name}/dense-mmlu.json"]["config"]["num_fewshot"] == 5
        assert (
            AutoTokenizer.from_pretrained(f"runs/{name}/lte").chat_template == (FOLDER / "tulu_chat.jinja").read_text()
        )


def test_lm_eval_has_the_group_that_is_named() -> None:
    tasks = pytest.importorskip("lm_eval.tasks")
    (name,) = {command.value("--harness") for command in COMMANDS} - {""}
    group = Path(tasks.__file__).parent / "mmlu" / "default" / "_mmlu.yaml"
    assert f"group: {name}" in group.read_text().splitlines()


def test_tulus_chat_template(hub: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(hub / HUB["llama2-7b"])
    tokenizer.chat_template = (FOLDER / "tulu_chat.jinja").read_text()
    chat = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hello"}]
    text = "<s><|system|>\nBe kind.\n<|user|>\nHello\n<|assistant|>\n"
    assert tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) == text
    answered = [*chat, {"role": "assistant", "content": "Hi"}]
    assert tokenizer.apply_chat_template(answered, tokenize=False) == f"{text}Hi</s>\n"
