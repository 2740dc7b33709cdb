"""The inspector's page on tiny models."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from selenium.webdriver import Chrome

from lte.report.inspector import Inspector, NamedText, inspector_data, inspector_page
from lte.report.inspector_server import InspectorServer
from tests.browser.inspector.page import open_page
from tests.report.inspected import NASTY, PLAIN, byte_level_tokenizer, large_run, sparse_model

# Hebrew and a mark that turns the direction, a special token in writing, and enough for columns of several tokens.
LONG = NASTY + " \u05d0\u05d1\u05d2 \u202eabc\u202c </s>" + PLAIN * 3


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
def other(inspector: Inspector) -> dict[str, Any]:
    """Another text on the same model."""
    return inspector.run(NamedText("other.txt", PLAIN))


@pytest.fixture(scope="session")
def pages(
    run: dict[str, Any], other: dict[str, Any], inspector: Inspector, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, str]:
    """Addresses of pages: `one` text; `two` texts; two `models` on one text; a `single` token; an `encoder`;
    two models of other `shapes`."""
    second = Inspector(sparse_model(seed=1), inspector.tokenizer, "second").run(NamedText("text.txt", LONG))
    encoder = Inspector(sparse_model("bert"), inspector.tokenizer, "encoder").run(NamedText("text.txt", PLAIN))
    single = inspector.run(NamedText("a.txt", "a"))
    folder = tmp_path_factory.mktemp("pages")
    found = {}
    shown = {"one": [run], "two": [run, other], "models": [run, second], "single": [single], "encoder": [encoder]}
    shown["shapes"] = [run, large_run(run, 50, layers=3, experts=5)]
    for name, runs in shown.items():
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
def page(browser: Chrome, pages: dict[str, str]) -> Chrome:
    open_page(browser, pages["one"])
    return browser
