"""`lte train`: from a dense model and text to a folder with a trained sparse model."""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

import typer
import yaml
from rich.console import Console

from lte.cli.command import (
    EXIT_ERROR,
    Interrupted,
    after_saving,
    check_folder,
    check_model,
    check_seed,
    print_error,
    quiet_transformers,
    read_template,
    read_text_file,
    reports_errors,
    takes_settings,
)
from lte.config import LteConfig, check_choice, check_expert_size
from lte.data.config import DataConfig, check_sources
from lte.data.tasks.registry import TaskConfig, check_no_text
from lte.files import check_place, write_json_atomic, write_text_atomic
from lte.progress import duration, shown_on
from lte.settings import build, option, read_settings_file, settings_of
from lte.train.combinations import check_combination, retargeted
from lte.train.config import TrainConfig

if TYPE_CHECKING:
    from lte.eval.sparsity import Measurement
    from lte.records import ResultRecord
    from lte.runs.pipeline import ModelSettings
    from lte.train.summary import TrainingSummary

Stages = Literal["both", "1", "2"]
SaveDtype = Literal["float32", "bfloat16", "float16"]
RUN_FILE, CHECKPOINTS = "run.yaml", "checkpoints"
# Settings that a resumed run may change. The first do not touch the weights. Other processes take their parts of a step
# otherwise, and a run of a version whose default was another one can go on as it began.
FREE_ON_RESUME = {
    *("logging_steps", "save_steps", "report_to", "resume"),
    *("batch_size", "gradient_accumulation_steps"),
    "tf32",
}
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
    save_dtype: SaveDtype | None = option(
        None, "What the weights of the trained folder are in, routers in fp32; unset: as they were trained."
    )
    resume: bool = option(False, "Go on with the interrupted run in output, with its settings.")

    def __post_init__(self) -> None:
        check_choice("stages", self.stages, get_args(Stages))
        if self.save_dtype is not None:
            check_choice("save_dtype", self.save_dtype, get_args(SaveDtype))
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
    `lte train --resume --output out`. On several GPUs: `torchrun --nproc-per-node 2 -m lte train ...`; in shards:
    `accelerate launch --config_file fsdp2.yaml --num_processes 8 -m lte train ...`, with a file from `lte configs`.
    With `--resume` from the start, the same command begins a run and goes on with it.
    """
    values = merge_settings(given, config)
    run = build(RunConfig, values)
    if values.get("task"):
        check_no_text(values)
    lte_config, train_config = build(LteConfig, values), build(TrainConfig, values)
    data, task, output = build(DataConfig, values), build(TaskConfig, values), Path(run.output).expanduser()
    check_inputs(run, lte_config, train_config, data, task, frozenset(values))
    check_output(output, run.resume)

    # From here on torch is loaded.
    from lte.runs.pipeline import ModelSettings
    from lte.train.checkpoints import clean_up, folder_lock, newest_checkpoint
    from lte.train.interruption import TrainingStopped
    from lte.train.optimisers import warn_of_lost_steps
    from lte.train.processes import is_main_process, launched

    quiet_transformers()
    warn_of_lost_steps(train_config)
    settings = ModelSettings(
        start=run.model,
        config=lte_config,
        train=train_config,
        stages=stages_of_run(run),
        teacher=run.model if run.distill_from == "initial" else run.distill_from,
        changed=frozenset(values),
    )
    again = launched(f"train --resume --output {shlex.quote(run.output)}")
    with folder_lock(output) if is_main_process() else nullcontext():
        if is_main_process():
            # What another process wrote before it gave the folder free.
            check_output(output, run.resume)
            clean_up(output)
        try:
            execute(run, settings, data, task, output, values)
        except KeyboardInterrupt:
            newest = newest_checkpoint(output / CHECKPOINTS)
            if (output / "config.json").exists():
                kept = f"The model is saved in {output}. To measure it again: {again}"
            elif (output / RUN_FILE).exists():
                none = "No checkpoint was written yet (see --save-steps)."
                kept = f"{f'The newest checkpoint is {newest}.' if newest else none} Go on with: {again}"
            else:
                kept = "The training had not begun, and nothing was written"
            raise Interrupted(kept) from None
        except TrainingStopped as stopped:
            if is_main_process():
                print_error(f"{stopped.message}. Go on with: {again}", "Stopped", "yellow")
            raise
        except Exception:
            newest = newest_checkpoint(output / CHECKPOINTS)
            if newest is not None and not (output / "config.json").exists() and is_main_process():
                print_error(f"{newest} holds what was trained; go on with: {again}", "Note", "yellow")
            raise


def stages_of_run(run: RunConfig) -> tuple[int, ...]:
    """Which stages run."""
    return (1, 2) if run.stages == "both" else (int(run.stages),)


def check_inputs(
    run: RunConfig,
    config: LteConfig,
    train: TrainConfig,
    data: DataConfig,
    task: TaskConfig,
    changed: frozenset[str],
) -> None:
    """Refuses what can be seen to be wrong before anything is loaded.

    Raises:
        ValueError: says what.
    """
    config.check_new()
    check_seed("seed", train.seed)
    check_seed("data_seed", data.data_seed)
    if run.chat_template is not None:
        if not Path(run.chat_template).expanduser().is_file():
            given = f"chat_template={run.chat_template}"
            raise ValueError(f"chat_template must be a file with a Jinja template, got {given}; give its path")
        read_text_file("chat_template", run.chat_template)
    if task.task is None:
        check_sources(data)
    check_folder("data_dir", task.data_dir)
    if run.distill_from not in (None, "initial"):
        check_model("distill_from", str(run.distill_from))
    found = check_model("model", run.model)
    if found:
        settings = found["lte"] if isinstance(found.get("lte"), dict) else {}
        sparse = bool(settings) and settings.get("name", LteConfig.name) == LteConfig.name
        own = LteConfig.from_dict(settings) if sparse else None
        check_start(run, train, sparse)
        check_fit(run, config, train, data, own, changed)
        widths = [found[name] for name in ("intermediate_size", "ffn_dim", "d_ff", "n_inner") if found.get(name)]
        if not sparse and train.recipe != "dense" and len(widths) == 1 and isinstance(widths[0], int):
            check_expert_size(widths[0], config.expert_size)


def execute(
    run: RunConfig,
    settings: ModelSettings,
    data: DataConfig,
    task: TaskConfig,
    output: Path,
    values: Mapping[str, Any],
) -> None:
    """Trains, saves, measures the saved folder, reports. Of several processes the first one saves and measures.

    Raises:
        ValueError: if the settings do not fit the model, or each other.
    """
    from lte.cli.train_watcher import TrainWatcher
    from lte.eval.models import DTYPES, load_config, save_folder
    from lte.hf.dense import load_tokenizer
    from lte.hf.loading import method_settings
    from lte.records import write_record
    from lte.report.router_health import router_health_table
    from lte.runs.measure import measure_folder
    from lte.runs.pipeline import make_model
    from lte.runs.workload import workload_of
    from lte.train.checkpoints import discard_checkpoints
    from lte.train.disk_space import what_to_delete_of_run
    from lte.train.optimisers import cast_weights_
    from lte.train.processes import is_main_process

    assert settings.config is not None
    start = load_config(run.model)
    check_model_config(run, settings, data, start)
    console = Console(quiet=not is_main_process())
    tokenizer = load_tokenizer(run.model)
    if run.chat_template is not None:
        tokenizer.chat_template = read_template(run.chat_template)
    measured = data.validation_split if "validation_split" in (settings.changed or ()) else None
    work = workload_of(task, data, tokenizer, settings.train.batch_size, (data.split, measured))
    begin = partial(write_run_file, output, values) if is_main_process() else lambda: None
    goes_on = run.resume and (output / RUN_FILE).exists()
    told = TrainWatcher(settings, work, output, run.save_dtype, console, begin, goes_on)
    place = output / CHECKPOINTS
    with shown_on(console) if is_main_process() else nullcontext():
        model, summary = make_model(settings, work, place, resume=run.resume, watcher=told, adapters=output)
    if not is_main_process():
        return
    if run.save_dtype is not None:
        cast_weights_(model, DTYPES[run.save_dtype])
    save_folder(model, tokenizer, output, lambda: what_to_delete_of_run(output, place))
    # Nothing that is lost from here on is worth the model.
    after = partial(
        after_saving, f"the model is saved in {output}", again=f"lte train --resume --output {shlex.quote(run.output)}"
    )
    after(what="writing its log", step=lambda: write_json_atomic(output / "training_log.json", summary.log_history))
    measure = partial(
        measure_folder,
        output,
        work,
        told.precision.dtype,
        tf32=told.precision.tf32,
        model=run.model,
        seed=settings.train.seed,
        tokens_trained=summary.tokens_trained,
        wall_time_s=summary.wall_time_s,
        config={
            # Of a model that was trained on some settings are its own.
            "lte": method_settings(model.config) or settings.config.to_dict(),
            **work.settings,
            "train": settings.train.to_dict(),
            "distill_from": run.distill_from,
            "stages": list(settings.stages),
            "data_info": work.info,
            "dtype": told.precision.dtype,
            "tf32": told.precision.tf32,
        },
        **told.before,
    )
    # Its memory is for the folder that is loaded again.
    del model
    begun = time.monotonic()
    told.tell_measuring("the saved model")
    found = after(what="measuring it", step=measure)
    if found is None:
        raise typer.Exit(EXIT_ERROR)
    console.print(f"Measuring: {duration(time.monotonic() - begun)}.", highlight=False)
    measurement = found.result.measurement

    def tell() -> None:
        if measurement is not None:
            console.print(router_health_table(measurement))
        lines = outcome(output, settings.stages, found.record)
        console.print("\n".join(lines), highlight=False, markup=False, soft_wrap=True)

    steps: dict[str, Callable[[], object]] = {
        "writing its record": lambda: write_record(output / "result.json", found.record),
        "drawing its report": lambda: save_report(output, summary, measurement),
        "printing its numbers": tell,
    }
    # Of all of them, also where one fails.
    done = [after(what=what, step=partial(_done, step)) for what, step in steps.items()]
    if all(done):
        # What fails can be done again from the last one.
        discard_checkpoints(place)


def _done(step: Callable[[], object]) -> bool:
    step()
    return True


def check_model_config(run: RunConfig, settings: ModelSettings, data: DataConfig, start: Any) -> None:
    """Refuses what does not fit the model that training starts from, by its config alone.

    Raises:
        ValueError: says what.
    """
    from lte.eval.models import is_lte
    from lte.hf.install import check_reachable
    from lte.hf.loading import method_settings

    found, config = method_settings(start), settings.config
    assert isinstance(config, LteConfig)
    check_start(run, settings.train, is_lte(start))
    own = LteConfig.from_dict(found) if found is not None and is_lte(start) else None
    wanted = check_fit(run, config, settings.train, data, own, settings.changed or frozenset())
    if settings.train.recipe != "dense" and (found is None or own is not None):
        check_reachable(wanted, check_expert_size(_ffn_neurons(start), wanted.expert_size))


def _ffn_neurons(config: Any) -> int:
    """The neurons of a model's FFNs, without its weights."""
    from lte.eval.flops import meta_model
    from lte.hf.families import dense_ffns, family_of
    from lte.hf.install import num_neurons, wrapped_ffns

    family, model = family_of(config), meta_model(config)
    ffns: Mapping[str, Any] = wrapped_ffns(model) or dense_ffns(model, family)
    return num_neurons(next(iter(ffns.values())), family.layout)


