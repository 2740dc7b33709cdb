"""The result record of a run: measured on its saved and reloaded folder, or what failed."""

from __future__ import annotations

import shlex
from typing import Any

from lte.eval.kernels import use_kernels_
from lte.eval.models import load_config, measurement_summary, task_record
from lte.eval.sparsity import Measurement
from lte.hf.acceleration import describe_kernels
from lte.hf.card import write_card
from lte.hf.inputs import predicts_next_token
from lte.records import ResultRecord, result_record
from lte.runs.folders import Folders, Made
from lte.runs.harness import answer_questions, unanswered
from lte.runs.latency import CONTEXT, time_decoding, untimed, why_not
from lte.runs.memory import peak_memory_bytes
from lte.runs.plan import Run
from lte.runs.settings import Comparison
from lte.runs.workload import Workload


def measured_record(
    run: Run, comparison: Comparison, folders: Folders, work: Workload, made: Made, dense_name: str | None
) -> ResultRecord:
    """Loads a run's folder, measures it as `lte eval` does, and returns its record.

    Args:
        run: whose model is saved.
        comparison: which it belongs to.
        folders: where the model is.
        work: its data.
        made: how it was made.
        dense_name: folder of a dense model of the same architecture in the work folder; `None` takes the run's own.

    Raises:
        ValueError: if a logit is not finite.
    """
    folder = folders.model(run)
    model = use_kernels_(work.load_model(str(folder), comparison.dtype), tell=False)
    result = work.measure(model)
    causal, kernels = predicts_next_token(model), describe_kernels(model)
    record = task_record(
        model,
        result,
        **_fields(run, comparison, work.settings, made.data_info),
        task=work.name,
        split=work.split,
        tokens_trained=made.tokens_since_start,
        wall_time_s=made.wall_time_s,
        eta=made.eta,
        layer_history=made.layer_history,
        peak_memory_bytes=max(made.peak_memory_bytes, peak_memory_bytes()),
    )
    record.config.update(kernels=kernels, tokens_start=made.tokens_start)
    if result.measurement is not None:
        _remember(folder, result.measurement, record)
    if comparison.harness is not None:
        record = record.with_fields(**answer_questions(model, work.tokenizer, comparison.harness))
    reason = why_not(comparison.latency, causal, run.method)
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


def failure_record(run: Run, comparison: Comparison, work: Workload, failure: str) -> ResultRecord:
    """The record of a run that failed: no value, and why."""
    return result_record(
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


def command_of(run: Run, comparison: Comparison) -> str:
    """The command that repeats a run, elsewhere or after its record was deleted."""
    return shlex.join(["lte", "compare", comparison.file, "--only", run.name, *comparison.flags])


def _fields(run: Run, comparison: Comparison, settings: dict[str, Any], data_info: dict[str, Any]) -> dict[str, Any]:
    """What a record says of a run that does not depend on its outcome."""
    trained = {"train": run.train_config.to_dict(), "stages": list(run.stages)} if run.trains else {"train": None}
    return {
        "model": comparison.model,
        "seed": run.seed,
        "label": run.options.name,
        "group": run.options.group,
        "command": command_of(run, comparison),
        "data_sha256": {part: data_info.get(part, {}).get("sha256") for part in ("train", "validation")},
        "config": {
            **settings,
            **trained,
            **({"lte": run.method_config.to_dict()} if run.has_routers else {}),
            "start": run.base,
            "distill_from": run.teacher,
            "relu": run.options.relu,
            "settings": run.values,
            "fingerprint": run.fingerprint,
            "dtype": comparison.dtype,
            "data_info": data_info,
        },
    }


def _remember(folder: Any, measurement: Measurement, record: ResultRecord) -> None:
    """Notes what was measured in a folder's config, by which the kernels choose their paths, and in its model card."""
    config = load_config(str(folder))
    config.lte_measurement = measurement_summary(measurement, record["config"]["data_info"], record)
    config.save_pretrained(folder)
    write_card(folder, config)
