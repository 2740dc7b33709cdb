"""A task's metrics, and the sparsity of the same tokens.

Shapes: B rows, T tokens, C outputs of a classification head.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lte.data.batches import as_batches
from lte.data.rows import routing_masks
from lte.data.tasks.data import TaskData
from lte.data.tasks.task import ClassificationTask, GenerationTask, Task
from lte.eval.generation import generate_answers
from lte.eval.inference import hard_inference, model_device, moved_batches
from lte.eval.metrics import check_metrics, compute_metrics
from lte.eval.perplexity import PerplexityResult, evaluate_model
from lte.eval.sparsity import Measurement, counter_for, measure_sparsity
from lte.hf.inputs import model_inputs
from lte.nn.metering import metered_modules


@dataclass(frozen=True)
class TaskResult:
    """What a model reaches on a task.

    Attributes:
        metric: name of the main metric.
        metrics: all metrics by name.
        measurement: of what was skipped; `None` for a stock model.
        tokens: which the numbers are about: of the inputs of a classification, of the answers that were generated, or
            those that were predicted.
        predictions: labels, numbers or texts in the order of the data; none where the metric is perplexity.
    """

    metric: str
    metrics: dict[str, float]
    measurement: Measurement | None
    tokens: int
    predictions: list[Any] = field(default_factory=list)

    @property
    def value(self) -> float:
        """The main metric."""
        return self.metrics[self.metric]

    @classmethod
    def of_text(cls, found: PerplexityResult, measurement: Measurement | None) -> TaskResult:
        """The result of a language model on a text."""
        metrics = {"perplexity": found.perplexity}
        if found.perplexity_per_word is not None:
            metrics["perplexity_per_word"] = found.perplexity_per_word
        return cls("perplexity", metrics, measurement, found.tokens)


def check_task(task: Task) -> None:
    """Raises a `ValueError` if a library of the task's metrics is missing."""
    check_metrics([name for name in task.metrics if name != "perplexity"])


def evaluate_task(
    model: Any, task: Task, data: TaskData, tokenizer: Any, *, batch_size: int = 8, progress: bool = True
) -> TaskResult:
    """Measures a dense or LTE model on a task; an LTE model runs in hard mode, its modes are restored afterwards.

    The sparsity of a classification is counted in the same pass over all tokens that are no padding. That of a
    generation is counted over the generated tokens, end of text included, in a pass over prompts and answers that
    follows the generation; an encoder counts the prompts as well. That of a text is as in `evaluate_model`.

    Args:
        model: with the task's head, from `load_task_model`.
        task: from `get_task`.
        data: from `load_task_data`.
        tokenizer: of the model.
        batch_size: rows per forward pass.
        progress: whether to show progress bars.

    Raises:
        ValueError: if a library of the metrics is missing, or a logit is NaN.
    """
    check_task(task)
    if isinstance(task, ClassificationTask):
        result = _classify(model, task, data.measured, data, batch_size, progress)
        for suffix, rows in data.further.items():
            more = _classify(model, task, rows, data, batch_size, progress)
            result.metrics.update({f"{name}_{suffix}": value for name, value in more.metrics.items()})
        return result
    if isinstance(task, GenerationTask):
        return _answer(model, task, data, tokenizer, batch_size, progress)
    found, measurement = evaluate_model(
        model,
        data.measured,
        batch_size=batch_size,
        collator=data.collator,
        progress=progress,
        num_words=data.num_words,
    )
    return TaskResult.of_text(found, measurement)


def _classify(
    model: Any, task: ClassificationTask, rows: Any, data: TaskData, batch_size: int, progress: bool
) -> TaskResult:
    batches = as_batches(rows, model, batch_size, data.collator)
    outputs: list[Tensor] = []
    tokens: list[Tensor] = []
    with counter_for(model) as counter, hard_inference(model):
        for batch in moved_batches(batches, model_device(model), progress=progress):
            outputs.append(model(**model_inputs(model, batch)).logits.float())
            tokens.append(batch["attention_mask"].sum())
            if counter is not None:
                counter.update(routing_masks(model, counter.layers, batch))
        measurement = None if counter is None else counter.result()
    logits = torch.cat(outputs).cpu()
    if not logits.isfinite().all():
        raise ValueError(
            "the logits must be finite, got NaN or infinity; the weights are damaged or overflow their dtype"
        )
    predictions = (logits.argmax(-1) if task.labels else logits[:, 0]).tolist()
    metrics = compute_metrics(task.metrics, predictions, [rows[index]["labels"] for index in range(len(rows))])
    return TaskResult(task.main_metric, metrics, measurement, int(torch.stack(tokens).sum()), predictions)


def _answer(
    model: Any, task: GenerationTask, data: TaskData, tokenizer: Any, batch_size: int, progress: bool
) -> TaskResult:
    prompts = [data.measured[index]["input_ids"] for index in range(len(data.measured))]
    answers = generate_answers(model, tokenizer, prompts, data.max_new_tokens, batch_size=batch_size, progress=progress)
    texts = [text.strip() for text in tokenizer.batch_decode(answers, skip_special_tokens=True)]
    rows = [answered_row(model, *pair) for pair in zip(prompts, answers, strict=True)]
    batches = (data.collator(rows[i : i + batch_size]) for i in range(0, len(rows), batch_size))
    # A stock model need not run.
    measurement = measure_sparsity(model, batches) if metered_modules(model) else None
    metrics = compute_metrics(task.metrics, texts, data.references)
    return TaskResult(task.main_metric, metrics, measurement, sum(map(len, answers)), texts)


def answered_row(model: Any, prompt: list[int], answer: list[int]) -> dict[str, list[int]]:
    """A row of `input_ids` and `labels` in which the answer alone counts."""
    if model.config.is_encoder_decoder:
        return {"input_ids": prompt, "labels": answer}
    return {"input_ids": [*prompt, *answer], "labels": [-100] * len(prompt) + list(answer)}
