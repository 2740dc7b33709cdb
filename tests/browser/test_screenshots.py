"""The pictures in docs/images are those that the command makes, and each page of them is shown."""

from __future__ import annotations

import re
from itertools import product
from pathlib import Path

import pytest
from PIL import Image
from selenium.webdriver import Chrome

from tests.browser import screenshots
from tests.browser.screenshots import HEIGHTS, MAX_BYTES, PAGES, THEMES
from tests.report.inspected import save_sparse_model

IMAGES = Path(__file__).parents[2] / "docs" / "images"
NAMES = [f"{page}_{width}_{theme}.png" for page, width, theme in product(PAGES, HEIGHTS, THEMES)]


@pytest.mark.parametrize("name", NAMES)
def test_each_committed_picture_has_its_width_and_theme(name: str) -> None:
    _, width, theme = name.removesuffix(".png").split("_")
    path = IMAGES / name
    assert path.stat().st_size <= MAX_BYTES
    with Image.open(path) as image:
        assert image.width == int(width)
        assert image.height <= HEIGHTS[image.width]
        red, green, blue = image.convert("RGB").getpixel((2, 2))
        assert (red + green + blue < 200) == (theme == "dark")


def test_the_page_of_pictures_shows_them_all() -> None:
    shown = re.findall(r"!\[[^]]*]\(([^)]+)\)", (IMAGES / "README.md").read_text())
    assert sorted(shown) == sorted(NAMES)


def test_the_command_refuses_another_page(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        screenshots.main(["somewhere", "raport"])
    assert "page must be one of report, inspector, got raport" in capsys.readouterr().err


def test_a_model_of_ones_own_gives_the_same_picture_again(started: Chrome, tmp_path: Path) -> None:
    pictures = []
    for name in ("first", "second"):
        folder = tmp_path / name
        folder.mkdir()
        page, two_texts = screenshots.write_inspectors(folder, str(save_sparse_model(tmp_path / "my-model")))
        assert "my-model" in page.read_text(encoding="utf-8")
        assert "road.txt" in two_texts.read_text(encoding="utf-8")
        screenshots.take(started, page, folder / "page.png", 390, "dark")
        pictures.append((folder / "page.png").read_bytes())
    assert pictures[0] == pictures[1]
