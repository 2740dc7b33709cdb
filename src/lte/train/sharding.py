"""What a training in shards needs beside what accelerate does: FSDP2 and DeepSpeed's ZeRO.

accelerate reads which of them it is from its configs (`lte configs`), shards the model when `Trainer.train` begins, and
Trainer saves and loads the shards. Here are the routers, which stay in fp32 and are units of their own, and the way
back to a model that one process holds.
"""

from __future__ import annotations

import importlib.metadata
import warnings
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from accelerate.utils import compare_versions
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy

from lte.hf.inputs import unwrapped
from lte.nn.router import Router
from lte.nn.shards import whole_state
from lte.train.optimisers import BITSANDBYTES

OLDEST_DEEPSPEED = "0.19.7"
"""As in `pyproject.toml`. Before 0.17.2 there is no autocast, before 0.19.3 LoRA fails in ZeRO-3, and before 0.19.7
weights that are set after a universal checkpoint was read in ZeRO-2 go into the moments."""
ShardKind = Literal["FSDP", "DeepSpeed"]
# What Trainer writes into a checkpoint of each kind: a file or folder of which the name begins so.
_KINDS: dict[ShardKind, str] = {"FSDP": "pytorch_model_fsdp", "DeepSpeed": "global_step"}


def prepare_fsdp_(plugin: Any, args: Any, model: nn.Module, checkpointing: str | None) -> str | None:
    """Makes routers units of their own in FSDP2, and has the model checkpoint its activations, not FSDP.

    A unit has one dtype, and routers are in fp32 in every model. FSDP's own checkpointing would wrap them, too.

    Args:
        plugin: accelerate's, changed in place.
        args: of the trainer, changed in place.
        model: that trains.
        checkpointing: what the arguments call the recomputation of activations if it is on.

    Returns:
        What they call it if it is on now.

    Raises:
        ValueError: for FSDP of version 1, and an optimiser of bitsandbytes, whose kernels take no shards.
    """
    optim = str(getattr(args.optim, "value", args.optim))
    if optim in BITSANDBYTES:
        raise ValueError(
            f"optim must be none of bitsandbytes, which takes no shards, with FSDP, got optim={optim}; take "
            "adamw_torch_fused, or adamw_torch_8bit of torchao"
        )
    if plugin.fsdp_version != 2:
        raise ValueError(
            f"fsdp_version must be 2, got fsdp_version={plugin.fsdp_version}; take accelerate's config from lte configs"
        )
    if any(isinstance(module, Router) for module in model.modules()):
        names = plugin.transformer_cls_names_to_wrap
        if names is None:
            names = getattr(unwrapped(model), "_no_split_modules", None) or []
        plugin.transformer_cls_names_to_wrap = [*names, *({Router.__name__} - set(names))]
    if plugin.activation_checkpointing:
        plugin.activation_checkpointing = False
        checkpointing = next(
            name for name in ("activation_checkpointing", "gradient_checkpointing") if hasattr(args, name)
        )
        setattr(args, checkpointing, True)
    return checkpointing


def prepare_deepspeed_(plugin: Any) -> None:
    """Has DeepSpeed train in bf16 by autocast, with weights in fp32, where it is told to train in bf16.

    Its own bf16 makes all parameters bf16, routers, too, and computes with those. A config that says `torch_autocast`
    itself stays as it is. What is sent for linear layers is in bf16 either way.

    Args:
        plugin: accelerate's, changed in place; before the model is prepared.

    Raises:
        ValueError: for a version of DeepSpeed that lacks what this needs.
    """
    if compare_versions("deepspeed", "<", OLDEST_DEEPSPEED):
        raise ValueError(
            f"deepspeed must be of version {OLDEST_DEEPSPEED} or newer, got "
            f"deepspeed={importlib.metadata.version('deepspeed')}; pip install 'deepspeed>={OLDEST_DEEPSPEED}'"
        )
    config = plugin.deepspeed_config
    if config.get("bf16", {}).get("enabled") is True and "torch_autocast" not in config:
        config["bf16"] = {"enabled": False}
        config["torch_autocast"] = {"enabled": True, "dtype": "bfloat16"}


def widen_routers_(model: nn.Module) -> None:
    """Has the routers of a model in FSDP2 compute in fp32 under mixed precision; before the first forward pass."""
    # Nothing is changed in place in what a router returns.
    warnings.filterwarnings("ignore", message=r"FSDP2-wrapped module \(FSDPRouter\) returned a view tensor")
    for module in model.modules():
        if isinstance(module, Router) and isinstance(module, FSDPModule):
            state = module._get_fsdp_state()
            state._mp_policy = MixedPrecisionPolicy()
            for group in _groups_of(state):
                group.mp_policy = MixedPrecisionPolicy()


def zero_moments_(optimizer: Any) -> None:
    """Sets all that DeepSpeed's optimiser remembers to 0, in place: it keeps views of it, which would be lost."""
    for state in innermost(optimizer).state.values():
        for name, value in state.items():
            if isinstance(value, torch.Tensor):
                value.zero_()
            elif isinstance(value, int | float):
                state[name] = type(value)(0)


def innermost(optimizer: Any) -> Any:
    """PyTorch's optimiser inside of DeepSpeed's and accelerate's."""
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer


def _groups_of(state: Any) -> list[Any]:
    """The parameter groups of a unit; one in torch 2.11, several since."""
    several = getattr(state, "_fsdp_param_groups", None)
    return list(several) if several is not None else [state._fsdp_param_group]


def is_in_shards(model: nn.Module) -> bool:
    """Whether a model was sharded by FSDP2 or ZeRO-3."""
    sharded = any(isinstance(module, FSDPModule) for module in model.modules())
    return sharded or any(hasattr(parameter, "ds_id") for parameter in model.parameters())


def unsharded_class(model: nn.Module) -> Any:
    """The class of a model before FSDP2 made one of its own of it."""
    return next(each for each in type(model).__mro__ if not issubclass(each, FSDPModule))


def gathered(model: Any) -> Any:
    """A model that this process holds whole, with the weights of one in shards: of the first process, else `None`.

    Args:
        model: of transformers; one that is not in shards is returned as it is.
    """
    if not is_in_shards(model):
        return model
    state = whole_state(model)
    if dist.get_rank() != 0:
        return None
    kind = unsharded_class(model)
    with torch.device("meta"):
        made = kind(model.config)
    made.load_state_dict(state, assign=True)
    made.tie_weights()
    for name, buffer in model.named_buffers():
        if name not in state:
            parent, _, own = name.rpartition(".")
            made.get_submodule(parent).register_buffer(own, buffer.cpu(), persistent=False)
    made.generation_config = model.generation_config
    return made.eval()


def check_kind(checkpoint: Path, kind: ShardKind | None) -> None:
    """Refuses a checkpoint that was written in shards of another kind than those of the run that goes on.

    Args:
        checkpoint: its folder.
        kind: `FSDP`, `DeepSpeed`, or `None` for a model that is whole in every process.

    Raises:
        ValueError: says of which.
    """
    names = [path.name for path in checkpoint.iterdir()]
    found = next((each for each, start in _KINDS.items() if any(name.startswith(start) for name in names)), None)
    if found != kind:
        words: dict[ShardKind | None, str] = {each: f"shards of {each}" for each in _KINDS}
        words[None] = "a model that is whole in each process"
        raise ValueError(
            f"a resumed run must be sharded as it was, got {words[kind]} where {checkpoint} is of {words[found]}; "
            "launch it with the config that it began with"
        )
