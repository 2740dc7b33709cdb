"""The kernels' names for the activation functions of PyTorch and transformers."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import activations

from lte.ops.activations import ACTIVATIONS

_CLASSES: dict[type, str] = {
    nn.SiLU: "silu",
    nn.ReLU: "relu",
    activations.GELUActivation: "gelu",
    activations.NewGELUActivation: "gelu_tanh",
    activations.FastGELUActivation: "gelu_tanh",
    activations.AccurateGELUActivation: "gelu_tanh",
    activations.ReLUSquaredActivation: "relu2",
}
# Names that differ between versions of transformers.
for _class, _name in (("SiLUActivation", "silu"), ("GELUTanh", "gelu_tanh"), ("PytorchGELUTanh", "gelu_tanh")):
    if hasattr(activations, _class):
        _CLASSES[getattr(activations, _class)] = _name
_FUNCTIONS: dict[Callable[..., Any], str] = {
    functional.silu: "silu",
    functional.gelu: "gelu",
    functional.relu: "relu",
    torch.relu: "relu",
}


def activation_name(activation: Any) -> str | None:
    """The key of `lte.ops.activations.ACTIVATIONS` that computes the same function, `None` if there is none.

    Args:
        activation: a module or function, an FFN's `act_fn` say.
    """
    if isinstance(activation, nn.GELU) or (isinstance(activation, partial) and activation.func is functional.gelu):
        settings = activation.keywords if isinstance(activation, partial) else vars(activation)
        return "gelu_tanh" if settings.get("approximate") == "tanh" else "gelu"
    if activation in ACTIVATIONS.values():
        return next(name for name, function in ACTIVATIONS.items() if function is activation)
    return _CLASSES.get(type(activation)) or _FUNCTIONS.get(activation)
