"""A model that drafts for itself: the same weights at a higher threshold, as the assistant of `generate`.

    draft = lte.draft_of(model, target_sparsity=0.9)
    model.generate(ids, assistant_model=draft)

The draft proposes some tokens, and the model reads all of them at once and keeps those that it would have written.
Nothing is stored twice but what a second cache holds.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

from torch import nn

from lte.hf.install import require_sparse_ffns
from lte.hf.sparsity_curve import readable_curve
from lte.hf.threshold import set_sparsity_, set_threshold_
from lte.nn.shared_ffn import second_ffn, shallow_copy


def draft_of(model: Any, threshold: float | None = None, *, target_sparsity: float | None = None) -> Any:
    """The same model at another threshold, on the same parameters, for `generate(assistant_model=...)`.

    What is written into the weights of either counts for both; where the model is moved, accelerated, or put into train
    or eval mode, the draft is, too. The draft has a config with its threshold, so that `save_pretrained` of it saves a
    model that skips as it does, and a generation config of its own, whose `num_assistant_tokens` says how many tokens
    it proposes at a time.

    Args:
        model: an LTE model of transformers, accelerated or not; its threshold stays.
        threshold: tau of the draft.
        target_sparsity: in its place, a sparsity on the curve that the model remembers, see `lte.set_sparsity_`. Of a
            model that is accelerated already, kernels choose their paths by it.

    Raises:
        ValueError: for a dense model, not exactly one of the two, FFNs that have no module of their own, or modules
            that accelerate has given hooks.
    """
    if (threshold is None) == (target_sparsity is None):
        raise ValueError(
            "threshold or target_sparsity must be given, one of them, got "
            f"threshold={threshold} and target_sparsity={target_sparsity}"
        )
    ffns = require_sparse_ffns(model)
    if any(ffn.block for ffn in ffns.values()):
        raise ValueError(
            f"model must have FFNs in modules of their own to draft for itself, got {type(model).__name__}; take "
            "another model as the assistant"
        )
    if any(hasattr(module, "_hf_hook") for module in model.modules()):
        raise ValueError(
            f"model must lie on one device without accelerate's hooks to draft for itself, got {type(model).__name__} "
            "with some; load it without device_map"
        )
    draft = shallow_copy(model)
    draft.config, draft.generation_config = copy.deepcopy(model.config), copy.deepcopy(model.generation_config)
    for name, ffn in ffns.items():
        *path, last = name.split(".")
        _own_path(draft, model, path)._modules[last] = second_ffn(ffn)
    if target_sparsity is not None:
        return set_sparsity_(draft, target_sparsity)
    assert threshold is not None
    set_threshold_(draft, threshold)
    config, curve = draft.config, readable_curve(draft.config.lte_curve)
    config.lte = {**config.lte, "threshold": threshold}
    # What was measured or chosen is of the model's own threshold.
    config.lte_measurement = None
    config.lte_curve = None if curve is None else replace(curve, chosen=None).to_dict()
    return draft


def _own_path(draft: nn.Module, model: nn.Module, path: list[str]) -> nn.Module:
    """The module at a path in the draft, with all on the way to it being the draft's own."""
    for name in path:
        model = model._modules[name]  # type: ignore[assignment]
        if draft._modules[name] is model:
            draft._modules[name] = shallow_copy(model)
        draft = draft._modules[name]  # type: ignore[assignment]
    return draft
