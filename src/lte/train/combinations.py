"""Settings of a training that do not go together, and what stays of a model that is trained on; loads nothing."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace

from lte.config import LteConfig
from lte.train.config import RecipeSettings, TrainConfig

FIXED = ("expert_size", "grouping", "router_rank", "threshold", "always_on", "router_context", "dropped_bias")
"""Settings that an LTE model keeps."""


def retargeted(own: LteConfig, config: LteConfig, changed: Collection[str]) -> LteConfig:
    """The settings of an LTE model that is trained on.

    Args:
        own: of the model.
        config: those that are wanted.
        changed: names in `config` that were asked for; of these the target alone may be another one.

    Raises:
        ValueError: if others differ, or the target is out of reach.
    """
    for name in FIXED:
        if name in changed and getattr(config, name) != getattr(own, name):
            raise ValueError(
                f"{name} must stay {getattr(own, name)} for an LTE model, got {name}={getattr(config, name)}; start "
                "from the dense model to change it"
            )
    return replace(own, target_sparsity=config.target_sparsity) if "target_sparsity" in changed else own


def check_combination(
    config: LteConfig | None,
    train: TrainConfig,
    stages: Sequence[int],
    *,
    distils: bool,
    sequence_length: int,
    new_routers: bool,
) -> None:
    """Refuses settings of routing that never act together, or that the trainer would refuse later.

    Args:
        config: of the model.
        train: of its training.
        stages: which of its stages run.
        distils: whether there is a teacher.
        sequence_length: tokens of a row.
        new_routers: whether the model is dense at first.

    Raises:
        ValueError: says which.
    """
    if train.recipe in ("dense", "method"):
        return
    check_match(train, distils)
    check_margin(train, 2 in stages)
    check_regrouping(train, 1 in stages, has_adapters=train.lora_rank is not None)
    if train.regroup_count and train.optim == "adamw_bnb_8bit":
        refuse_moments(train.optim, "moments in blocks of its own")
    if (train.union_weight or train.price_on == "union") and train.union_tokens > sequence_length:
        raise ValueError(
            f"union_tokens must be at most sequence_length={sequence_length}, as rows without a whole chunk have no "
            f"union loss, got union_tokens={train.union_tokens}; lower it"
        )
    if config is not None and config.router_context and (train.regroup_count or config.dropped_bias):
        other = "regroup_count" if train.regroup_count else "dropped_bias"
        raise ValueError(
            f"router_context must be 0 with {other}, which asks routers about tokens by themselves, got "
            f"router_context={config.router_context}"
        )
    if config is not None and config.dropped_bias:
        if train.lora_rank is not None:
            refuse_bias_of_adapters()
        if new_routers:
            check_bias_start(train)


def check_match(train: RecipeSettings, distils: bool) -> None:
    """Raises a `ValueError` for outputs that are matched to those of a teacher that is not there."""
    if train.match_weight and train.match_to == "teacher" and not distils:
        raise ValueError(
            "match_to must be own without a teacher that the model is distilled from, got match_to=teacher; give a "
            "teacher (lte train --distill-from initial)"
        )


def check_margin(train: RecipeSettings, has_stage2: bool) -> None:
    """Raises a `ValueError` for a margin loss without the stage that it acts in."""
    if train.margin_weight and not has_stage2:
        raise ValueError(
            f"margin_weight must be 0 without stage 2, in which it acts, got margin_weight={train.margin_weight:g}; "
            "leave it out, or train both stages"
        )


def check_regrouping(train: RecipeSettings, has_stage1: bool, *, has_adapters: bool) -> None:
    """Raises a `ValueError` for neurons that are to move where they cannot."""
    if not train.regroup_count:
        return
    if not has_stage1:
        raise ValueError(
            f"regroup_count must be 0 without stage 1, in which neurons move, got regroup_count={train.regroup_count}; "
            "leave it out, or train both stages"
        )
    if has_adapters:
        raise ValueError(
            "regroup_count must be 0 for a model with adapters, as the weights under them are frozen and not saved "
            f"with them, got regroup_count={train.regroup_count}; train all weights, or leave it out"
        )


def refuse_moments(optimiser: str, what: str) -> None:
    """Raises a `ValueError`: neurons cannot move with the state of this optimiser."""
    raise ValueError(
        "optim must keep its moments as one number for each weight where neurons move with regroup_count, got "
        f"optim={optimiser} with {what}; take adamw_torch or, for weights in bfloat16, adamw_torch_8bit"
    )


def check_bias_start(train: RecipeSettings) -> None:
    """Raises a `ValueError` unless the biases for what is dropped get what they start from."""
    if not train.holds_target:
        raise ValueError(
            "dropped_bias must be false where no controller holds the target, as its start comes with the target, got "
            f"dropped_bias=True with recipe={train.recipe}; take recipe=straight_through"
        )
    if not train.router_fit_tokens:
        raise ValueError(
            "router_fit_tokens must be positive with dropped_bias, which starts from what fitted routers drop, got "
            f"router_fit_tokens={train.router_fit_tokens} and routers without weights"
        )


def refuse_bias_of_adapters() -> None:
    """Raises a `ValueError`: biases for what is dropped do not go with adapters."""
    raise ValueError(
        "dropped_bias must be false for a model with adapters, which leave biases as they are, got dropped_bias=True; "
        "train all weights, or convert the model without it"
    )
