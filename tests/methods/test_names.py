"""No file but a method's own knows it by name: what a method can do stands in its `Method`."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import lte
from lte.methods import METHODS

ROOT = Path(lte.__file__).parent
# Files that may name methods, and why.
EXCEPTIONS = {
    "report/palette.py": "fixed colours of curves, which must not change when a method is added",
    "report/points.py": "the report tells ours from all others in committed records, of methods or not",
}
FILES = sorted(path.relative_to(ROOT) for path in ROOT.rglob("*.py"))
SEQUENCES = (ast.Tuple, ast.List, ast.Set)
CHECKED = [path for path in FILES if path.parts[0] != "methods" and path.as_posix() not in EXCEPTIONS]


def branches_on_names(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Lines that compare with the name of a method, or list some to look one up in."""
    for node in ast.walk(tree):
        parts: list[ast.expr] = []
        if isinstance(node, ast.Compare):
            for part in (node.left, *node.comparators):
                parts += part.elts if isinstance(part, SEQUENCES) else [part]
        elif isinstance(node, SEQUENCES):
            named = {part.value for part in node.elts if isinstance(part, ast.Constant)}
            # The name of the package is that of a method, too.
            parts = node.elts if named & ({*METHODS, "dense"} - {"lte"}) else []
        elif isinstance(node, ast.MatchValue):
            parts = [node.value]
        for part in parts:
            if isinstance(part, ast.Constant) and part.value in METHODS:
                yield node.lineno, str(part.value)


@pytest.mark.parametrize("path", CHECKED, ids=lambda path: path.as_posix())
def test_no_file_branches_on_the_name_of_a_method(path: Path) -> None:
    found = list(branches_on_names(ast.parse((ROOT / path).read_text())))
    assert not found, f"{path} branches on names of methods, {found}; put what differs into the method's `Method`"


def test_a_method_is_named_in_its_own_file_alone() -> None:
    for path in FILES:
        if path.parts[0] == "methods":
            others = set(METHODS) - {path.stem}
            found = {name for _, name in branches_on_names(ast.parse((ROOT / path).read_text()))}
            assert not found & others, path


def test_the_check_sees_all_forms() -> None:
    code = 'a == "cats"\n"teal" != b\nc in ("lte", "x")\nD = ["wanda"]\nmatch e:\n    case "kla":\n        pass\n'
    found = [name for _, name in branches_on_names(ast.parse(code))]
    assert sorted(found) == ["cats", "kla", "lte", "teal", "wanda"]
    assert not list(branches_on_names(ast.parse('run(["lte", "compare"])\nf(name="lte")\nx == "dense"')))
