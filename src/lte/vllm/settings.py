"""What a deployment of an LTE folder runs with: the folder's settings, and what `--hf-overrides` changes of them.

`--hf-overrides '{"lte_threshold": 0.4}'` moves the threshold, `{"lte_target_sparsity": 0.6}` takes that point of the
curve that `lte calibrate` measured, `{"lte_weights": "int8"}` rounds the FFNs' weights to 8 bits while they are loaded.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from lte.config import LteConfig, check_choice, check_expert_size
from lte.hf.families import family_of
from lte.hf.loading import method_settings
from lte.hf.sparsity_curve import curve_of
from lte.ops.arguments import EXPERT_SIZES
from lte.ops.paths import ExpectedUse, expected_uses

WEIGHTS = ("native", "int8")


@dataclass(frozen=True, kw_only=True)
class ServeSettings:
    """What the FFNs of a served model need to know.

    Attributes:
        config: of the method.
        threshold: tau of this deployment.
        num_neurons: F of an FFN.
        num_experts: E of an FFN.
        weights: one of `WEIGHTS`.
        uses: expected use of the experts by layer, empty if unknown; kernels are chosen by it.
        sparsity: expected share of neurons off, `None` if unknown.
    """

    config: LteConfig
    threshold: float
    num_neurons: int
    num_experts: int
    weights: str
    uses: tuple[ExpectedUse, ...]
    sparsity: float | None

    @property
    def threshold_logit(self) -> float:
        """The logit that a score must exceed."""
        return math.log(self.threshold / (1 - self.threshold))

    def use_of(self, layer: int) -> ExpectedUse | None:
        """The expected use of a layer's experts."""
        return self.uses[layer] if layer < len(self.uses) else None


def serve_settings(hf_config: Any) -> ServeSettings:
    """The settings of a deployment by the config that vLLM has read, overrides included.

    Raises:
        ValueError: for a folder of another method or of a newer lte, an expert size without kernels, or overrides that
            do not fit.
    """
    own = getattr(hf_config, "lte", None)
    if isinstance(own, dict) and "version" not in own:
        raise ValueError(
            f"hf-overrides must not replace the field lte, got lte={own}; set lte_threshold, lte_target_sparsity or "
            "lte_weights instead"
        )
    found = method_settings(hf_config)
    if found is None or found["name"] != LteConfig.name:
        name = "no method" if found is None else f"the method {found['name']}"
        raise ValueError(
            f"vLLM serves models of the method {LteConfig.name}, got a folder of {name}; `lte.densify_(model)` makes a "
            "dense model of it that any engine serves"
        )
    config = LteConfig.from_dict(found)
    if config.router_context:
        raise ValueError(
            "router_context must be 0 for vLLM, whose caches do not keep what the routers read of earlier tokens, got "
            f"router_context={config.router_context}; transformers runs the folder"
        )
    neurons = getattr(hf_config, family_of(hf_config).neurons_field) or 4 * hf_config.hidden_size  # GPT-2 has None
    experts = check_expert_size(neurons, config.expert_size)
    if config.expert_size not in EXPERT_SIZES:
        known = ", ".join(map(str, EXPERT_SIZES))
        raise ValueError(f"expert_size must be one of {known} for the kernels, got expert_size={config.expert_size}")
    weights = getattr(hf_config, "lte_weights", None) or "native"
    if weights == "int4":
        raise ValueError(
            "lte_weights must be native or int8 in vLLM, got lte_weights=int4; the kernels of 4 bits compute whole "
            "decoding steps, which vLLM takes itself: transformers decodes by them what torchao has rounded"
        )
    check_choice("lte_weights", weights, WEIGHTS)
    threshold, uses = _operating_point(hf_config, config)
    sparsity = 1 - sum(use.active for use in uses) / len(uses) if uses else None
    return ServeSettings(
        config=config,
        threshold=threshold,
        num_neurons=neurons,
        num_experts=experts,
        weights=weights,
        uses=uses,
        sparsity=sparsity,
    )


def _operating_point(hf_config: Any, config: LteConfig) -> tuple[float, tuple[ExpectedUse, ...]]:
    """The threshold, and the use of experts by layer that is expected at it, none if nothing is known."""
    threshold = getattr(hf_config, "lte_threshold", None)
    target = getattr(hf_config, "lte_target_sparsity", None)
    if threshold is not None and target is not None:
        raise ValueError(
            f"lte_threshold or lte_target_sparsity must be given, not both, got lte_threshold={threshold} and "
            f"lte_target_sparsity={target}"
        )
    if target is not None:
        point = curve_of(hf_config).at_target(target).point
        return point.threshold, tuple(ExpectedUse(1 - share) for share in point.layer_sparsity)
    if threshold is not None:
        if isinstance(threshold, bool) or not isinstance(threshold, int | float) or not 0 < threshold < 1:
            raise ValueError(f"lte_threshold must lie in (0, 1), got lte_threshold={threshold!r}")
        if threshold != config.threshold:
            return float(threshold), ()
    measured = expected_uses(getattr(hf_config, "lte_measurement", None), hf_config.num_hidden_layers)
    return config.threshold, tuple(use for use in measured if use is not None)
