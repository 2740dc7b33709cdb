"""Adapters of peft beside routers: the routers train as a whole, and belong to the adapter that is saved."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

from lte.hf.install import sparse_ffns

ROUTER = "router"


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
