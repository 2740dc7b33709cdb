"""LteConfig: validation, and the dict that a saved folder holds."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from lte.config import CONFIG_VERSION, LteConfig, check_choice, check_fraction


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("target_sparsity", -0.1, r"target_sparsity must lie in \[0, 1\), got target_sparsity=-0.1"),
        ("target_sparsity", 1.0, r"target_sparsity must lie in \[0, 1\), got target_sparsity=1.0"),
        ("target_sparsity", math.nan, "target_sparsity must be a finite number, got target_sparsity=nan"),
        ("expert_size", 0, "expert_size must be at least 1, got expert_size=0"),
        ("router_rank", 0, "router_rank must be at least 1 or None, got router_rank=0"),
        ("threshold", 0.0, r"threshold must lie in \(0, 1\), got threshold=0.0"),
        ("threshold", 1.0, r"threshold must lie in \(0, 1\), got threshold=1.0"),
        ("threshold", math.nan, "threshold must be a finite number, got threshold=nan"),
        ("grouping", "kmean", r"grouping must be one of .*, got grouping='kmean' \(did you mean kmeans\?\)"),
        ("grouping", "xyz", r"grouping must be one of kmeans, .*, got grouping='xyz'$"),
    ],
)
def test_bad_values_are_refused(field: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LteConfig(**{field: value})


def test_limits_are_accepted() -> None:
    LteConfig(target_sparsity=0.0, expert_size=1, router_rank=1, threshold=0.9).check_new()


def test_only_trained_routers_may_have_a_threshold_above_their_first_scores() -> None:
    config = LteConfig(threshold=0.96)
    assert LteConfig.from_dict(config.to_dict()) == config
    with pytest.raises(ValueError, match=r"threshold must lie in \(0, 0.9\] for new routers, got threshold=0.96"):
        config.check_new()


def test_dict_round_trip_through_json() -> None:
    config = LteConfig(target_sparsity=0.8, expert_size=16, grouping="random", router_rank=4, threshold=0.4, seed=7)
    data = json.loads(json.dumps(config.to_dict()))
    assert data["version"] == CONFIG_VERSION
    assert LteConfig.from_dict(data) == config


def test_from_dict_leaves_its_argument_alone() -> None:
    data = LteConfig().to_dict()
    LteConfig.from_dict(data)
    assert data == LteConfig().to_dict()


def test_newer_version_is_refused() -> None:
    data = {**LteConfig().to_dict(), "version": CONFIG_VERSION + 1, "new_field": 1}
    with pytest.raises(ValueError, match=r"saved by a newer lte.*Install that newer lte"):
        LteConfig.from_dict(data)


@pytest.mark.parametrize("version", [None, "1", 0, 1.5])
def test_version_must_be_a_whole_number(version: object) -> None:
    with pytest.raises(ValueError, match="version must be a whole number from 1"):
        LteConfig.from_dict({**LteConfig().to_dict(), "version": version})


def test_unknown_fields_are_refused() -> None:
    with pytest.raises(ValueError, match="known fields only, got a_field, b_field"):
        LteConfig.from_dict({**LteConfig().to_dict(), "b_field": 1, "a_field": 1})


def test_values_from_a_dict_are_validated() -> None:
    with pytest.raises(ValueError, match="expert_size must be at least 1"):
        LteConfig.from_dict({**LteConfig().to_dict(), "expert_size": 0})


def test_check_fraction_takes_one_only_if_closed() -> None:
    check_fraction("share", 1.0, upper_closed=True)
    with pytest.raises(ValueError, match=r"share must lie in \[0, 1\], got share=1.01"):
        check_fraction("share", 1.01, upper_closed=True)


def test_check_choice_names_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"did you mean straight_through\?"):
        check_choice("mode", "straightthrough", ("dense", "soft", "straight_through", "hard"))
