"""Measuring a saved and reloaded folder, and the result record of a run of a comparison, or of what failed."""

from __future__ import annotations

import shlex
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lte.eval.kernels import use_kernels_
from lte.eval.models import load_config, measurement_summary, task_record
from lte.eval.rounding import memory_bytes, round_weights_
from lte.eval.tasks import TaskResult
from lte.hf.acceleration import describe_kernels
from lte.hf.card import write_card
from lte.hf.inputs import predicts_next_token
from lte.hf.saved_config import rewrite_config
from lte.records import ResultRecord, result_record
from lte.runs.folders import Folders, Made
from lte.runs.latency import CONTEXT, time_decoding, untimed, why_not
from lte.runs.memory import peak_memory_bytes
from lte.runs.plan import Run
from lte.runs.question_sets import KeptAnswers, answer_questions, unanswered
from lte.runs.settings import ComparisonSettings
from lte.runs.workload import Workload
from lte.train.processes import products_in_tf32


@dataclass(frozen=True)
class Measured:
    """A saved folder that was loaded and measured.

    Attributes:
        model: as it was measured.
        result: the metrics and what was skipped.
        record: the result record.
    """

    model: Any
    result: TaskResult
    record: ResultRecord


def measure_folder(
    folder: Path,
    work: Workload,
    dtype: str = "float32",
    kernels: str = "auto",
    weights: str = "native",
    tf32: bool = False,
    **fields: Any,
) -> Measured:
    """Loads a saved folder and measures it as `lte eval` does; its config remembers the sparsity of an LTE model.

    Args:
        folder: of a model and its tokenizer.
        work: the data, read already.
        dtype: of the weights, a key of `lte.eval.models.DTYPES`.
        kernels: what computes an LTE model's FFNs, one of `lte.eval.kernels.KERNELS`.
        weights: what the weights are rounded to before, one of `lte.config.WEIGHTS`; of a rounded model the folder
            remembers nothing.
        tf32: whether products of fp32 weights are in TensorFloat-32, on a GPU.
        fields: of the record that neither the folder nor the data tells: at least `model`, `seed`, `tokens_trained`,
            `wall_time_s` and `config`.

    Raises:
        ValueError: if a logit is not finite.
    """
    model = use_kernels_(round_weights_(work.load_model(str(folder), dtype), weights), kernels, tell=False)
    with products_in_tf32(model) if tf32 else nullcontext():
        result = work.measure(model)
    record = task_record(model, result, task=work.name, split=work.split, **fields)
    record = record.with_fields(weights=weights, weights_memory_bytes=memory_bytes(model))
    record.config.update(kernels=describe_kernels(model))
    if result.measurement is not None and weights == "native":
        # The kernels choose their paths by it, and the model card states it.
        rewrite_config(folder, {"lte_measurement": measurement_summary(result.measurement, work.info, record)})
        write_card(folder, load_config(str(folder)))
    return Measured(model, result, record)


def measured_record(
    run: Run,
    comparison: ComparisonSettings,
    folders: Folders,
    work: Workload,
    made: Made,
    dense_name: str | None,
    weights: str = "native",
) -> ResultRecord:
    """Loads a run's folder, measures it as `lte eval` does, and returns its record.

    Args:
        run: whose model is saved.
        comparison: which it belongs to.
        folders: where the model is.
        work: its data.
        made: how it was made.
        dense_name: folder of a dense model of the same architecture in the work folder; `None` takes the run's own.
        weights: what its weights are rounded to before, one of `lte.config.WEIGHTS`; the label then has it at its end.

    Raises:
        ValueError: if a logit is not finite.
    """
    folder = folders.model(run)
    found = measure_folder(
        folder,
        work,
        comparison.dtype,
        weights=weights,
        **_fields(run, comparison, work.settings, made.data_info),
        tokens_trained=made.tokens_since_start,
        wall_time_s=made.wall_time_s,
        eta=made.eta,
        layer_history=made.layer_history,
    )
    record, model = found.record, found.model
    del found
    causal = predicts_next_token(model)
    record = record.with_fields(peak_memory_bytes=max(made.peak_memory_bytes, peak_memory_bytes()))
    record.config.update(tokens_start=made.tokens_start)
    if comparison.harness is not None:
        kept = KeptAnswers(folders.questions(run, weights), f"{made.fingerprint} {comparison.dtype}")
        record = record.with_fields(**answer_questions(model, work.tokenizer, comparison.harness, weights, kept))
    reason = why_not(comparison.latency, causal, run.method)
    if weights != "native":
        record, reason = _named(record, weights), "not timed: benchmarks/rounded_steps.py times rounded weights"
    if reason is not None:
        return record.with_fields(**untimed(reason))
    text = work.text_to_decode(model, CONTEXT)
    del model
    dense = folder if dense_name is None else folders.work / dense_name
    times = time_decoding(folder, dense, *text)
    if dense_name is not None and times["latency_ms"] is not None:
        # A stock model skips as much on any text.
        times["latency_sparsity"] = record.sparsity
    return record.with_fields(**times)


def _named(record: ResultRecord, weights: str) -> ResultRecord:
    """A record of rounded weights, whose curves are others than those of the models as they are."""
    names = {name: f"{value}-{weights}" for name in ("label", "group") if (value := record.get(name))}
    return record.with_fields(**names, weights=weights)


def failure_record(
    run: Run, comparison: ComparisonSettings, work: Workload, failure: str, weights: str = "native"
) -> ResultRecord:
    """The record of a run that failed, or failed with rounded weights: no value, and why."""
    record = result_record(
        **_fields(run, comparison, work.settings, work.info),
        method=run.method,
        target_sparsity=run.target,
        task=work.name,
        split=work.split,
        metric=work.metric,
        **dict.fromkeys(("sparsity", "value", "flops_per_token", "bytes_per_token", "tokens_trained", "wall_time_s")),
        **({} if comparison.harness is None else unanswered("not run: the run failed")),
        metrics={},
        latency_note="not timed: the run failed",
        failure=failure,
    )
    return record if weights == "native" else _named(record, weights)


def _fields(
    run: Run, comparison: ComparisonSettings, settings: dict[str, Any], data_info: dict[str, Any]
) -> dict[str, Any]:
    """What a record says of a run that does not depend on its outcome."""
    trained = {"train": run.train_config.to_dict(), "stages": list(run.stages)} if run.trains else {"train": None}
    return {
        "model": comparison.model,
        "seed": run.seed,
        "label": run.options.name,
        "group": run.options.group,
        # Repeats the run, elsewhere or after its record was deleted.
        "command": shlex.join(["lte", "compare", comparison.file, "--only", run.name, *comparison.flags]),
        "data_sha256": {part: data_info.get(part, {}).get("sha256") for part in ("train", "validation")},
        "config": {
            **settings,
            **trained,
            **({"lte": run.method_config.to_dict()} if run.has_routers and run.method_config else {}),
            "start": run.base,
            "distill_from": run.teacher,
            "relu": run.options.relu,
            "settings": run.values,
            "fingerprint": run.fingerprint,
            "dtype": comparison.dtype,
            "data_info": data_info,
        },
    }
