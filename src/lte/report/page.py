"""Self-contained web pages: one file with its data, styles, scripts and plots, which loads nothing from anywhere.

A page can show what others wrote, a prompt say. It is data, never markup: it goes in as JSON that cannot close its
element, scripts put it on the page as text, and a content security policy lets no other script run.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
import zlib
from collections.abc import Sequence
from importlib.resources import files
from typing import Any

from lte.report.palette import style_sheet

MAX_TOKENS = 2000
"""Of a text on the inspector's page, unless another number is asked for."""

# In JSON these characters occur in strings alone, where they may be written as escapes.
_ESCAPES = {ord(character): f"\\u{ord(character):04x}" for character in "<>&\u2028\u2029"}

_PLACE = re.compile(r"(?<![\w.~…/<])(?:~|[A-Za-z]:)?/(?:[^\s/'\"<>:;,|]+/)+")


def render_page(
    title: str, body: str, data: Any, scripts: Sequence[str], *, styles: Sequence[str] = (), connects: bool = False
) -> str:
    """A page as one HTML text.

    Scripts run in their order after ECharts (`echarts`) and the shell (`Shell`: see `assets/shell.js`), each in strict
    mode, and find the data as `Shell.data`.

    Args:
        title: of the page, any text.
        body: trusted HTML of the main part.
        data: what JSON can hold; not-a-number is refused.
        scripts: file names in `assets`.
        styles: file names in `assets`, after the palette and `shell.css`.
        connects: whether the page may send requests to the server that it came from.

    Raises:
        ValueError: for a number in `data` that is not finite, or a script that would end its own element.
    """
    style = style_sheet() + "".join(map(read_asset, ("shell.css", *styles)))
    sources = {name: read_asset(name) for name in ("echarts.min.js", "shell.js", *scripts)}
    for name, source in sources.items():
        if "</script" in source.lower():
            raise ValueError(f"{name} must not hold </script, got a script that would end its element; escape it")
    connections = "'self'" if connects else "'none'"
    hashes = " ".join(map(_source_hash, sources.values()))
    return read_asset("shell.html").format(
        # It runs these scripts and loads nothing.
        policy=f"default-src 'none'; script-src {hashes}; style-src {_source_hash(style)}; img-src data:; "
        f"connect-src {connections}; base-uri 'none'; form-action 'none'",
        title=html.escape(title),
        style=style,
        body=body,
        data=embed_json(data),
        scripts="\n".join(f"<script>{source}</script>" for source in sources.values()),
    )


def read_asset(name: str) -> str:
    """The text of a file that pages are made of."""
    return files("lte.report").joinpath("assets", name).read_text(encoding="utf-8")


def embed_json(data: Any) -> str:
    """JSON that is safe inside a `<script>` element, whatever strings it holds.

    Raises:
        ValueError: for a number that is not finite.
    """
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    # A lone surrogate is no text that UTF-8 could hold.
    return text.translate(_ESCAPES).encode("utf-8", "replace").decode("utf-8")


def without_places(value: Any) -> Any:
    """JSON's values without the folders of absolute paths, which say where somebody's files are: `…/model.gguf`."""
    if isinstance(value, str):
        return _PLACE.sub("…/", value)
    if isinstance(value, list):
        return [without_places(each) for each in value]
    if isinstance(value, dict):
        return {without_places(name): without_places(each) for name, each in value.items()}
    return value


def _source_hash(source: str) -> str:
    return f"'sha256-{pack_base64(hashlib.sha256(source.encode()).digest())}'"


def pack_json(data: Any) -> str:
    """JSON deflated, for what is large and not needed at once: `Shell.unpack` reads it.

    Raises:
        ValueError: for a number that is not finite.
    """
    return pack_base64(zlib.compress(embed_json(data).encode("utf-8"), 9))


def pack_base64(values: bytes) -> str:
    """Bytes as a page's JSON holds them."""
    return base64.b64encode(values).decode("ascii")
