"""Adapters of peft beside routers: the routers train as a whole, and belong to the adapter that is saved."""

from __future__ import annotations

import copy
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import nn
from transformers import BitsAndBytesConfig
from transformers.pytorch_utils import Conv1D

from lte.files import explained_write_errors
from lte.hf.checkpoints import load_whole
from lte.hf.inputs import predicts_next_token
from lte.hf.install import wrapped_ffns
from lte.nn.shards import whole_state
from lte.nn.wrapped_ffn import numbers_in_4_bits
from lte.train.config import TrainConfig
from lte.train.processes import is_main_process, reads_weights_once
from lte.train.sharding import unsharded_class

BASE, ADAPTER = "base", "adapter"
# What peft calls the heads, by which it keeps a new head beside the adapter.
_KINDS = {"ForSequenceClassification": "SEQ_CLS", "ForConditionalGeneration": "SEQ_2_SEQ_LM"}


def own_modules(model: nn.Module) -> list[str]:
    """The names of the modules that a method adds to the FFNs and trains, of LTE `router`; none in a dense model."""
    found: dict[str, None] = {}
    for ffn in wrapped_ffns(model).values():
        for name, child in ffn.named_children():
            if name not in (*ffn.layout.parts, *ffn.frozen) and next(child.parameters(), None) is not None:
                found[name] = None
    return list(found)


def with_routers(config: Any, model: Any) -> Any:
    """A copy of a peft config that also trains the routers and saves them with the adapter (`modules_to_save`)."""
    names = own_modules(model) if isinstance(model, nn.Module) else []
    config = copy.copy(config)
    named = list(config.modules_to_save or ())
    config.modules_to_save = [*named, *(name for name in names if name not in named)] or None
    return config


def train_routers_(model: nn.Module) -> None:
    """Makes the routers of a model with adapters train with its active adapter, if they do not yet.

    As peft does for `modules_to_save`, each adapter gets routers of its own: `disable_adapter` gives the base model's,
    and merging keeps the adapter's.
    """
    configs, names = getattr(model, "peft_config", None), own_modules(model)
    if not configs or not names:
        return
    if not hasattr(model, "get_base_model"):
        raise ValueError("model must have its adapters from peft.get_peft_model, got some of model.add_adapter")
    from peft.utils.other import set_additional_trainable_modules

    base: Any = model.base_model
    first = next(iter(wrapped_ffns(model).values()))
    for name in model.active_adapters:  # type: ignore[union-attr]
        if all(name in getattr(first.get_submodule(own), "modules_to_save", {}) for own in names):
            continue
        routers_alone = copy.copy(configs[name])
        routers_alone.modules_to_save, routers_alone.trainable_token_indices = names, None
        set_additional_trainable_modules(base, routers_alone, base.model.config, name)
        for ffn in wrapped_ffns(model).values():
            for own in names:
                # Peft activates what it wraps anew alone.
                wrapped: Any = ffn.get_submodule(own)
                wrapped.enable_adapters(True)
                wrapped.set_adapter(name)
        configs[name] = with_routers(configs[name], model)