def check_fit(
    run: RunConfig,
    config: LteConfig,
    train: TrainConfig,
    data: DataConfig,
    own: LteConfig | None,
    changed: frozenset[str],
) -> LteConfig:
    """Refuses settings that never act together, or that an LTE model cannot take; `own` is its, of a dense one `None`.

    Returns:
        The settings of the model that will train.

    Raises:
        ValueError: says which.
    """
    wanted = config if own is None else retargeted(own, config, changed)
    check_combination(
        wanted,
        train,
        stages_of_run(run),
        distils=bool(run.distill_from and train.distillation_weight),
        sequence_length=data.sequence_length,
        new_routers=own is None,
    )
    return wanted


def check_start(run: RunConfig, train: TrainConfig, sparse: bool) -> None:
    """Refuses settings that do not fit each other, before anything is loaded; `sparse` is a start from an LTE folder.

    Raises:
        ValueError: says which.
    """
    weight, recipe = train.distillation_weight, train.recipe
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
    from lte.report.router_health import router_health_markdown

    if measurement is not None:
        write_text_atomic(output / "router_health.md", router_health_markdown(measurement) + "\n")
    save_figure(training_curves_figure(summary.log_history), output / "training.png")
    if measurement is not None:
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
    kinds = [name for name in record["metrics"] if name.startswith("perplexity_") and name != "perplexity_per_word"]
    lines += [f"Perplexity on {name.partition('_')[2]}: {record['metrics'][name]:.3f}." for name in kinds]
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
    output = Path(values.get("output") or "").expanduser()
    saved = output / RUN_FILE
    if values.get("resume") and values.get("output") and saved.exists():
        settings = settings_of(GROUPS)
        before = read_settings_file(saved, GROUPS)
        for name, value in values.items():
            earlier = before.get(name, settings[name].default)
            # What never trained, because of a mistake say, may begin otherwise.
            if name not in FREE_ON_RESUME | {"output"} and value != earlier and _what_trained(output):
                raise ValueError(
                    f"a resumed run must keep its settings, got {name}={value} where it began with {name}={earlier} "
                    f"({saved}); leave {settings[name].flag} out, or start a new run with another --output"
                )
        values = {**before, **values}
    elif values.get("resume") and values.get("output") and "model" not in values:
        raise ValueError(
            f"output must hold a run to resume, got output={output}, where none has begun; start it without --resume"
        )
    if values.get("distill_from"):
        values.setdefault("distillation_weight", 1.0)
    return values


