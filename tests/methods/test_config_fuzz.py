"""Settings of methods from any JSON: a config, or a `ValueError`; never another error."""

from __future__ import annotations

import json
from dataclasses import fields
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from lte.config import CONFIG_VERSION, current_settings
from lte.methods import METHODS

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
NEAR = st.sampled_from([0, 1, -1, 2**63, 10**400, 0.5, 1.0, -0.0, 1e308, "kmeans", "random", "ffn", "2:4", "", None])


@pytest.mark.parametrize("name", METHODS)
@hypothesis_settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_values(name: str, data: st.DataObject) -> None:
    config_class = METHODS[name].config
    known = [field.name for field in fields(config_class)]
    values: Any = data.draw(st.dictionaries(st.sampled_from(known) | st.text(max_size=8), JSON | NEAR, max_size=4))
    version = data.draw(st.sampled_from([1, CONFIG_VERSION]) | JSON)
    found = {"name": name, "version": version, **values}
    try:
        config = config_class.from_dict(found)
    except ValueError as error:
        assert str(error)  # noqa: PT017 - either outcome is right
        return
    again = config_class.from_dict(json.loads(json.dumps(config.to_dict(), allow_nan=False)))
    assert again == config
    assert {key: config.to_dict()[key] for key in values} == values


@hypothesis_settings(max_examples=200, deadline=None, derandomize=True)
@given(found=JSON)
def test_anything_in_place_of_settings(found: Any) -> None:
    with pytest.raises(ValueError, match=r"config\.lte must hold the settings|version must be a whole number"):
        current_settings(found)