def with_lora(model: Any, config: TrainConfig, folder: Path) -> Any:
    """The model in LoRA adapters on all projections, for the settings of `lte train`.

    Args:
        model: from `lte.sparsify_`, or a stock one.
        config: of which `lora_rank`, `lora_alpha` and `lora_4bit` count.
        folder: the model as it is goes to `base` in it, which the adapter names as its own.

    Returns:
        A model of peft around `model`, or with `lora_4bit` around one in 4 bits that was loaded from `base`.

    Raises:
        ValueError: if a package that this needs is not installed.
    """
    needed = ["peft", *(["bitsandbytes"] if config.lora_4bit else [])]
    missing = [name for name in needed if find_spec(name) is None]
    if missing:
        raise ValueError(f"lora_rank must be unset without {' and '.join(missing)}; pip install {' '.join(missing)}")
    from peft import LoraConfig, get_peft_model

    base, processes = folder / BASE, PartialState()
    with processes.main_process_first():
        if not (base / "config.json").exists():
            model.save_pretrained(base)
        elif not reads_weights_once():
            # Of the run that is resumed: neurons may come out grouped otherwise on another machine.
            saved = load_whole(type(model), {"pretrained_model_name_or_path": base}, dtype=model.dtype)
            model.load_state_dict(saved.state_dict())
    kind = next((kind for head, kind in _KINDS.items() if head in type(model).__name__), None)
    kind = "CAUSAL_LM" if predicts_next_token(model) else kind
    if config.lora_4bit:
        model = _in_4_bits(model, base, config)
    rank = int(config.lora_rank or 0)
    alpha: Any = 2 * rank if config.lora_alpha is None else config.lora_alpha
    adapted = get_peft_model(model, LoraConfig(r=rank, lora_alpha=alpha, target_modules="all-linear", task_type=kind))
    adapted.peft_config["default"].base_model_name_or_path = str(base)
    return adapted


def _in_4_bits(model: Any, base: Path, config: TrainConfig) -> Any:
    """The model of a folder with its linear layers in NF4; routers and all else stay as they are."""
    dtype = torch.bfloat16 if config.bf16 else torch.float32
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    place = {"": model.device}
    model.to("cpu")
    location = {"pretrained_model_name_or_path": base}
    return load_whole(type(model), location, quantization_config=quantization, dtype=dtype, device_map=place)


def merge_sharded_lora(adapted: Any, folder: Path) -> Any:
    """As `merge_lora`, for adapters that trained in shards: the first process gets the model, the others `None`.

    Args:
        adapted: from `with_lora`, in shards.
        folder: as for `with_lora`.
    """
    from peft import PeftModel

    trained = {name for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    state = whole_state(
        adapted, {name for name in adapted.state_dict() if name in trained or "modules_to_save" in name}
    )
    if not is_main_process():
        return None
    place = folder / ADAPTER
    with explained_write_errors(place):
        adapted.save_pretrained(place, state_dict=state)
    kind = unsharded_class(adapted.get_base_model())
    model = load_whole(kind, {"pretrained_model_name_or_path": folder / BASE}, dtype=adapted.dtype)
    return PeftModel.from_pretrained(model, place).merge_and_unload()


def merge_lora(adapted: Any, model: Any, folder: Path) -> Any:
    """Saves a trained adapter, with its routers, to `adapter` in `folder`, and returns `model` with it merged.

    An adapter of a base in 4 bits is merged into what those bits stand for, in the model's own dtype.

    Args:
        adapted: from `with_lora`.
        model: that it was made from.
        folder: as for `with_lora`.
    """
    from peft import PeftModel

    place = folder / ADAPTER
    if is_main_process():
        with explained_write_errors(place):
            adapted.save_pretrained(place)
    PartialState().wait_for_everyone()
    if adapted.get_base_model() is not model:
        # The adapter learned what the weights in 4 bits lack. Merged into those, the sum would be rounded once more.
        _take_rounded_(model.to(adapted.device), adapted.get_base_model())
        adapted = PeftModel.from_pretrained(model, place)
    return adapted.merge_and_unload()


def _take_rounded_(model: nn.Module, in_4_bits: nn.Module) -> None:
    """Gives the linear layers of a model the numbers that those of its copy in 4 bits stand for."""
    for name, module in in_4_bits.named_modules():
        if getattr(getattr(module, "weight", None), "quant_state", None) is not None:
            linear: Any = model.get_submodule(name.removesuffix(".base_layer"))
            numbers = numbers_in_4_bits(module)
            with torch.no_grad():
                # In 4 bits all layers are nn.Linear, those of GPT-2 as well.
                linear.weight.copy_(numbers.T if isinstance(linear, Conv1D) else numbers)
