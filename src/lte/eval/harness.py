"""lm-eval in this process, on the loaded model: quality and sparsity of the same forward passes."""

from __future__ import annotations

import difflib
import functools
import hashlib
import json
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lte.eval.cost import record_fields
from lte.eval.inference import hard_inference
from lte.eval.sparsity import Measurement, counter_for
from lte.hf.inputs import predicts_next_token

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

    from lte.eval.harness_lm import CountingLm

TASK_FILES = Path(__file__).with_name("harness_tasks")
"""Tasks of ours, which read local files."""
# Where lm-eval tells of each task what we told it: the shots, and that a task with data of its own could take more.
_CHATTY = ("lm_eval.api.task", "lm_eval.evaluator")
# What lm-eval's samplers, the first ones and random ones, say if a task has fewer examples than they should take.
TOO_MANY_SHOTS = ("number of fewshot samples", "Sample larger than population")


@dataclass(frozen=True)
class TaskScore:
    """What lm-eval found for one task or group of tasks.

    Attributes:
        task: name.
        metric: the main metric, the first that the task lists: acc, or exact_match,strict-match with a filter's name.
        value: of the main metric.
        metrics: all metrics by name, each with its standard error as `<name>_stderr`, `None` where there is none.
        by_task: the main metric of each task in a group, empty for a task.
        num_samples: documents that were scored.
        num_fewshot: examples before each, `None` if the tasks of a group differ.
        split: where the documents are from.
        task_version: as the task's file says.
        config_hash: sha256 of the configs of the tasks without their metadata, which say where files lie.
        samples: what lm-eval logged for each document, by task.
        wall_time_s: seconds, reading the task's data included; of a tag's or group's tasks all together.
        tokens: text tokens of all forward passes, each prompt once for all answers that share it.
        measurement: routing over these tokens, `None` for a stock model.
    """

    task: str
    metric: str
    value: float
    metrics: dict[str, float | None]
    by_task: dict[str, float | None]
    num_samples: int
    num_fewshot: int | None
    split: str
    task_version: str
    config_hash: str
    samples: dict[str, list[dict[str, Any]]]
    wall_time_s: float
    tokens: int
    measurement: Measurement | None

    def to_fields(self, model: Any) -> dict[str, Any]:
        """What a result record says of the task, and of a token of `model` in its passes, JSON-ready.

        Args:
            model: which was measured.
        """
        config = {name: getattr(self, name) for name in ("task_version", "config_hash", "num_fewshot", "num_samples")}
        return {
            **record_fields(model, self.measurement),
            **{name: getattr(self, name) for name in ("task", "metric", "value", "split", "metrics", "by_task")},
            "tokens_evaluated": self.tokens,
            "wall_time_s": self.wall_time_s,
            "config": config,
        }


@dataclass(frozen=True)
class HarnessResult:
    """The scores of all tasks, and what made them.

    Attributes:
        scores: one for each task that was asked for; a tag or a group without a mean of its own gives one for each of
            its tasks.
        harness_version: of lm-eval.
    """

    scores: list[TaskScore]
    harness_version: str


