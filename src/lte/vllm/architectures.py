"""Which families of the table vLLM serves, and what vLLM calls the parts of their FFNs."""

from __future__ import annotations

from dataclasses import dataclass

from lte.hf.families import FAMILIES


@dataclass(frozen=True)
class ServedFfn:
    """How vLLM's class of a family names the parts of an FFN.

    Attributes:
        up: the projection of the hidden states: gate above up if the FFN is gated.
        down: the projection back.
        gated: whether the FFN has a gate.
        layers: path of the list of decoder layers in the model.
    """

    up: str = "gate_up_proj"
    down: str = "down_proj"
    gated: bool = True
    layers: str = "model.layers"


_GATED = ServedFfn()
_FFNS: dict[str, ServedFfn] = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3"), _GATED),
    "gpt2": ServedFfn(up="c_fc", down="c_proj", gated=False, layers="transformer.h"),
}

PREFIX = "Lte"

SERVED: dict[str, ServedFfn] = {
    f"{PREFIX}{FAMILIES[model_type].models['AutoModelForCausalLM']}": ffn for model_type, ffn in _FFNS.items()
}
"""The FFNs by the architecture's name in vLLM. Each passes the tests in tests/vllm."""

REFUSED: tuple[str, ...] = tuple(
    name
    for family in FAMILIES.values()
    for name in dict.fromkeys(f"{PREFIX}{stock}" for stock in family.models.values())
    if name not in SERVED
)
"""What vLLM would be asked for by other folders: other families, and other heads than the language model's."""


def stock_name(architecture: str) -> str:
    """vLLM's name of the stock architecture."""
    return architecture.removeprefix(PREFIX)


def served_names() -> str:
    """The stock names of all that is served, for messages."""
    return ", ".join(stock_name(name) for name in SERVED)