def check_output(output: Path, resume: bool) -> None:
    """Refuses an output folder that holds a model or another run.

    Raises:
        ValueError: if it does, or is a file.
    """
    check_place("output", output, folder=True)
    used = _what_trained(output)
    earlier = [name for name in ("stage1", "stage2") if (output / name).exists()]
    if earlier and resume:
        raise ValueError(
            f"output must hold a run of this version to resume, got output={output} with {earlier[0]} of an earlier "
            "one; start anew with another --output"
        )
    if resume and used == ["config.json"]:
        raise ValueError(
            f"output must hold an unfinished run to resume, got output={output}, whose model is trained and saved and "
            "whose checkpoints are gone; measure it with lte eval, or train on from it as --model of another --output"
        )
    if (used or earlier) and not resume:
        raise ValueError(
            f"output must be a new folder, got output={output}, which holds {(used + earlier)[0]}; take another one, "
            "or go on with an interrupted run by --resume"
        )


def _what_trained(output: Path) -> list[str]:
    """What a training left in a folder; one that failed before its first step leaves nothing that counts."""
    checkpoint = next((output / CHECKPOINTS).glob("checkpoint-*"), None)
    found = ["config.json"] if (output / "config.json").exists() else []
    return found + ([f"{CHECKPOINTS}/{checkpoint.name}"] if checkpoint is not None else [])


def write_run_file(output: Path, values: Mapping[str, Any]) -> None:
    """Remembers the settings in `output/run.yaml`: a record, and what --resume reads."""
    output.mkdir(parents=True, exist_ok=True)
    kept = {name: value for name, value in sorted(values.items()) if name != "resume"}
    write_text_atomic(output / RUN_FILE, yaml.safe_dump(kept))
