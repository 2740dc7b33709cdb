"""What a deployment runs with, by the folder's config and what overrides it; no vLLM needed."""

from __future__ import annotations

import math
from typing import Any

import pytest
import transformers

from lte.ops.paths import ExpectedUse
from lte.vllm.settings import serve_settings
from tests.hf.test_sparsity_curve import curve
from tests.vllm.folders import NEURONS, served_model


@pytest.fixture
def config() -> Any:
    return served_model().config


def test_the_folders_own_settings(config: Any) -> None:
    config.lte["threshold"] = 0.3
    settings = serve_settings(config)
    assert (settings.num_neurons, settings.num_experts) == (NEURONS, NEURONS // 8)
    assert settings.threshold_logit == pytest.approx(math.log(0.3 / 0.7))
    assert (settings.weights, settings.sparsity, settings.use_of(0)) == ("native", None, None)


def test_measured_fractions_choose_the_kernels(config: Any) -> None:
    config.lte_measurement = {"sparsity": 0.6, "tokens": 9, "active_fraction": [0.3, 0.5]}
    settings = serve_settings(config)
    assert [settings.use_of(layer) for layer in range(3)] == [ExpectedUse(0.3), ExpectedUse(0.5), None]
    assert settings.sparsity == pytest.approx(0.6)
    config.lte_measurement["union_fraction"] = {"texts": {"4": [0.7, 0.9]}, "row": {"4": [0.6, 0.8]}}
    assert serve_settings(config).use_of(1) == ExpectedUse(0.5, ((4, 0.9),), ((4, 0.8),))


def test_another_threshold_makes_the_measured_fractions_void(config: Any) -> None:
    config.lte_measurement = {"sparsity": 0.6, "tokens": 9, "active_fraction": [0.3, 0.5]}
    config.lte_threshold = 0.5  # as it is
    assert serve_settings(config).use_of(0) == ExpectedUse(0.3)
    config.lte_threshold = 0.4
    assert (serve_settings(config).threshold, serve_settings(config).use_of(0)) == (0.4, None)


def test_fractions_of_another_number_of_layers_are_not_taken(config: Any) -> None:
    config.lte_measurement = {"sparsity": 0.6, "tokens": 9, "active_fraction": [0.3]}
    assert serve_settings(config).uses == ()


def test_a_point_of_the_curve(config: Any) -> None:
    config.lte_curve = curve().to_dict()
    config.lte_target_sparsity = 0.5
    settings = serve_settings(config)
    assert settings.sparsity == pytest.approx(0.5, abs=0.02)
    assert settings.threshold != config.lte["threshold"]


@pytest.mark.parametrize("threshold", [0, 1, -0.5, True, "0.5", math.nan])
def test_a_threshold_must_lie_between_0_and_1(config: Any, threshold: Any) -> None:
    config.lte_threshold = threshold
    with pytest.raises(ValueError, match=r"lte_threshold must lie in \(0, 1\), got lte_threshold="):
        serve_settings(config)


def test_a_dense_config_is_refused() -> None:
    with pytest.raises(ValueError, match=r"vLLM serves models of the method lte, got a folder of no method"):
        serve_settings(transformers.LlamaConfig())


def test_gpt2_has_its_neurons_by_default() -> None:
    model = served_model("gpt2")
    model.config.n_inner = None
    model.config.lte["expert_size"] = 32
    assert serve_settings(model.config).num_neurons == 4 * 64
