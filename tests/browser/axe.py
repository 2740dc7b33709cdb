"""What axe-core, an npm package that `make test` installs, finds wrong for people who cannot see or use a mouse."""

from __future__ import annotations

from pathlib import Path

import pytest
from selenium.webdriver import Chrome

SOURCE = Path(__file__).parents[2] / ".axe" / "node_modules" / "axe-core" / "axe.min.js"
RUN = """const done = arguments[0];
axe.run().then(({violations}) => done(violations.map(({id, impact, nodes}) =>
  [impact, `${id}: ${nodes.slice(0, 5).map(({html}) => html.slice(0, 120)).join(' | ')}`])), (error) => done(
  [['critical', String(error)]]))"""


def serious_findings(browser: Chrome) -> list[str]:
    """The serious and critical findings on the page that is open; the test is skipped without axe-core."""
    if not SOURCE.exists():
        pytest.skip("axe-core is not installed: make .axe/node_modules")
    browser.execute_script(SOURCE.read_text(encoding="utf-8"))
    return [text for impact, text in browser.execute_async_script(RUN) if impact in ("serious", "critical")]
