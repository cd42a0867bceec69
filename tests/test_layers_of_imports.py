"""Imports point down the layout in docs/architecture.md and never form a circle."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "layerwise"
FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}


def layout() -> list[str]:
    """The names in the layout block of docs/architecture.md, top first."""
    text = (ROOT / "docs" / "architecture.md").read_text()
    block = re.search(r"```text title=\"The layout\"\n(.*?)```", text, re.DOTALL)
    assert block, "docs/architecture.md has no block titled 'The layout'"
    return re.findall(r"^(\w+)(?:/|\.py)", block.group(1), re.MULTILINE)


ORDER = layout()
USERS = {"cli", "systems"}
"""Parts that may use the public namespace, as a user would: nothing it names is above them."""


def top(module: str) -> str:
    return module.split(".")[1] if "." in module else "__init__"


def imports(module: str, tree: ast.AST) -> Iterator[str]:
    """The modules of this package that the statements in `tree` import, wherever they stand."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "layerwise")
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{module}:{node.lineno}: write the import in full"
            if node.module and node.module.split(".")[0] == "layerwise":
                for alias in node.names:
                    inner = f"{node.module}.{alias.name}"
                    yield inner if inner in FILES else node.module


def at_import_time(statements: list[ast.stmt]) -> Iterator[ast.stmt]:
    """The statements that run when the module is imported."""
    for node in statements:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            yield node
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            yield from at_import_time(node.orelse)
        elif isinstance(node, (ast.If, ast.Try, ast.With, ast.ClassDef)):
            for part in ("body", "orelse", "finalbody"):
                yield from at_import_time(getattr(node, part, []))


def test_every_part_of_the_package_has_one_place_in_the_layout() -> None:
    on_disk = {top(module) for module in FILES} - {"__init__"}
    assert len(ORDER) == len(set(ORDER))
    assert on_disk - set(ORDER) == set(), "add a line to the layout in docs/architecture.md"


@pytest.mark.parametrize("module", [m for m in FILES if m != "layerwise"])
def test_imports_point_down(module: str) -> None:
    here = ORDER.index(top(module))
    for imported in imports(module, ast.parse(FILES[module].read_text())):
        assert imported in FILES, f"{module} imports {imported}, which does not exist"
        if imported == "layerwise":
            assert top(module) in USERS, f"{module} imports the public namespace; import from the file itself"
            continue
        assert ORDER.index(top(imported)) >= here, f"{module} imports {imported}, which is above it"


def test_no_circles() -> None:
    graph: dict[str, set[str]] = {}
    for module, path in FILES.items():
        tree = ast.Module(list(at_import_time(ast.parse(path.read_text()).body)), type_ignores=[])
        graph[module] = set(imports(module, tree)) - {module}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_importing_layerwise_imports_nothing_heavy() -> None:
    heavy = ["torch", "transformers", "numpy", "pandas", "scipy", "plotly", "typer", "rich"]
    code = f"import sys, layerwise; print([name for name in {heavy} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
