"""What `lte train` leaves in its folder and says at the end."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from lte.eval.models import measurement_summary, save_folder
from lte.eval.sparsity import Measurement
from lte.records import ResultRecord, write_json_atomic, write_record
from lte.report.router_health import router_health_markdown, router_health_table
from lte.train.summary import TrainingSummary

# A miss of more than this is worth a hint.
TOLERANCE = 0.02


@dataclass(frozen=True)
class Outcome:
    """What a run found.

    Attributes:
        record: the result record of the trained model on the held-out text.
        measurement: its routing there; `None` for the dense control.
        summary: of the training.
    """

    record: ResultRecord
    measurement: Measurement | None
    summary: TrainingSummary


def save_outcome(model: Any, tokenizer: Any, output: Path, outcome: Outcome) -> None:
    """Writes `result.json`, `training_log.json`, the router health, and last the model."""
    from lte.report.figures import save_figure  # loads matplotlib
    from lte.report.model_figures import router_health_figure, training_curves_figure

    write_json_atomic(output / "training_log.json", outcome.summary.log_history)
    write_record(output / "result.json", outcome.record)
    save_figure(training_curves_figure(outcome.summary.log_history), output / "training.png")
    if outcome.measurement is not None:
        data = outcome.record["config"]["data_info"]
        model.config.lte_measurement = measurement_summary(outcome.measurement, data, outcome.record)
        (output / "router_health.md").write_text(router_health_markdown(outcome.measurement) + "\n")
        save_figure(router_health_figure(outcome.measurement), output / "router_health.png")
    save_folder(model, tokenizer, output)


def print_outcome(console: Console, output: Path, stages: tuple[int, ...], outcome: Outcome) -> None:
    """Router health, target against measured sparsity, quality, and what to do next."""
    record = outcome.record
    if outcome.measurement is not None:
        console.print(router_health_table(outcome.measurement))
    lines = [_quality_line(record)]
    if record["measurement"] is None:
        lines.append("The model is dense (recipe=dense, a control).")
    else:
        lines += _sparsity_lines(stages, record)
    folder = shlex.quote(str(output))
    task = record["config"].get("task")
    following = f"lte eval {folder} --task {task['task']}" if task else f"lte generate {folder} --prompt 'Once upon'"
    lines.append(f"Saved to {folder}. Next: lte inspect {folder}; {following}")
    console.print("\n".join(lines), highlight=False, markup=False, soft_wrap=True)


def _quality_line(record: ResultRecord) -> str:
    metric = record["metric"]
    where = f"{record['task']} {record['split']}" if "task" in record["config"] else "held-out text"
    before = record.get(f"{metric}_before")
    if before is not None:
        return f"{metric.capitalize()} on {where}: {before:.3f} before training, {record['value']:.3f} after."
    return f"On {where}: " + ", ".join(f"{name} {value:.3f}" for name, value in record["metrics"].items()) + "."


def _sparsity_lines(stages: tuple[int, ...], record: ResultRecord) -> list[str]:
    target, measured = record["target_sparsity"], record["sparsity"]
    lines = [
        f"FFN sparsity: target {100 * target:g}%, measured {100 * measured:.2f}% on "
        f"{record['measurement']['tokens']} held-out tokens in hard mode."
    ]
    if 2 not in stages:
        lines.append("The thresholds are set after stage 2: train on with --stages 2 and this folder as --model.")
    elif abs(target - measured) > TOLERANCE:
        lines.append(
            "The target was missed by more than 2 points: train longer, raise --router-learning-rate, or train on "
            "text that is more like the held-out one."
        )
    return lines
