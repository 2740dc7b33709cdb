"""Moving the one threshold of an LTE model, by hand or to a point of the curve that its config remembers."""

from __future__ import annotations

from typing import Any

from torch import nn

from lte.hf.inputs import unwrapped
from lte.hf.install import require_sparse_ffns
from lte.hf.sparsity_curve import Choice, Hold, SparsityCurve, chosen_settings, curve_of
from lte.nn.laid_out import LaidOutFfn
from lte.ops.paths import ExpectedUse


def set_threshold_(model: nn.Module, threshold: float, layer_sparsity: list[float] | None = None) -> nn.Module:
    """Moves tau of all FFNs of an LTE model in place, accelerated or not, and returns it; its config stays.

    Args:
        model: an LTE model.
        threshold: the new tau, in (0, 1).
        layer_sparsity: share of neurons off by layer, [L], by which kernels choose their paths; `None` leaves these.

    Raises:
        ValueError: for a model of another kind, or a threshold outside of (0, 1).
    """
    if not 0 < threshold < 1:
        raise ValueError(f"threshold must lie in (0, 1), got threshold={threshold}")
    ffns = list(require_sparse_ffns(model).values())
    shares = layer_sparsity if layer_sparsity is not None and len(layer_sparsity) == len(ffns) else [None] * len(ffns)
    for ffn, share in zip(ffns, shares, strict=True):
        ffn.set_threshold(threshold)
        if share is not None and isinstance(ffn, LaidOutFfn):
            ffn.expect_(ExpectedUse(1 - share))
    return model


def take_choice_(model: nn.Module, curve: SparsityCurve, choice: Choice) -> nn.Module:
    """Runs an LTE model at a point of its curve from here on, in place; its config says so, also when it is saved.

    Args:
        model: an LTE model; adapters of peft may be around it.
        curve: what was measured of it.
        choice: from `curve.at_target` or `curve.within_ratio`.

    Raises:
        ValueError: for a model of another kind.
    """
    config: Any = unwrapped(model).config
    set_threshold_(model, choice.point.threshold, choice.point.layer_sparsity)
    for name, value in chosen_settings(config, curve, choice).items():
        setattr(config, name, value)
    return model


def set_sparsity_(
    model: nn.Module,
    target_sparsity: float | None = None,
    *,
    max_perplexity_ratio: float | None = None,
    hold: Hold | None = None,
) -> nn.Module:
    """Picks another point of the curve that an LTE model remembers, in place and without training; returns the model.

    `lte calibrate` or `lte.calibrate_curve_` measures the curve. Between two measured thresholds a target is
    interpolated, so that the sparsity on the texts of the curve is near it, not equal to it.
    `model.config.lte_curve["chosen"]` says what was asked for and what is expected, and `save_pretrained` saves that.

    Args:
        model: an LTE model; adapters of peft may be around it.
        target_sparsity: of the texts of the curve.
        max_perplexity_ratio: in its place: the sparsest measured point with at most so many times the perplexity of the
            dense model.
        hold: whether the `mean` over texts shall meet that, or `each` of them; `None` takes what the curve was made
            with.

    Raises:
        ValueError: for a model without a curve, a target outside of it, or not exactly one of the two.
    """
    if (target_sparsity is None) == (max_perplexity_ratio is None):
        raise ValueError(
            "target_sparsity or max_perplexity_ratio must be given, one of them, got "
            f"target_sparsity={target_sparsity} and max_perplexity_ratio={max_perplexity_ratio}"
        )
    if target_sparsity is not None:
        curve = curve_of(unwrapped(model).config)
        return take_choice_(model, curve, curve.at_target(target_sparsity, hold))
    assert max_perplexity_ratio is not None
    curve = curve_of(unwrapped(model).config, why="max_perplexity_ratio")
    return take_choice_(model, curve, curve.within_ratio(max_perplexity_ratio, hold))
