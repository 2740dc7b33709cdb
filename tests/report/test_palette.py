"""Colours that can be told from their paper, and that mean one thing."""

from __future__ import annotations

import pytest

from lte.report.page import render_page
from lte.report.palette import COLOURS, OTHERS, RAMP, colour_names

TEXT = ("ink", "quiet", "link", "mark", "problem", "second", "good", "bad")
# Surfaces, and lines between them.
SURFACES = ("paper", "panel", "line", "off", "usual")
MODELS = [name for name in COLOURS if name == "lte" or name in OTHERS or name in ("dense", "random_router")]


def luminance(colour: str) -> float:
    parts = [int(colour[start : start + 2], 16) / 255 for start in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    """WCAG's ratio of two colours."""
    low, high = sorted(map(luminance, (one, other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("theme", [0, 1], ids=["light", "dark"])
def test_every_colour_is_seen_on_paper_and_panel(theme: int) -> None:
    for name in set(COLOURS) - set(SURFACES):
        least = 4.5 if name in TEXT else 3
        for surface in ("paper", "panel"):
            found = contrast(COLOURS[name][theme], COLOURS[surface][theme])
            assert found >= least, (name, surface, found)


def test_every_model_has_a_colour_of_its_own() -> None:
    for theme in (0, 1):
        assert len({COLOURS[name][theme] for name in MODELS}) == len(MODELS)


def test_more_is_further_from_the_paper() -> None:
    for theme in (0, 1):
        steps = [contrast(pair[theme], COLOURS["paper"][theme]) for pair in RAMP]
        assert steps == sorted(steps)


def test_known_names_keep_their_colour_and_others_take_another() -> None:
    found = colour_names(["teal", "lte masked", "lte, name=a", "lte", "dense eager", "x", "y"])
    assert found == {
        **{"teal": "teal", "lte masked": "lte", "lte, name=a": "lte", "lte": "lte", "dense eager": "dense"},
        **{"x": OTHERS[0], "y": OTHERS[1]},
    }
    assert len(colour_names(map(str, range(30)))) == 30


def test_pages_hold_the_palette() -> None:
    page = render_page("t", "", {}, [], styles=("report.css",))
    assert f"--lte: light-dark({', '.join(COLOURS['lte'])});" in page
    assert ".sortable" in page
