"""`lte train`: from a dense model and text to a folder with a trained sparse model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import typer
import yaml
from rich.console import Console

from lte.cli.errors import Interrupted, reports_errors
from lte.cli.models import quiet_transformers
from lte.cli.settings import takes_settings
from lte.cli.training_run import TrainingRun
from lte.config import LteConfig, check_choice
from lte.data.config import DataConfig
from lte.data.tasks.config import TaskConfig
from lte.runs.workload import check_no_text
from lte.settings import build, option, read_settings_file, settings_of
from lte.train.config import TrainConfig
from lte.train.processes import is_main_process

Stages = Literal["both", "1", "2"]
RUN_FILE = "run.yaml"
# Settings that a resumed run may change: they do not touch the weights.
FREE_ON_RESUME = {"logging_steps", "save_steps", "report_to", "resume"}


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """What to train and where to put it."""

    model: str = option("", "Dense model: hub name, folder, or GGUF file; or a folder that lte train wrote.")
    output: str = option("", "Folder for the trained model, its checkpoints, and its report.")
    stages: Stages = option("both", "Which stages to run; 2 starts from an LTE folder.")
    distill_from: str | None = option(
        None,
        "Teacher: initial (the model as it was before conversion), or a dense model. Sets distillation_weight to 1 "
        "unless you set it.",
    )
    chat_template: str | None = option(
        None,
        "File with a Jinja chat template for the tokenizer, which the trained folder keeps; base models have none.",
    )
    resume: bool = option(False, "Go on with the interrupted run in output, with its settings.")

    def __post_init__(self) -> None:
        check_choice("stages", self.stages, get_args(Stages))
        for name in ("model", "output"):
            if not getattr(self, name):
                raise ValueError(f"{name} must be given: --{name} on the command line or {name}: in the YAML file")


GROUPS: dict[type, str] = {
    RunConfig: "Run",
    LteConfig: "Sparsity",
    TaskConfig: "Task",
    DataConfig: "Data",
    TrainConfig: "Training",
}


@reports_errors
@takes_settings(GROUPS)
def train(
    config: Annotated[
        Path | None,
        typer.Option(help="YAML file with any of the settings below, one per line; flags override it."),
    ] = None,
    **given: Any,
) -> None:
    """Trains a sparse model in two stages and writes a folder that from_pretrained and the other commands load.

    Stage 1 trains model and routers while the sparsity rises to its target, stage 2 adapts the model to it. At the
    end the thresholds are set to meet the target, and sparsity and perplexity are measured on held-out text.

    Example: `lte train --model HuggingFaceTB/SmolLM2-135M --train my-text.jsonl --output out --target-sparsity 0.5`

    With `--task` it learns one of the paper's tasks: first `lte train --task sst2 --model roberta-base --output dense
    --recipe dense`, then from there `lte train --task sst2 --model dense --output out`.

    Without `--train` and `--task` it learns on a small text that comes with Python. After an interruption:
    `lte train --resume --output out`. On several GPUs: `torchrun --nproc-per-node 2 -m lte train ...`
    """
    quiet_transformers()
    console = Console(quiet=not is_main_process())
    values = merge_settings(given, config)
    run = build(RunConfig, values)
    if values.get("task"):
        check_no_text(values)
    output = Path(run.output).expanduser()
    training = TrainingRun(
        model=run.model,
        output=output,
        stages=(1, 2) if run.stages == "both" else (int(run.stages),),
        distill_from=run.distill_from,
        chat_template=run.chat_template,
        resume=run.resume,
        lte_config=build(LteConfig, values),
        data_config=build(DataConfig, values),
        train_config=build(TrainConfig, values),
        task_config=build(TaskConfig, values),
        given=frozenset(values),
    )
    if is_main_process():
        check_output(output, run.resume)
        write_run_file(output, values)
    try:
        training.execute(console)
    except KeyboardInterrupt:
        raise Interrupted(f"{_progress(output)} Go on with: lte train --resume --output {run.output}") from None


def merge_settings(given: Mapping[str, Any], config: Path | None) -> dict[str, Any]:
    """Settings from the flags, under them the YAML file, under them those of the run that is resumed.

    Raises:
        ValueError: if a resumed run is given other settings than it began with.
    """
    values = {**(read_settings_file(config, GROUPS) if config else {}), **given}
    saved = Path(values.get("output") or "").expanduser() / RUN_FILE
    if values.get("resume") and values.get("output") and saved.exists():
        settings = settings_of(GROUPS)
        before = read_settings_file(saved, GROUPS)
        for name, value in values.items():
            earlier = before.get(name, settings[name].default)
            if name not in FREE_ON_RESUME | {"output"} and value != earlier:
                raise ValueError(
                    f"a resumed run must keep its settings, got {name}={value} where it began with {name}={earlier} "
                    f"({saved}); leave {settings[name].flag} out, or start a new run with another --output"
                )
        values = {**before, **values}
    if values.get("distill_from"):
        values.setdefault("distillation_weight", 1.0)
    return values


def check_output(output: Path, resume: bool) -> None:
    """Refuses an output folder that holds a model or another run.

    Raises:
        ValueError: if it does, or is a file.
    """
    if output.is_file():
        raise ValueError(f"output must be a folder, got output={output}, which is a file")
    used = [name for name in ("config.json", RUN_FILE, "stage1", "stage2") if (output / name).exists()]
    if used and not resume:
        raise ValueError(
            f"output must be a new folder, got output={output}, which holds {used[0]}; take another one, or go on "
            "with an interrupted run by --resume"
        )


def write_run_file(output: Path, values: Mapping[str, Any]) -> None:
    """Remembers the settings in `output/run.yaml`: a record, and what --resume reads."""
    output.mkdir(parents=True, exist_ok=True)
    kept = {name: value for name, value in sorted(values.items()) if name != "resume"}
    (output / RUN_FILE).write_text(yaml.safe_dump(kept))


def _progress(output: Path) -> str:
    checkpoints = sorted(output.glob("stage*/checkpoint-*"), key=lambda path: path.stat().st_mtime)
    finished = sorted(output.glob("stage*/stage.json"))
    if checkpoints:
        return f"The newest checkpoint is {checkpoints[-1]}."
    return f"Finished: {finished[-1].parent.name}." if finished else "No checkpoint was written yet (see --save-steps)."
