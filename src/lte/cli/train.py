"""`lte train`: from a dense model and text to a folder with a trained sparse model."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import typer
import yaml
from rich.console import Console

from lte.cli.command import Interrupted, quiet_transformers, reports_errors, takes_settings
from lte.config import LteConfig, check_choice
from lte.data.config import DataConfig
from lte.data.tasks.registry import TaskConfig
from lte.eval.models import is_lte, load_config, save_folder
from lte.eval.sparsity import Measurement
from lte.files import write_json_atomic, write_text_atomic
from lte.hf.dense import load_tokenizer
from lte.records import ResultRecord, write_record
from lte.report.router_health import router_health_markdown, router_health_table
from lte.runs.measure import measure_folder
from lte.runs.pipeline import ModelSettings, Watcher, make_model
from lte.runs.workload import Workload, check_no_text, workload_of
from lte.settings import build, option, read_settings_file, settings_of
from lte.train.checkpoints import clean_up, folder_lock, newest_checkpoint
from lte.train.config import TrainConfig
from lte.train.processes import is_main_process
from lte.train.summary import TrainingSummary

Stages = Literal["both", "1", "2"]
RUN_FILE, CHECKPOINTS = "run.yaml", "checkpoints"
# Settings that a resumed run may change: they do not touch the weights.
FREE_ON_RESUME = {"logging_steps", "save_steps", "report_to", "resume"}
# A miss of the target by more than this is worth a hint.
TOLERANCE = 0.02


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
    values = merge_settings(given, config)
    run = build(RunConfig, values)
    if values.get("task"):
        check_no_text(values)
    settings = ModelSettings(
        start=run.model,
        config=build(LteConfig, values),
        train=build(TrainConfig, values),
        stages=(1, 2) if run.stages == "both" else (int(run.stages),),
        teacher=run.model if run.distill_from == "initial" else run.distill_from,
        changed=frozenset(values),
    )
    data, task, output = build(DataConfig, values), build(TaskConfig, values), Path(run.output).expanduser()
    with folder_lock(output) if is_main_process() else nullcontext():
        if is_main_process():
            check_output(output, run.resume)
            clean_up(output)
            write_run_file(output, values)
        try:
            execute(run, settings, data, task, output)
        except KeyboardInterrupt:
            newest = newest_checkpoint(output / CHECKPOINTS)
            kept = (
                f"The newest checkpoint is {newest}." if newest else "No checkpoint was written yet (see --save-steps)."
            )
            raise Interrupted(f"{kept} Go on with: lte train --resume --output {run.output}") from None


def execute(run: RunConfig, settings: ModelSettings, data: DataConfig, task: TaskConfig, output: Path) -> None:
    """Trains, saves, measures the saved folder, reports. Of several processes the first one saves and measures.

    Raises:
        ValueError: if the settings do not fit the model, or each other.
    """
    assert settings.config is not None
    check_start(run, settings)
    console = Console(quiet=not is_main_process())
    tokenizer = load_tokenizer(run.model)
    if run.chat_template is not None:
        tokenizer.chat_template = _read_template(run.chat_template)
    measured = data.validation_split if "validation_split" in (settings.changed or ()) else None
    work = workload_of(task, data, tokenizer, settings.train.batch_size, (data.split, measured))
    told = _Told(work, console)
    model, summary = make_model(settings, work, output / CHECKPOINTS, resume=run.resume, watcher=told, adapters=output)
    if not is_main_process():
        return
    save_folder(model, tokenizer, output)
    write_json_atomic(output / "training_log.json", summary.log_history)
    # Its memory is for the folder that is loaded again.
    del model
    found = measure_folder(
        output,
        work,
        model=run.model,
        seed=settings.train.seed,
        tokens_trained=summary.tokens_trained,
        wall_time_s=summary.wall_time_s,
        config={
            "lte": settings.config.to_dict(),
            **work.settings,
            "train": settings.train.to_dict(),
            "distill_from": run.distill_from,
            "stages": list(settings.stages),
            "data_info": work.info,
        },
        **told.before,
    )
    write_record(output / "result.json", found.record)
    measurement = found.result.measurement
    save_report(output, summary, measurement)
    if measurement is not None:
        console.print(router_health_table(measurement))
    lines = outcome(output, settings.stages, found.record)
    console.print("\n".join(lines), highlight=False, markup=False, soft_wrap=True)


def _read_template(name: str) -> str:
    path = Path(name).expanduser()
    if not path.is_file():
        raise ValueError(f"chat_template must be a file with a Jinja template, got chat_template={name}; give its path")
    return path.read_text()


class _Told(Watcher):
    """Says what data there is, and measures a model that is worth it before it trains."""

    def __init__(self, work: Workload, console: Console):
        self.work, self.console = work, console
        # What a result record says of the model before training.
        self.before: dict[str, Any] = {}

    def loaded(self, model: Any) -> None:
        info = self.work.info
        sizes = f"{info['train']['tokens']} training tokens, {info['validation']['tokens']} held out"
        self.console.print(f"Data: {self.work.name}, {sizes}.", highlight=False)
        for line in self.work.announcements:
            self.console.print(f"Data: {line}", highlight=False, markup=False, soft_wrap=True)
        if self.work.measures_first:
            found = self.work.measure(model)
            self.before = {f"{found.metric}_before": found.value}
            text = f"{found.metric.capitalize()} before training: {found.value:.3f}."
            self.console.print(text, highlight=False)


def check_start(run: RunConfig, settings: ModelSettings) -> None:
    """Refuses settings that do not fit each other, before anything is loaded.

    Raises:
        ValueError: says which.
    """
    sparse = is_lte(load_config(run.model))
    weight, recipe = settings.train.distillation_weight, settings.train.recipe
    if run.stages == "2" and not sparse and recipe != "dense":
        raise ValueError(f"stages=2 must start from an LTE folder (stage 1 trains the routers), got {run.model}")
    if sparse and run.distill_from == "initial":
        raise ValueError("distill_from must name a dense model when training goes on from an LTE folder, got initial")
    if weight and not run.distill_from:
        raise ValueError(
            f"distillation_weight={weight:g} must have a teacher; add --distill-from initial, or a dense model"
        )
    if run.distill_from and not weight:
        raise ValueError("distillation_weight must be positive when distill_from is given, got 0")


def save_report(output: Path, summary: TrainingSummary, measurement: Measurement | None) -> None:
    """Draws the training curves and the router health; a folder without them is complete."""
    from lte.report.figures import save_figure  # loads matplotlib
    from lte.report.model_figures import router_health_figure, training_curves_figure

    save_figure(training_curves_figure(summary.log_history), output / "training.png")
    if measurement is not None:
        (output / "router_health.md").write_text(router_health_markdown(measurement) + "\n")
        save_figure(router_health_figure(measurement), output / "router_health.png")


def outcome(output: Path, stages: tuple[int, ...], record: ResultRecord) -> list[str]:
    """Quality, target against measured sparsity, and what to do next."""
    task, metric = record["config"].get("task"), record["metric"]
    where = f"{record['task']} {record['split']}" if task else "held-out text"
    before = record.get(f"{metric}_before")
    if before is None:
        lines = [f"On {where}: " + ", ".join(f"{name} {value:.3f}" for name, value in record["metrics"].items()) + "."]
    else:
        lines = [f"{metric.capitalize()} on {where}: {before:.3f} before training, {record['value']:.3f} after."]
    if record["measurement"] is None:
        lines.append("The model is dense (recipe=dense, a control).")
    else:
        target, measured = record["target_sparsity"], record["sparsity"]
        lines.append(
            f"FFN sparsity: target {100 * target:g}%, measured {100 * measured:.2f}% on "
            f"{record['measurement']['tokens']} held-out tokens in hard mode."
        )
        if 2 not in stages:
            lines.append("The thresholds are set after stage 2: train on with --stages 2 and this folder as --model.")
        elif abs(target - measured) > TOLERANCE:
            lines.append(
                "The target was missed by more than 2 points: train longer, raise --router-learning-rate, or train on "
                "text that is more like the held-out one."
            )
    folder = shlex.quote(str(output))
    following = f"lte eval {folder} --task {task['task']}" if task else f"lte generate {folder} --prompt 'Once upon'"
    return [*lines, f"Saved to {folder}. Next: lte inspect {folder}; {following}"]


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
    used = [name for name in ("config.json", RUN_FILE, CHECKPOINTS) if (output / name).exists()]
    earlier = [name for name in ("stage1", "stage2") if (output / name).exists()]
    if earlier and resume:
        raise ValueError(
            f"output must hold a run of this version to resume, got output={output} with {earlier[0]} of an earlier "
            "one; start anew with another --output"
        )
    if (used or earlier) and not resume:
        raise ValueError(
            f"output must be a new folder, got output={output}, which holds {(used + earlier)[0]}; take another one, "
            "or go on with an interrupted run by --resume"
        )


def write_run_file(output: Path, values: Mapping[str, Any]) -> None:
    """Remembers the settings in `output/run.yaml`: a record, and what --resume reads."""
    output.mkdir(parents=True, exist_ok=True)
    kept = {name: value for name, value in sorted(values.items()) if name != "resume"}
    write_text_atomic(output / RUN_FILE, yaml.safe_dump(kept))
