"""Question sets of lm-eval in a comparison: the keys of its file, and what the record of a run says of them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from lte.config import WEIGHTS, check_choice, check_whole_number
from lte.files import write_json_atomic

BATCH_SIZE = 8
# What the record of the run says already; histograms of routing for each set would be most of its bytes.
_OF_THE_RUN = ("method", "method_config", "target_sparsity", "measurement")


@dataclass(frozen=True, kw_only=True)
class HarnessSettings:
    """Keys of the file of a comparison, called as the flags of `lte eval`.

    Attributes:
        harness: tasks, groups or tags of lm-eval, which every run answers.
        num_fewshot: examples before each question, for all tasks or by task; else what the task says.
        apply_chat_template: whether the questions are chats in the format of the model's tokenizer.
        harness_limit: questions of a task at most, in a group of each of its tasks; for all tasks or by name.
        harness_data: folder with the files of the `..._files` tasks.
        harness_tasks_dir: folder with more task files of lm-eval.
        harness_batch_size: rows per forward pass, for all tasks or by task.
        harness_weights: of which of the weights that are measured (see `lte.config.WEIGHTS`) a model answers; unset: of
            all.
    """

    harness: tuple[str, ...]
    num_fewshot: int | Mapping[str, int] | None = None
    apply_chat_template: bool = False
    harness_limit: int | Mapping[str, int] | None = None
    harness_data: str | None = None
    harness_tasks_dir: str | None = None
    harness_batch_size: int | Mapping[str, int] = BATCH_SIZE
    harness_weights: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.apply_chat_template, bool):
            given = f"apply_chat_template={self.apply_chat_template!r}"
            raise ValueError(f"apply_chat_template must be true or false, got {given}")
        limits = {"num_fewshot": 0, "harness_limit": 1, "harness_batch_size": 1}
        for name, least in limits.items():
            given = getattr(self, name)
            by_task = given if isinstance(given, Mapping) else dict.fromkeys(self.harness, given)
            for task, value in by_task.items():
                check_choice(name, task, self.harness)
                if value is not None:
                    check_whole_number(name, value, least)
        for weights in self.harness_weights or ():
            check_choice("harness_weights", weights, WEIGHTS)

    def of_task(self, name: str, task: str) -> int | None:
        """The setting `num_fewshot`, `harness_limit` or `harness_batch_size` as it is for a task."""
        given = getattr(self, name)
        return given.get(task) if isinstance(given, Mapping) else given

    def check(self) -> None:
        """Reads all tasks with their data, so that what is missing is said before anything trains.

        Raises:
            ValueError: as `check_harness_tasks`.
        """
        from lte.eval.harness import check_harness_tasks, quiet_harness

        quiet_harness()
        check_harness_tasks(self.harness, self.harness_tasks_dir, self.harness_data)


KEYS = tuple(field.name for field in fields(HarnessSettings))


def read_harness(content: Mapping[str, Any], source: str) -> HarnessSettings | None:
    """The settings in the file of a comparison, `None` if it asks for no question sets.

    Args:
        content: the whole file; `data_dir` stands in for a missing `harness_data`.
        source: where it is from, for the messages.

    Raises:
        ValueError: for settings without tasks, or a value that does not fit.
    """
    given = {name: content[name] for name in KEYS if content.get(name) is not None}
    tasks = given.pop("harness", None)
    if tasks is None:
        if given:
            raise ValueError(f"harness must be given with {', '.join(given)}, got none in {source}")
        return None
    names = [name.strip() for name in tasks.split(",")] if isinstance(tasks, str) else tasks
    if not isinstance(names, list) or not names or not all(isinstance(name, str) and name for name in names):
        raise ValueError(f"harness must be a list of names of tasks, got harness={tasks!r} in {source}")
    if "harness_weights" in given:
        given["harness_weights"] = tuple(weight_formats("harness_weights", given["harness_weights"], source))
    return HarnessSettings(harness=tuple(names), **{"harness_data": content.get("data_dir"), **given})


def weight_formats(name: str, given: Any, source: str) -> list[Any]:
    """The formats of weights that a key of a file lists, or the one that it names.

    Raises:
        ValueError: if it is neither.
    """
    found = [given] if isinstance(given, str) else given
    if not isinstance(found, list):
        raise ValueError(f"{name} must be a list of formats, got {name}={given!r} in {source}")
    return found


@dataclass(frozen=True)
class KeptAnswers:
    """Scores of question sets in a file, so that a run that was stopped goes on with the next set.

    Attributes:
        file: where they are kept.
        fingerprint: of the run that made the model, and what it is loaded as.
    """

    file: Path
    fingerprint: str

    def read(self, settings: HarnessSettings) -> dict[str, Any]:
        """The scores by name of the set; none of another model or with other settings, or if they cannot be read."""
        try:
            content = json.loads(self.file.read_text(encoding="utf-8"))
            return content["scores"] if content["of"] == self._key(settings) else {}
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return {}

    def write(self, settings: HarnessSettings, scores: Mapping[str, Any]) -> None:
        """Writes the scores of all sets so far."""
        write_json_atomic(self.file, {"of": self._key(settings), "scores": scores})

    def _key(self, settings: HarnessSettings) -> str:
        # Log-likelihoods were those of the model's own dtype before: such scores do not stand beside these.
        return f"{self.fingerprint} {settings} float32"


def answer_questions(
    model: Any,
    tokenizer: Any,
    settings: HarnessSettings,
    weights: str = "native",
    kept: KeptAnswers | None = None,
) -> dict[str, Any]:
    """Runs all question sets on a loaded model and returns the fields of its record.

    Args:
        model: as it is to be measured, of any method.
        tokenizer: the model's.
        settings: what to run, and how.
        weights: what the model's are rounded to, one of `lte.config.WEIGHTS`.
        kept: where each set's scores are kept as soon as they are there, and those of an earlier process taken from.

    Returns:
        `harness`: by task what differs from the record of the run, as `lte eval --harness` writes it; sparsity and work
        per token are those of the task's own passes. `harness_note`: why tasks are missing, `None` if none are.
    """
    import torch  # not at the top: the keys of the file are checked before it is loaded

    from lte.eval.harness import quiet_harness
    from lte.hf.inputs import predicts_next_token
    from lte.runs.memory import others_fill_gpu

    if not predicts_next_token(model):
        return unanswered("not run: the model does not predict the next token")
    if settings.harness_weights is not None and weights not in settings.harness_weights:
        return unanswered(f"not run: harness_weights leaves out {weights}")
    quiet_harness()
    found: dict[str, Any] = {} if kept is None else kept.read(settings)
    notes = []
    for name in settings.harness:
        if name in found:
            continue
        try:
            found[name] = _scores(model, tokenizer, settings, name)
        # A model that cannot answer one set keeps its other numbers; one that finds no room now may do so later.
        except (RuntimeError, ValueError) as error:
            if isinstance(error, torch.OutOfMemoryError) and others_fill_gpu():
                raise
            notes.append(f"{name} failed: {type(error).__name__}: {' '.join(str(error).split())[:300]}")
        else:
            if kept is not None:
                kept.write(settings, found)
    # A tag has several scores.
    scores = {task: score for name in settings.harness for task, score in found.get(name, {}).items()}
    return {"harness": scores, "harness_note": "; ".join(notes) or None}


def unanswered(note: str) -> dict[str, Any]:
    """The fields of a record without question sets."""
    return {"harness": {}, "harness_note": note}


def _scores(model: Any, tokenizer: Any, settings: HarnessSettings, name: str) -> dict[str, Any]:
    from lte.eval.harness import evaluate_harness

    limit = settings.of_task("harness_limit", name)
    batch_size = settings.of_task("harness_batch_size", name) or BATCH_SIZE
    result = evaluate_harness(
        model,
        tokenizer,
        [name],
        num_fewshot=settings.of_task("num_fewshot", name),
        apply_chat_template=settings.apply_chat_template,
        limit=limit,
        batch_size=batch_size,
        tasks_dir=settings.harness_tasks_dir,
        data_dir=settings.harness_data,
    )
    config = {
        "limit": limit,
        "batch_size": batch_size,
        "apply_chat_template": settings.apply_chat_template,
        "harness_version": result.harness_version,
    }
    found = {}
    for score in result.scores:
        own = {key: value for key, value in score.to_fields(model).items() if key not in _OF_THE_RUN}
        found[score.task] = {**own, "config": {**config, **own["config"]}}
    return found
