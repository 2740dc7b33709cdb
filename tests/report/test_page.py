"""Pages are one file that runs its own scripts alone, whatever text their data holds."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import zlib
from html.parser import HTMLParser
from typing import Any

import pytest

from lte.report import page
from lte.report.page import embed_json, pack_json, read_asset, render_page

NASTY = "</script><script>alert(1)</script> <!-- &amp; \u2028 \u2029 'x' 😀 \x00"


class Elements(HTMLParser):
    """Start tags with their attributes, and the text of scripts and styles."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.content: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.content.append("")

    def handle_data(self, data: str) -> None:
        if self.content and self.cdata_elem:
            self.content[-1] += data

    def of(self, tag: str) -> list[tuple[dict[str, str | None], str]]:
        pairs = zip(self.tags, self.content, strict=True)
        return [(attributes, content) for (name, attributes), content in pairs if name == tag]


def policy_of(elements: Elements) -> dict[str, list[str]]:
    content = next(a["content"] for a, _ in elements.of("meta") if a.get("http-equiv") == "Content-Security-Policy")
    assert content is not None
    return {words[0]: words[1:] for words in (part.split() for part in content.split(";"))}


def test_data_stays_data() -> None:
    text = render_page("t", "", {"prompt": NASTY, NASTY: [1]}, ["inspector.js"])
    scripts = Elements(text).of("script")
    assert len(scripts) == 4
    assert scripts[0][0] == {"type": "application/json", "id": "page-data"}
    assert json.loads(scripts[0][1]) == {"prompt": NASTY, NASTY: [1]}
    assert not re.search(r"[<>&\u2028\u2029]", scripts[0][1])


def test_a_title_is_text() -> None:
    text = render_page("<b>a & b</b>", "", {}, [])
    assert "<b>" not in text
    assert text.count("&lt;b&gt;a &amp; b&lt;/b&gt;") == 2


def test_numbers_that_json_does_not_have_and_broken_text() -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        embed_json({"loss": float("nan")})
    assert json.loads(embed_json("a\ud800b")) == "a?b"


def test_packed_data_is_the_same_data() -> None:
    packed = pack_json({"prompt": NASTY})
    assert json.loads(zlib.decompress(base64.b64decode(packed))) == {"prompt": NASTY}
    with pytest.raises(ValueError, match="not JSON compliant"):
        pack_json([float("inf")])


@pytest.mark.parametrize("connects", [False, True])
def test_the_policy_runs_what_is_there_and_nothing_else(connects: bool) -> None:
    elements = Elements(render_page("t", "", {}, ["inspector.js"], connects=connects))
    policy = policy_of(elements)

    def source_hash(source: str) -> str:
        return f"'sha256-{base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()}'"

    run = [source_hash(content) for attributes, content in elements.of("script") if "type" not in attributes]
    assert policy["script-src"] == run
    assert policy["style-src"] == [source_hash(content) for _, content in elements.of("style")]
    assert policy["default-src"] == policy["base-uri"] == policy["form-action"] == ["'none'"]
    assert policy["connect-src"] == ["'self'" if connects else "'none'"]
    assert policy["img-src"] == ["data:"]


@pytest.mark.parametrize("name", ["inspector", "report"])
def test_nothing_is_loaded_from_elsewhere(name: str) -> None:
    text = render_page("t", read_asset(f"{name}.html"), {}, [f"{name}.js"])
    for tag, attributes in Elements(text).tags:
        for attribute in ("src", "href", "action", "data", "srcset", "poster"):
            value = attributes.get(attribute) or ""
            assert value.startswith(("#", "data:")) or not value, (tag, value)


def test_a_script_that_would_end_its_element(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page, "read_asset", lambda name: "x = '</SCRIPT>'")
    with pytest.raises(ValueError, match=r"echarts.min.js must not hold </script"):
        render_page("t", "", {}, [])


def test_echarts_is_the_file_that_its_note_names() -> None:
    note: dict[str, Any] = dict(re.findall(r"^(\w+): (.*)$", read_asset("echarts.txt"), flags=re.MULTILINE))
    source = read_asset("echarts.min.js")
    assert hashlib.sha256(source.encode()).hexdigest() == note["sha256"]
    assert f'version="{note["version"]}"' in source
    assert "Apache License" in read_asset("echarts.LICENSE")
    assert "Apache ECharts" in read_asset("echarts.NOTICE")
