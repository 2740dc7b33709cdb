"""Adapters of peft beside routers: the routers train as a whole, and belong to the adapter that is saved."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from torch import nn

from lte.hf.inputs import predicts_next_token
from lte.hf.install import sparse_ffns
from lte.train.config import TrainConfig

ROUTER = "router"
BASE, ADAPTER = "base", "adapter"


def with_routers(config: Any) -> Any:
    """A copy of a peft config that also trains the routers and saves them with the adapter (`modules_to_save`)."""
    config = copy.copy(config)
    named = list(config.modules_to_save or ())
    config.modules_to_save = named if ROUTER in named else [*named, ROUTER]
    return config


def train_routers_(model: nn.Module) -> None:
    """Makes the routers of a model with adapters train with its active adapter, if they do not yet.

    As peft does for `modules_to_save`, each adapter gets routers of its own: `disable_adapter` gives the base model's,
    and merging keeps the adapter's.
    """
    configs = getattr(model, "peft_config", None)
    if not configs or not sparse_ffns(model):
        return
    from peft.utils.other import set_additional_trainable_modules

    base: Any = model.base_model
    router = next(iter(sparse_ffns(model).values())).router
    for name in model.active_adapters:  # type: ignore[union-attr]
        if name in getattr(router, "modules_to_save", {}):
            continue
        routers_alone = copy.copy(configs[name])
        routers_alone.modules_to_save, routers_alone.trainable_token_indices = [ROUTER], None
        set_additional_trainable_modules(base, routers_alone, base.model.config, name)
        for ffn in sparse_ffns(model).values():
            # Peft activates what it wraps anew alone.
            wrapped: Any = ffn.router
            wrapped.enable_adapters(True)
            wrapped.set_adapter(name)
        configs[name] = with_routers(configs[name])


def with_lora(model: Any, config: TrainConfig, folder: Path) -> Any:
    """The model in LoRA adapters on all projections, for the settings of `lte train`.

    Args:
        model: from `lte.sparsify_`, or a stock one.
        config: of which `lora_rank` and `lora_alpha` count.
        folder: of the checkpoints. The model as it is goes to `base` beside it, which the adapter names as its own.

    Raises:
        ValueError: if peft is not installed.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ValueError("lora_rank must be unset without peft; pip install peft") from error
    base = folder.parent / BASE
    if not (base / "config.json").exists():
        model.save_pretrained(base)
    rank = int(config.lora_rank or 0)
    alpha: Any = 2 * rank if config.lora_alpha is None else config.lora_alpha
    kind = next((kind for head, kind in _KINDS.items() if head in type(model).__name__), None)
    kind = "CAUSAL_LM" if predicts_next_token(model) else kind
    adapted = get_peft_model(model, LoraConfig(r=rank, lora_alpha=alpha, target_modules="all-linear", task_type=kind))
    adapted.peft_config["default"].base_model_name_or_path = str(base)
    return adapted


# What peft calls the heads, by which it keeps a new head beside the adapter.
_KINDS = {"ForSequenceClassification": "SEQ_CLS", "ForConditionalGeneration": "SEQ_2_SEQ_LM"}


def merge_lora(adapted: Any, folder: Path) -> Any:
    """Saves a trained adapter, with its routers, to `adapter` beside `folder`, and returns the model with it merged."""
    adapted.save_pretrained(folder.parent / ADAPTER)
    return adapted.merge_and_unload()
