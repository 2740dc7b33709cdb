"""Which optimisers of Trainer keep a narrow state, which round stochastically, and what they leave of routers in fp32.

Names are those of `transformers.TrainingArguments.optim`, all of them in 5.5 as in 5.23. Of weights in bf16 most steps
at usual learning rates are smaller than half the distance to the next number: rounded to the nearest one they are lost.
Rounded up or down at random, by how near each is, they count in the mean; only the optimisers of torchao do that.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lte.hf.loading import FP32_NAMES
from lte.nn.router import Router
from lte.train.config import TrainConfig

# From so many numbers on a tensor's moments are narrow, in all of them.
LEAST_NARROW = 4096


@dataclass(frozen=True)
class Optimiser:
    """What a name of `optim` stands for.

    Attributes:
        moment_bytes: of both moments of a parameter, with the scales of their blocks; `None`: as the weight's dtype.
        block: numbers that share a scale; others than multiples of it are not narrow.
        package: that it needs besides torch.
        rounds: whether it can round weights in bf16 stochastically.
        wide_embeddings: whether the moments of embeddings are in fp32, as Trainer sets it.
    """

    moment_bytes: float | None = None
    block: int = 1
    package: str | None = None
    rounds: bool = False
    wide_embeddings: bool = False


OPTIMISERS: dict[str, Optimiser] = {
    "adamw_torch": Optimiser(),
    "adamw_torch_fused": Optimiser(),
    "adamw_torch_8bit": Optimiser(2 + 2 * 4 / 256, 256, "torchao", rounds=True),
    # Trainer gives both of torchao blocks of 256.
    "adamw_torch_4bit": Optimiser(1 + 2 * 4 / 256, 256, "torchao", rounds=True),
    "adamw_bnb_8bit": Optimiser(2 + 2 * 4 / 256, 1, "bitsandbytes", wide_embeddings=True),
}
"""The optimisers of `lte train --optim`."""

BITSANDBYTES = frozenset(
    [
        *("adamw_bnb_8bit", "adamw_8bit", "lion_32bit", "lion_8bit", "ademamix", "ademamix_8bit"),
        *(f"paged_{name}_{width}" for name in ("adamw", "ademamix", "lion") for width in ("8bit", "32bit")),
        *("rmsprop_bnb", "rmsprop_bnb_8bit", "rmsprop_bnb_32bit"),
    ]
)
"""All names that Trainer gives optimisers of bitsandbytes, whose kernels take no shards (0.50)."""


def optimiser_name(config: TrainConfig, cuda: bool) -> str:
    """The optimiser of the settings: weights in bf16 take torchao's Adam in 8 bits, others torch's, unless they say."""
    if config.optim is not None:
        return config.optim
    if config.weights_dtype == "bfloat16":
        return "adamw_torch_8bit"
    return "adamw_torch_fused" if cuda else "adamw_torch"


def optimiser_arguments(config: TrainConfig, cuda: bool) -> dict[str, Any]:
    """`optim` and `optim_args` of a trainer for the settings of `lte train`.

    Raises:
        ValueError: if the package of an optimiser is not installed.
    """
    name, narrow = optimiser_name(config, cuda), config.weights_dtype == "bfloat16"
    found = OPTIMISERS[name]
    if found.package is not None and find_spec(found.package) is None:
        alone = " which weights_dtype=bfloat16 takes where none is named," if config.optim is None else ""
        raise ValueError(
            f"optim must be one whose package is installed, got optim={name},{alone} without {found.package}; "
            f"pip install {found.package}"
        )
    return {"optim": name, "optim_args": "bf16_stochastic_round=True" if found.rounds and narrow else None}


def warn_of_lost_steps(config: TrainConfig) -> None:
    """Warns of an optimiser that rounds weights in bf16 to the nearest number, as most of its steps are lost."""
    name = optimiser_name(config, cuda=False)
    # Adapters and routers are in fp32.
    trains = config.lora_rank is None and config.trainable != "routers"
    if config.weights_dtype == "bfloat16" and trains and not OPTIMISERS[name].rounds:
        warnings.warn(
            f"optim={name} rounds weights in bfloat16 to the nearest number, which loses most of its steps, so that "
            "few weights change at all; take --optim adamw_torch_8bit, which rounds stochastically, or "
            "--weights-dtype float32",
            stacklevel=1,
        )


def cast_weights_(model: nn.Module, dtype: torch.dtype) -> None:
    """Turns the weights of a model to a dtype in place; those of routers, and all buffers, stay as they are."""
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and FP32_NAMES.isdisjoint(name.split(".")):
            parameter.data = parameter.data.to(dtype)


def keep_routers_wide_(optimizer: torch.optim.Optimizer, model: nn.Module, routers: Iterable[nn.Parameter]) -> None:
    """Has an optimiser with narrow moments keep those of routers in fp32, in place.

    Args:
        optimizer: of any kind, before its first step.
        model: whose routers they are.
        routers: their parameters.
    """
    kind = type(optimizer).__module__.partition(".")[0]
    if kind == "torchao":
        narrow: Any = optimizer
        new_buffer, wide = narrow._new_buffer, {id(parameter) for parameter in routers}

        def buffer(p: Tensor, signed: bool) -> Tensor:
            if id(p) in wide:
                return torch.zeros_like(p)
            # Narrow moments of shards lose the dtype of weights in bf16 that torchao (0.18) gives them, and its step
            # fails; as those of weights in fp32 they hold the same bytes.
            return new_buffer(p.float() if isinstance(p, DTensor) else p, signed)

        narrow._new_buffer = buffer
    elif kind == "bitsandbytes":
        from bitsandbytes.optim import GlobalOptimManager

        # Its one manager for all keeps what it was told by a parameter's place and id, also for the next optimiser.
        given, modules = GlobalOptimManager.get_instance().module_weight_config_triple, set(model.modules())
        manager = GlobalOptimManager.__new__(GlobalOptimManager)
        manager.initialize()
        manager.module_weight_config_triple = [each for each in given if each[0] in modules]
        for router in (module for module in modules if isinstance(module, Router)):
            for name, _ in router.named_parameters():
                manager.register_module_override(router, name, {"optim_bits": 32})
        bitsandbytes: Any = optimizer
        bitsandbytes.mng = manager
