"""The sdist and the wheel that is built from it: complete, and enough to train in an environment without the source."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cli.conftest import SHORT, save_tiny_model

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "lte"
# What a checkout holds and no distribution is built from.
NOT_BUILT_FROM = (".*", "results", "build", "dist", "*.egg-info", "__pycache__", "demo-output", "images")


def run(*command: str | Path, folder: Path) -> str:
    """What a command prints, with no way back to the source tree."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, cwd=folder, env=clean)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the sdist and of the wheel made from it."""
    folder = tmp_path_factory.mktemp("built")
    shutil.copytree(ROOT, folder / "source", ignore=shutil.ignore_patterns(*NOT_BUILT_FROM))
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", folder / "dist", folder / "source"]
    run(*command, folder=folder)
    return folder / "dist"


@pytest.fixture(scope="module")
def environment(built: Path) -> Iterator[Path]:
    """An environment with the wheel installed and what it depends on lent by this one, without the source."""
    folder = built.parent / "environment"
    venv.create(folder, with_pip=False, symlinks=True)
    python = folder / "bin" / "python"
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", folder=folder).strip())
    # A path from a .pth file brings no .pth files of its own, so this one's editable lte stays out.
    lent = [path for path in sys.path if path.endswith("site-packages")]
    (site / "dependencies.pth").write_text("\n".join(lent) + "\n")
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "--python", python]
    run(*pip, "install", "--no-deps", "--ignore-installed", "--no-index", *built.glob("*.whl"), folder=folder)
    shutil.rmtree(built.parent / "source")
    yield folder
    shutil.rmtree(folder)


def package_files() -> set[str]:
    """All files of the package, below `src`."""
    files = [path for path in PACKAGE.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    return {str(path.relative_to(PACKAGE.parent)) for path in files}


def test_both_hold_every_file_of_the_package(built: Path) -> None:
    (wheel,), (sdist,) = built.glob("*.whl"), built.glob("*.tar.gz")
    in_wheel = set(zipfile.ZipFile(wheel).namelist())
    with tarfile.open(sdist) as archive:
        in_sdist = {name.partition("/")[2] for name in archive.getnames()}
    assert package_files() <= in_wheel
    assert {f"src/{name}" for name in package_files()} <= in_sdist
    assert any(name.endswith("licenses/LICENSE") for name in in_wheel)
    assert {"LICENSE", "README.md", "CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md", "docs/index.md"} <= in_sdist
    # The package alone is installed: no test, no script of the repository.
    assert not [name for name in in_wheel if name.startswith(("tests/", "experiments/", "benchmarks/", "examples/"))]
    assert not [name for name in in_sdist if name.startswith(("tests/", "results/"))]


def test_the_wheel_alone_shows_its_help_and_imports(environment: Path) -> None:
    assert "train" in run(environment / "bin" / "lte", "--help", folder=environment)
    where = run(environment / "bin" / "python", "-c", "import lte; print(lte.__file__)", folder=environment)
    assert Path(where.strip()).is_relative_to(environment)


@pytest.mark.slow
def test_the_wheel_alone_trains_five_steps(environment: Path, tmp_path: Path) -> None:
    dense = save_tiny_model(tmp_path / "dense")
    steps = ["--stage1-steps", "3", "--stage2-steps", "2", "--save-steps", "10"]
    command = [environment / "bin" / "lte", "train", "--model", dense, "--output", tmp_path / "out", *SHORT, *steps]
    assert "measured" in run(*command, folder=tmp_path)
    program = (
        "import lte, transformers\n"
        "model = transformers.AutoModelForCausalLM.from_pretrained('out')\n"
        "print(len(lte.sparse_ffns(model)), 'sparse FFNs')\n"
    )
    assert "2 sparse FFNs" in run(environment / "bin" / "python", "-c", program, folder=tmp_path)


def test_no_message_names_a_package_of_ours() -> None:
    """No package index has lte, so `pip install lte` would install something else, or nothing."""
    texts = {path: path.read_text() for path in PACKAGE.rglob("*.py")}
    assert not [path for path, text in texts.items() if re.search(r"pip install[^\n`]*[ '\"]lte\b", text)]