def evaluate_harness(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[str],
    *,
    num_fewshot: int | None = None,
    apply_chat_template: bool = False,
    limit: float | None = None,
    batch_size: int = 8,
    tasks_dir: str | Path | None = None,
    data_dir: str | Path | None = None,
) -> HarnessResult:
    """Runs tasks of lm-eval on a loaded causal LM as it is: dense, LTE, accelerated.

    An LTE model runs in hard mode; modes are restored. Each task runs by itself, so its sparsity is that of its own
    forward passes, padding left out. lm-eval seeds the generators of Python, NumPy and torch.

    Args:
        model: on the device where it is to run.
        tokenizer: the model's.
        tasks: names of tasks, groups or tags of lm-eval, of `harness_tasks` here, or of `tasks_dir`.
        num_fewshot: examples before each document; `None` is what the task says. Tasks that say 0 stay at 0.
        apply_chat_template: whether each document is a user's message to answer, with its examples as the turns before
            it, in the tokenizer's format of chats.
        limit: documents per task at most; below 1 a share of them.
        batch_size: rows per forward pass. lm-eval takes the log-softmax of all logits [B, T, V] at once.
        tasks_dir: a folder with more task files of lm-eval; its names come first.
        data_dir: the folder that tasks named `..._files` read.

    Raises:
        ValueError: if lm-eval is missing, a name is unknown, the model does not predict the next token, the tokenizer
            has no format of chats where one is to be applied, or files of `data_dir` are missing.
    """
    _check(model, tasks, num_fewshot, limit, batch_size)
    if apply_chat_template and not tokenizer.chat_template:
        raise ValueError(
            "tokenizer must have a chat template, got chat_template=None; set it, or leave out apply_chat_template"
        )
    from lte.eval.harness_lm import CountingLm

    manager = _task_manager(tasks, tasks_dir, data_dir)
    prompts = {
        "num_fewshot": num_fewshot,
        "apply_chat_template": apply_chat_template,
        "fewshot_as_multiturn": apply_chat_template,
    }
    scores: list[TaskScore] = []
    with hard_inference(model), _templates_compiled_once():
        lm = CountingLm(model, tokenizer, batch_size)
        for name in _without_tags(tasks, manager):
            scores += _run(lm, manager, name, prompts, limit)
    return HarnessResult(scores, version("lm_eval"))


@contextmanager
def _templates_compiled_once() -> Iterator[None]:
    """lm-eval compiles the template of a prompt anew for each document, which takes longer than the answers of MMLU."""
    from lm_eval.utils import env

    env.from_string = functools.cache(env.from_string)
    try:
        yield
    finally:
        del env.from_string


def check_harness_tasks(
    tasks: Sequence[str], tasks_dir: str | Path | None = None, data_dir: str | Path | None = None
) -> None:
    """Reads the tasks with their data, which takes seconds, and runs none.

    Args:
        tasks: as for `evaluate_harness`, and so are the others.
        tasks_dir: a folder with more task files.
        data_dir: the folder that tasks named `..._files` read.

    Raises:
        ValueError: if lm-eval is missing, a name is unknown, or files of `data_dir` are missing.
    """
    _require_lm_eval()
    manager = _task_manager(tasks, tasks_dir, data_dir)
    # Each by itself, as it will run: lm-eval refuses a task beside a group that holds it.
    for name in tasks:
        manager.load([name])


def quiet_harness() -> None:
    """Keeps lm-eval from telling on stderr, for each task, what we told it."""
    for name in _CHATTY:
        logging.getLogger(name).setLevel(logging.ERROR)


def _require_lm_eval() -> None:
    try:
        import lm_eval  # noqa: F401
    except ImportError as error:
        raise ValueError("lm-eval must be installed to run its tasks, got none: pip install lm-eval") from error


def _check(model: Any, tasks: Sequence[str], num_fewshot: int | None, limit: float | None, batch_size: int) -> None:
    _require_lm_eval()
    if isinstance(tasks, str) or not tasks:
        raise ValueError(f"tasks must be a list of at least one task's name, got tasks={tasks!r}")
    if not predicts_next_token(model):
        raise ValueError(
            f"model must predict the next token to run lm-eval's tasks, got {type(model).__name__}; load it with "
            "AutoModelForCausalLM"
        )
    if num_fewshot is not None and num_fewshot < 0:
        raise ValueError(f"num_fewshot must be at least 0 or None, got num_fewshot={num_fewshot}")
    if limit is not None and limit <= 0:
        raise ValueError(f"limit must be above 0 or None, got limit={limit}")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got batch_size={batch_size}")


