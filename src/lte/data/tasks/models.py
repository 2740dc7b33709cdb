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

from lte.data.tasks.task import ClassificationTask, GenerationTask, Task
from lte.hf.checkpoints import load_whole, reading
from lte.hf.dense import forget_gguf_, model_location
from lte.hf.families import family_of
from lte.hf.gguf import check_gguf_model, gguf_config


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
        tokenizer: its pad token becomes the model's; heads on decoders read the last token that is another one.
        dtype: of the weights.
        new_head: whether a model without the task's head may get one.

    Raises:
        ValueError: for a model that cannot do the task, a head of another task, no head and `new_head=False`, for files
            that do not hold the whole model, and for a GGUF file that `lte.hf.gguf` refuses.
    """
    location = model_location(name_or_path)
    from_gguf = "gguf_file" in location
    if from_gguf:
        config = gguf_config(name_or_path)
    else:
        with reading(name_or_path):
            config = AutoConfig.from_pretrained(**location)
    auto_class = _auto_class(task, config)
    head: dict[str, Any] = {}
    gets_head = False
    if isinstance(task, ClassificationTask):
        gets_head = _check_head(task, config, name_or_path, new_head)
        head = task.head
    if from_gguf:
        config.update(head)
        head = {"config": config}
    model = load_whole(auto_class, location, new_head=gets_head, dtype=dtype, **head)
    forget_gguf_(model)
    if from_gguf and auto_class is AutoModelForCausalLM:
        check_gguf_model(model, name_or_path)
    if tokenizer.pad_token_id is not None:
        model.config.pad_token_id = tokenizer.pad_token_id
    return model


def _auto_class(task: Task, config: Any) -> Any:
    if isinstance(task, ClassificationTask):
        return AutoModelForSequenceClassification
    family = family_of(config)
    own = next(iter(family.models))
    if own == "AutoModelForCausalLM":
        return AutoModelForCausalLM
    if own == "AutoModelForSeq2SeqLM" and isinstance(task, GenerationTask):
        return AutoModelForSeq2SeqLM
    kind = "write text" if isinstance(task, GenerationTask) else "predict the next token"
    raise ValueError(
        f"model must {kind} for task={task.name}, got model_type={family.model_type}; take a causal language model"
    )


def _check_head(task: ClassificationTask, config: Any, name: str | Path, new_head: bool) -> bool:
    """Whether the model lacks the task's head and gets a new one; one with another head is refused."""
    if not any(architecture.endswith("ForSequenceClassification") for architecture in config.architectures or ()):
        if new_head and not config.model_type.startswith("lte_"):
            return True
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
    return False
