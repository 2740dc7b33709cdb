"""What each colour means, in every picture: the pages in their two themes, and PNG figures, which have the light one.

Nothing but LTE is blue. Every known method has a colour of its own; other names take one of the others by their order.
"""

from __future__ import annotations

from collections.abc import Iterable

# Light and dark: on their paper each has a contrast of at least 3, those of text 4.5.
COLOURS: dict[str, tuple[str, str]] = {
    # The page itself.
    "paper": ("#ffffff", "#16181c"),
    "panel": ("#f6f7f9", "#1f2228"),
    "ink": ("#1b1d21", "#eceef2"),
    "quiet": ("#555b66", "#a9b0bc"),
    "line": ("#c9ced6", "#444a55"),
    "link": ("#005a9c", "#7cc4f8"),
    "mark": ("#c2005f", "#ff5cad"),
    "problem": ("#a32100", "#ff9b80"),
    "second": ("#b34e00", "#e69f00"),
    # Neurons: computed or skipped; more or less of them than is usual.
    "on": ("#5b4bb7", "#a99cf0"),
    "off": ("#e3e6ea", "#343942"),
    "usual": ("#c3bdea", "#4b4577"),
    "more": ("#5b4bb7", "#a99cf0"),
    "less": ("#9a6c00", "#f0c04a"),
    # A goal that is met or missed.
    "good": ("#00735a", "#2fc597"),
    "bad": ("#b34e00", "#f08a4b"),
    # Models.
    "lte": ("#0072b2", "#5aa9e6"),
    "dense": ("#555b66", "#a9b0bc"),
    "static_pruning": ("#c24a00", "#f08a4b"),
    "wanda": ("#b04a8b", "#e39cc5"),
    "teal": ("#1f7f8c", "#62cbd8"),
    "wina": ("#2e7d32", "#74c97a"),
    "cats": ("#9a6c00", "#f0c04a"),
    "kla": ("#6a51a3", "#b8a4ec"),
    "moefication": ("#a8123e", "#ff8fa6"),
    "deja_vu": ("#66740a", "#c3d34a"),
    "sigma_moe": ("#7a4a21", "#d1a37a"),
    "noisy_topk": ("#8b1f8f", "#e58be8"),
    "random_router": ("#4f6b5a", "#9dbfa9"),
}
OTHERS = ("static_pruning", "wina", "wanda", "cats", "kla", "teal", "moefication", "sigma_moe", "deja_vu", "noisy_topk")
"""For names that have no colour of their own."""
# Cividis rises evenly in lightness, also for colour-blind eyes. More is darker on white, and lighter on black.
_RAMP = ("#00224e", "#123570", "#3b496c", "#575d6d", "#707173", "#8a8678", "#a59c74", "#c3b369", "#e1cc55", "#fee838")
RAMP = [*zip(reversed(_RAMP), _RAMP, strict=True)]
"""From little to much, in steps."""


def light(name: str) -> str:
    """A colour by what it means, in the light theme."""
    return COLOURS[name][0]


def colour_names(names: Iterable[str]) -> dict[str, str]:
    """What colour each method or curve has, as a name in `COLOURS`.

    Args:
        names: of all curves of all figures that shall agree. `lte masked` and `lte, name=a` are LTE.
    """
    found, others = {}, 0
    for name in sorted(set(names)):
        stem = name.replace(",", " ").split(" ")[0]
        if name not in COLOURS and stem not in ("lte", "dense"):
            found[name] = OTHERS[others % len(OTHERS)]
            others += 1
        else:
            found[name] = name if name in COLOURS else stem
    return found


def style_sheet() -> str:
    """The colours as custom properties of a page: `--lte`, `--ramp-0` to `--ramp-9`."""
    shades = {**COLOURS, **{f"ramp-{place}": pair for place, pair in enumerate(RAMP)}}
    lines = (f"  --{name}: light-dark({day}, {night});" for name, (day, night) in shades.items())
    return "\n".join([":root {", "  color-scheme: light dark;", *lines, "}", ""])