def _task_manager(tasks: Sequence[str], tasks_dir: str | Path | None, data_dir: str | Path | None) -> TaskManager:
    """lm-eval's index of task files, without its own where ours are enough: reading those takes seconds."""
    from lm_eval.tasks import TaskManager

    if tasks_dir is not None and not Path(tasks_dir).expanduser().is_dir():
        raise ValueError(f"tasks_dir must be an existing folder, got tasks_dir={tasks_dir}")
    folders = [TASK_FILES] if tasks_dir is None else [TASK_FILES, Path(tasks_dir).expanduser()]
    metadata: dict[str, Any] = {} if data_dir is None else {"folder": str(data_dir)}
    manager = TaskManager(include_path=folders, include_defaults=False, metadata=metadata)
    if set(tasks) <= set(manager.all_tasks):
        return manager
    manager = TaskManager(include_path=folders, metadata=metadata)
    for name in tasks:
        if name not in manager.task_index:
            near = difflib.get_close_matches(name, manager.all_tasks, n=3)
            hint = f"did you mean {' or '.join(near)}?" if near else "`lm-eval ls tasks` lists them"
            raise ValueError(f"tasks must be names of tasks, groups or tags that lm-eval knows, got {name}; {hint}")
    return manager


def _without_tags(tasks: Sequence[str], manager: TaskManager) -> list[str]:
    """The names, each once, with the tasks of a tag in its place."""
    names: list[str] = []
    for name in tasks:
        entry = manager.task_index[name]
        names += sorted(entry.tags) if entry.kind.name == "TAG" else [name]
    return list(dict.fromkeys(names))


def _run(
    lm: CountingLm, manager: TaskManager, name: str, prompts: dict[str, Any], limit: float | None
) -> list[TaskScore]:
    from lm_eval import simple_evaluate

    start = time.monotonic()
    lm.tokens = 0
    with counter_for(lm.model) as lm.counter:
        try:
            found = simple_evaluate(model=lm, tasks=[name], limit=limit, task_manager=manager, **prompts)
        except (AssertionError, ValueError) as error:
            if not any(words in str(error) for words in TOO_MANY_SHOTS):
                raise
            given = f"num_fewshot={prompts['num_fewshot']}"
            raise ValueError(f"num_fewshot must be what {name} has, got {given}; {error}") from error
        measurement = None if lm.counter is None else lm.counter.result()
    assert found is not None
    passes = {"wall_time_s": time.monotonic() - start, "tokens": lm.tokens, "measurement": measurement}
    scored = name in found["configs"] or name in found.get("groups", {})
    return [_score(found, each, passes) for each in ([name] if scored else found["configs"])]


def _score(found: Mapping[str, Any], name: str, passes: Mapping[str, Any]) -> TaskScore:
    """The score of a task or group from what `simple_evaluate` returned, and what is known of the forward passes."""
    leaves = [name] if name in found["configs"] else list(found["configs"])
    metrics = _metrics(found["results"][name])
    main = next(metric for metric in metrics if "_stderr" not in metric)
    configs = [found["configs"][leaf] for leaf in leaves]
    shots = {found["n-shot"][leaf] for leaf in leaves}
    return TaskScore(
        task=name,
        metric=main,
        value=metrics[main],  # type: ignore[arg-type]
        metrics=metrics,
        by_task={} if leaves == [name] else {leaf: _metrics(found["results"][leaf]).get(main) for leaf in leaves},
        num_samples=sum(found["n-samples"][leaf]["effective"] for leaf in leaves),
        num_fewshot=shots.pop() if len(shots) == 1 else None,
        split=configs[0].get("test_split") or configs[0].get("validation_split") or "unknown",
        task_version=str(found["versions"][name]),
        config_hash=_hash(configs),
        samples={leaf: found["samples"][leaf] for leaf in leaves},
        **passes,
    )


def _metrics(result: Mapping[str, Any]) -> dict[str, float | None]:
    """lm-eval's `acc,none` as `acc`; what is no number, the standard error of a single sample say, as `None`."""
    return {
        key.removesuffix(",none"): None if isinstance(value, str) else float(value)
        for key, value in result.items()
        if "," in key
    }


def _hash(configs: list[dict[str, Any]]) -> str:
    kept = [{key: value for key, value in config.items() if key != "metadata"} for config in configs]
    return hashlib.sha256(json.dumps(kept, sort_keys=True, default=str).encode()).hexdigest()
