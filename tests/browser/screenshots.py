"""Draws the pictures of both pages in three widths and two themes: `python -m tests.browser.screenshots docs/images/`.

`report` or `inspector` after the folder draws one page alone. The report is of the result files of `--results`, the
committed ones where it is left out; the inspector shows the model of `--model`, a folder that `lte train` wrote, and
without it one that was not trained (`untrained.py`). The same input gives the same pictures, byte for byte.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

from PIL import Image

from lte.cli.inspection import load_inspected_model
from lte.hf.dense import load_tokenizer
from lte.report.curves import curve_name, curve_name_by
from lte.report.inputs import load_inputs
from lte.report.inspector import Inspector, NamedText, inspector_data, inspector_page
from lte.report.points import find_tradeoffs
from lte.report.report_page import write_html_report
from tests.browser.chromium import chromium, find_chromium, save_screenshot
from tests.browser.untrained import sparse_smollm2

STORY = """The river rises in the hills above the town, where the winters are long and the snow stays until April. \
In 1874 a mill was built at the second bend, and for forty years it ground all the wheat of the valley. "It never \
stopped," wrote the miller's daughter, "not even on the day the bridge fell."

Today the mill is a museum. Children push the great wheel by hand, and the café is open from May to September."""
RESULTS = Path(__file__).parents[2] / "results"
PAGES = ("report", "inspector")
# Widths, and how much of a page is kept, in CSS pixels: as far as the first picture of its data.
HEIGHTS = {390: 1900, 800: 1480, 1440: 1460}
THEMES = ("light", "dark")
MAX_BYTES = 128 * 1024


def write_report(folder: Path, results: Sequence[Path], by: Sequence[str]) -> Path:
    """The page of `lte report`."""
    inputs = load_inputs(results)
    curve = curve_name_by(by, inputs.records) if by else curve_name
    return write_html_report(folder / "report.html", find_tradeoffs(inputs.records, curve=curve), inputs.benches)


def write_inspectors(folder: Path, model: str | None) -> tuple[Path, Path]:
    """The inspector's page of one text, and of two."""
    if model is None:
        inspector = Inspector(*sparse_smollm2(), name="SmolLM2-135M")
    else:
        loaded = load_inspected_model(model, "float32", "off")
        inspector = Inspector(loaded, load_tokenizer(model), name=Path(model).resolve().name)
    texts = {"mill.txt": STORY, "road.txt": STORY.replace("river", "road").replace("wheat", "gold")}
    runs = [inspector.run(NamedText(name, text)) for name, text in texts.items()]
    pages = folder / "inspector.html", folder / "two_texts.html"
    for page, shown in zip(pages, (runs[:1], runs), strict=True):
        page.write_text(inspector_page(inspector_data(shown)), encoding="utf-8")
    return pages


def take(browser: Any, page: Path, picture: Path, width: int, theme: str, height: int | None = None) -> None:
    """One picture of a page, down to a height."""
    browser.get(page.as_uri())
    save_screenshot(browser, picture, width, theme == "dark")
    shrink(picture, height or HEIGHTS[width])
    size = picture.stat().st_size
    print(f"{picture}: {size / 1024:.0f} KiB{', more than intended' if size > MAX_BYTES else ''}")


def shrink(path: Path, height: int) -> None:
    """Keeps the upper part of a picture, in 256 colours."""
    with Image.open(path) as image:
        cut = image.convert("RGB").crop((0, 0, image.width, min(image.height, height)))
    cut.quantize(256, Image.Quantize.MAXCOVERAGE, kmeans=2, dither=Image.Dither.NONE).save(path, optimize=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """Writes the pictures into a folder."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path, nargs="?", default=Path("docs/images"))
    parser.add_argument("pages", nargs="*", metavar="page", help="report or inspector; both where it is left out")
    parser.add_argument("--model", help="folder of a trained LTE model for the inspector")
    parser.add_argument("--results", type=Path, nargs="+", default=[RESULTS])
    parser.add_argument("--by", nargs="*", default=[], help="as of `lte report`: fields that tell curves apart")
    given = parser.parse_args(arguments)
    if unknown := set(given.pages) - set(PAGES):
        parser.error(f"page must be one of {', '.join(PAGES)}, got {', '.join(sorted(unknown))}")
    found = find_chromium()
    if found is None:
        parser.error("the pictures need Chromium: apt-get install chromium chromium-driver")
    wanted = given.pages or PAGES
    with tempfile.TemporaryDirectory() as folder, chromium(*found) as browser:
        pages = {}
        if "report" in wanted:
            pages["report"] = write_report(Path(folder), given.results, given.by)
            # What the README shows.
            take(browser, pages["report"], given.folder / "report.png", 960, "light", 600)
        if "inspector" in wanted:
            pages["inspector"], two_texts = write_inspectors(Path(folder), given.model)
            take(browser, two_texts, given.folder / "inspector_two_texts.png", 1440, "light", 1200)
            # What the README shows.
            take(browser, pages["inspector"], given.folder / "inspector.png", 1000, "light", 600)
        for (name, page), width, theme in product(pages.items(), HEIGHTS, THEMES):
            take(browser, page, given.folder / f"{name}_{width}_{theme}.png", width, theme)


if __name__ == "__main__":
    main()
