"""The fields in which programs with transformers 4 look for a model's rotary embedding.

transformers 5 writes `rope_parameters` alone. Version 4 does not know it and takes the defaults of the family without
a word: other answers, unless the model's base is the default.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# What families call the base and the share of a head that is rotated, where it is not the usual names.
_NAMES = {"gpt_neox": ("rotary_emb_base", "rotary_pct")}
_USUAL = ("rope_theta", "partial_rotary_factor")


def rope_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """What to add to the fields of a stock `config.json` of transformers 5, which reads the same out of both."""
    rope = config.get("rope_parameters") or {}
    if "full_attention" in rope:
        local = rope.get("sliding_attention") or {}
        return {**_fields(rope["full_attention"], _USUAL), "rope_local_base_freq": local.get("rope_theta")}
    found = _fields(rope, _NAMES.get(str(config.get("model_type")), _USUAL))
    if config.get("model_type") == "phi3" and "rope_scaling" in found:
        found["rope_scaling"] = _of_phi3(found["rope_scaling"], config)
    return found


def _of_phi3(scaling: dict[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """Phi-3 in version 4 takes three fields alone, and the type by its older name; with others it is refused there."""
    lists: dict[str, Any] = {name: scaling[name] for name in ("short_factor", "long_factor") if name in scaling}
    # This one version 4 reads from the config itself.
    length = "original_max_position_embeddings"
    kept_elsewhere = {"rope_type", "type"} | ({length} if scaling.get(length) == config.get(length) else set())
    return {"type": scaling["rope_type"], **lists} if scaling.keys() <= lists.keys() | kept_elsewhere else scaling


def _fields(rope: Mapping[str, Any], names: tuple[str, str]) -> dict[str, Any]:
    found = {name: rope[field] for name, field in zip(names, _USUAL, strict=True) if field in rope}
    if rope.get("rope_type", "default") == "default":
        return found
    return {**found, "rope_scaling": {key: value for key, value in rope.items() if key not in _USUAL}}
