"""Links of the documents lead somewhere, their commands can be called, and nothing is left out of the index."""

from __future__ import annotations

import re
import shlex
import tomllib
from pathlib import Path

import pdoc
import pytest
import typer.cli
from typer.testing import CliRunner

import lte
from lte_cli import COMMANDS, load_command

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "experiments").rglob("*.md")])
LINK = re.compile(r"\]\(([^)\s]+)\)")


def anchors(document: Path) -> set[str]:
    """The anchors of a document's headings, as GitHub makes them."""
    text = re.sub(r"```.*?```", "", document.read_text(encoding="utf-8"), flags=re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(document: Path) -> None:
    for link in LINK.findall(document.read_text(encoding="utf-8")):
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = (document.parent / name).resolve() if name else document
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target), link


def commands_of(document: Path) -> list[list[str]]:
    """The arguments of every `lte` command in the bash blocks of a page, or in the comments of a settings file."""
    text = document.read_text(encoding="utf-8")
    if document.suffix == ".yaml":
        text = "\n".join(re.findall(r"^#   (lte .*)$", text, re.MULTILINE))
    else:
        text = "\n".join(re.findall(r"```bash\n(.*?)```", text, flags=re.DOTALL))
    lines = text.replace("\\\n", " ").splitlines()
    found = [re.sub(r"^.*; do (?:\w+=\S+ )?|\s&\s.*$", "", line.strip()) for line in lines]
    return [shlex.split(line, comments=True)[1:] for line in found if line.startswith("lte ")]


# The diary's commands are those of its time.
CURRENT = [page for page in DOCUMENTS if page.parent.name not in ("history", "paper")]
SETTINGS = sorted((ROOT / "experiments").rglob("*.yaml"))


@pytest.mark.parametrize("document", [*CURRENT, *SETTINGS], ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_have_known_flags_and_files(document: Path) -> None:
    for name, *arguments in commands_of(document):
        if name.startswith("-"):
            continue
        context = load_command(name).make_context(name, [*arguments])
        assert not context.args
    for name, rest in re.findall(rf"`lte ({'|'.join(COMMANDS)}) ([^`]*)`", document.read_text(encoding="utf-8")):
        known = {flag for one in load_command(name).params for flag in (*one.opts, *one.secondary_opts)}
        assert set(re.findall(r"(?<!\S)--[\w-]+", rest)) <= known, rest
    for path in re.findall(
        r"(?:experiments|benchmarks)/[\w/]+\.(?:py|sh|yaml)\b", document.read_text(encoding="utf-8")
    ):
        assert (ROOT / path).exists(), path


@pytest.mark.parametrize("document", CURRENT, ids=lambda path: str(path.relative_to(ROOT)))
def test_names_that_pages_import_exist(document: Path) -> None:
    blocks = "\n".join(re.findall(r"```python\n(.*?)```", document.read_text(encoding="utf-8"), flags=re.DOTALL))
    for line in re.findall(r"^from lte\S* import .*$", blocks, re.MULTILINE):
        exec(line, {})
    for name in re.findall(r"\blte\.(\w+)\(", blocks):
        assert hasattr(lte, name), name


def test_the_index_leads_to_every_page() -> None:
    index = ROOT / "docs" / "index.md"
    linked = {(index.parent / link.partition("#")[0]).resolve() for link in LINK.findall(index.read_text())}
    pages = {page for page in (ROOT / "docs").rglob("*.md") if page != index and page.parent.name != "images"}
    assert pages <= linked, sorted(page.name for page in pages - linked)


def test_the_reference_of_the_command_line_is_current() -> None:
    arguments = ["lte.cli.reference", "utils", "docs", "--name", "lte", "--title", "Command line"]
    result = CliRunner().invoke(typer.cli.app, arguments)
    assert result.exit_code == 0, result.output
    committed = (ROOT / "docs" / "cli.md").read_text()
    assert committed.rstrip() == result.output.rstrip(), "run `make docs` and commit docs/cli.md"


@pytest.mark.filterwarnings("error::UserWarning")
def test_the_reference_of_the_library_is_built_without_a_warning(tmp_path: Path) -> None:
    # As `from lte import *` in `make docs`: some are loaded when they are asked for.
    assert all(hasattr(lte, name) for name in lte.__all__)
    pdoc.render.configure(docformat="google")
    pdoc.pdoc("lte", output_directory=tmp_path)
    page = (tmp_path / "lte.html").read_text()
    assert all(f'id="{name}"' in page for name in lte.__all__ if name != "methods")


def test_the_version_is_the_same_everywhere() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert lte.__version__ == project
    released = project.partition(".dev")[0]
    assert f"\nversion: {released}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"## [{released}]" in (ROOT / "CHANGELOG.md").read_text()
