"""The layers of the package: a file imports only from its own layer and lower ones."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import lte

ROOT = Path(lte.__file__).parent
RANKS = {
    "files": -1,
    "progress": -1,
    "config": 0,
    "settings": 0,
    "records": 0,
    "ops": 1,
    "nn": 2,
    "hf": 3,
    "data": 4,
    "methods": 5,
    "vllm": 5,
}
RANKS |= {"launch": 6, "train": 6, "eval": 7, "bench": 8, "runs": 9, "report": 9, "cli": 10, "__main__": 11}
FILES = sorted(path for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py")


def layer_of(path: Path) -> str:
    return path.relative_to(ROOT).with_suffix("").parts[0]


def imported_layers(tree: ast.AST, package: tuple[str, ...]) -> Iterator[str]:
    """The layers that a module of `package` (its names below lte) imports, function bodies included."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ["lte", *package[: len(package) + 1 - node.level]] if node.level else []
            stem = [*base, *(node.module.split(".") if node.module else [])]
            names = [[*stem, alias.name] for alias in node.names]
        else:
            continue
        for name in names:
            if name[0] == "lte" and name[1:] != ["__version__"]:
                # `import lte` and `from lte import sparsify_` reach what the top level exports, up to eval.
                yield name[1] if len(name) > 1 and name[1] in RANKS else "eval"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_downwards(path: Path) -> None:
    layer = layer_of(path)
    assert layer in RANKS, f"{path} lies in no layer; add it to RANKS"
    package = path.relative_to(ROOT).parts[:-1]
    for target in imported_layers(ast.parse(path.read_text(encoding="utf-8")), package):
        lower = RANKS[target] < RANKS[layer]
        assert lower or target == layer, f"{layer} must not import from {target}"


def test_the_check_sees_all_forms_of_import() -> None:
    code = "import lte.cli\nfrom lte.train import x\nfrom lte import eval\n"
    code += "from ..ops import y\nfrom . import z\n"
    code += "def f():\n    from lte import sparsify_\nfrom lte import __version__\nimport torch\n"
    found = list(imported_layers(ast.parse(code), ("nn",)))
    assert sorted(found) == sorted(["cli", "train", "eval", "ops", "nn", "eval"])
