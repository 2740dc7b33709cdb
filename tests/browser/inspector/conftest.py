"""The inspector's page on tiny models."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from selenium.webdriver import Chrome

from lte.report.inspector import Inspector, NamedText, inspector_data, inspector_page
from lte.report.inspector_server import InspectorServer
from tests.browser.inspector.page import open_page
from tests.report.inspected import NASTY, PLAIN, byte_level_tokenizer, sparse_model

# Enough that the map has to be moved.
LONG = NASTY + PLAIN * 6


@pytest.fixture(scope="session")
def inspector(tmp_path_factory: pytest.TempPathFactory) -> Inspector:
    """Of a tiny model, with a reference text of its own."""
    tokenizer = byte_level_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    return Inspector(sparse_model(), tokenizer, "tiny", reference=NamedText("book.txt", PLAIN))


@pytest.fixture(scope="session")
def run(inspector: Inspector) -> dict[str, Any]:
    """What the page of one text is made of."""
    return inspector.run(NamedText("<i>text</i>.txt", LONG))


@pytest.fixture(scope="session")
def pages(run: dict[str, Any], inspector: Inspector, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Addresses of pages: `one` text; `two` texts; two `models` on one text."""
    other = inspector.run(NamedText("other.txt", PLAIN))
    second = Inspector(sparse_model(seed=1), inspector.tokenizer, "second").run(NamedText("text.txt", LONG))
    folder = tmp_path_factory.mktemp("pages")
    found = {}
    for name, runs in {"one": [run], "two": [run, other], "models": [run, second]}.items():
        path = folder / f"{name}.html"
        path.write_text(inspector_page(inspector_data(runs)), encoding="utf-8")
        found[name] = path.as_uri()
    return found


@pytest.fixture
def serve(inspector: Inspector) -> Iterator[Callable[[], str]]:
    """Starts the server and tells its address."""
    with InspectorServer(inspector) as server:
        thread = threading.Thread(target=server.serve_forever)

        def start() -> str:
            thread.start()
            return server.url

        yield start
        server.shutdown()
        thread.join(10)


@pytest.fixture
def screenshots(tmp_path: Path) -> Path:
    """Where screenshots go."""
    return tmp_path / "screenshots"


@pytest.fixture
def page(browser: Chrome, pages: dict[str, str]) -> Chrome:
    open_page(browser, pages["one"])
    return browser
