"""Loading a model with the head that a task needs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
)

from lte.hf.dense import forget_gguf_, model_location
from lte.hf.families import family_of
from lte.tasks.task import ClassificationTask, GenerationTask, Task


def load_task_model(
    name_or_path: str | Path,
    task: Task,
    tokenizer: Any,
    *,
    dtype: torch.dtype = torch.float32,
    new_head: bool = True,
) -> Any:
    """A dense or LTE model with the head of a task.

    A model that was trained on the task keeps its head; another one gets a new, random head for a classification
    (seed it with `torch.manual_seed`), and its language-model head for all else.

    Args:
        name_or_path: hub name, folder, or GGUF file.
        task: what it is for.
        tokenizer: its pad token becomes the model's where that has none; heads on decoders look for it.
        dtype: of the weights.
        new_head: whether a model without the task's head may get one.

    Raises:
        ValueError: for a family that cannot have the head, a head of another task, or no head and `new_head=False`.
    """
    location = model_location(name_or_path)
    config = AutoConfig.from_pretrained(**location)
    auto_class = _auto_class(task, config)
    head: dict[str, Any] = {}
    if isinstance(task, ClassificationTask):
        _check_head(task, config, name_or_path, new_head)
        head = task.head
    model = auto_class.from_pretrained(**location, dtype=dtype, **head)
    forget_gguf_(model)
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    return model


def is_encoder_decoder(name_or_path: str | Path) -> bool:
    """Whether a model reads its input in an encoder, and its output in a decoder."""
    return bool(AutoConfig.from_pretrained(**model_location(name_or_path)).is_encoder_decoder)


def _auto_class(task: Task, config: Any) -> Any:
    family = family_of(config)
    own = next(iter(family.models))
    if isinstance(task, ClassificationTask):
        # The table lists the heads that an LTE folder can have.
        if "AutoModelForSequenceClassification" not in family.models:
            raise ValueError(
                f"model must be of a family with a classifier for task={task.name}, got {family.model_type}"
            )
        return AutoModelForSequenceClassification
    if own == "AutoModelForCausalLM":
        return AutoModelForCausalLM
    if own == "AutoModelForSeq2SeqLM" and isinstance(task, GenerationTask):
        return AutoModelForSeq2SeqLM
    kind = "write text" if isinstance(task, GenerationTask) else "predict the next token"
    raise ValueError(f"model must {kind} for task={task.name}, got model_type={family.model_type}")


def has_head(config: Any) -> bool:
    """Whether the model of a config was saved with a classification head."""
    return any(name.endswith("ForSequenceClassification") for name in config.architectures or ())


def _check_head(task: ClassificationTask, config: Any, name: str | Path, new_head: bool) -> None:
    if not has_head(config):
        if new_head and not config.model_type.startswith("lte_"):
            return
        raise ValueError(
            f"model must have a head trained on {task.name}, got {name} with {', '.join(config.architectures or ())}; "
            f"lte train --task {task.name} trains one, from a dense model"
        )
    if config.num_labels != task.head["num_labels"]:
        raise ValueError(
            f"model must have a head with {task.head['num_labels']} outputs for task={task.name}, got {name} with "
            f"{config.num_labels}; start from a model without a head of another task"
        )
    own = [str(config.id2label[index]).lower() for index in range(config.num_labels)]
    if sorted(own) == sorted(task.labels) and own != list(task.labels):
        raise ValueError(
            f"model must have the outputs {', '.join(task.labels)} in this order for task={task.name}, got {name} with "
            f"{', '.join(own)}"
        )
