"""The model families that lte converts: one row per `model_type`.

To add a family, add a row: the names of its stock classes, and an `FfnLayout` that says which projection of
its FFN does what. `tests/hf/test_families.py` then converts, trains, saves and reloads it on a tiny random
config. A family whose FFN is no module of its own (OPT) or spans two (BERT) needs a second kind of row, which
does not exist yet.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from lte.nn.sparse_ffn import FfnLayout

GATED = FfnLayout()
FUSED_GATED = FfnLayout(up="gate_up_proj", gate=None, fused=True, activation="activation_fn")


@dataclass(frozen=True)
class Family:
    """What lte must know of one `model_type` of transformers.

    Attributes:
        model_type: the stock `config.model_type`.
        module: the family's package in `transformers.models`.
        config_class: name of the stock config class.
        ffn_class: name of the stock FFN class that is replaced.
        layout: roles of the FFN's projections.
        activation_field: config field that names the activation function.
        models: which stock model class each Auto class loads.
    """

    model_type: str
    module: str
    config_class: str
    ffn_class: str
    layout: FfnLayout = GATED
    activation_field: str = "hidden_act"
    models: dict[str, str] = field(default_factory=dict)

    @property
    def sparse_model_type(self) -> str:
        """The `model_type` of the saved sparse folder, unknown to transformers without lte."""
        return f"lte_{self.model_type}"

    def stock_class(self, name: str) -> type[Any]:
        """A class of the family from transformers, by name."""
        part = "configuration" if name == self.config_class else "modeling"
        return getattr(importlib.import_module(f"transformers.models.{self.module}.{part}_{self.module}"), name)


def _decoder(model_type: str, prefix: str, module: str | None = None, **row: Any) -> Family:
    defaults = {
        "config_class": f"{prefix}Config",
        "ffn_class": f"{prefix}MLP",
        "models": {"AutoModelForCausalLM": f"{prefix}ForCausalLM"},
    }
    return Family(model_type=model_type, module=module or model_type, **{**defaults, **row})


FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        _decoder("llama", "Llama"),
        _decoder("mistral", "Mistral"),
        _decoder("qwen2", "Qwen2"),
        _decoder("qwen3", "Qwen3"),
        _decoder("gemma2", "Gemma2", activation_field="hidden_activation"),
        _decoder(
            "gemma3_text",
            "Gemma3",
            module="gemma3",
            config_class="Gemma3TextConfig",
            activation_field="hidden_activation",
        ),
        _decoder("phi3", "Phi3", layout=FUSED_GATED),
    )
}


def family_of(config: Any) -> Family:
    """The row of a stock or sparse config.

    Raises:
        ValueError: for a `model_type` that has no row, listing those that have one.
    """
    model_type = getattr(config, "model_type", None) or type(config).__name__
    row = FAMILIES.get(str(model_type).removeprefix("lte_"))
    if row is None:
        raise ValueError(
            f"model_type must be one of {', '.join(FAMILIES)}, got model_type={model_type!r}. To "
            "support another family, add a row to FAMILIES in lte/hf/families.py (its FFN class and projection names)."
        )
    return row


def dense_ffns(model: nn.Module, family: Family) -> dict[str, nn.Module]:
    """The stock FFN modules of `model` by qualified name, in depth order."""
    ffn_class = family.stock_class(family.ffn_class)
    return {name: module for name, module in model.named_modules() if isinstance(module, ffn_class)}
