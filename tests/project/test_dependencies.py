"""The packages form floors, and imports run downward only."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FLOORS = ("illama", "quant", "deploy", "eval")
RECIPES = {"quant/ptq.py", "quant/qat.py"}  # commands that walk the whole way, and which nothing imports


def _imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _files():
    return [path for floor in FLOORS for path in (ROOT / floor).rglob("*.py")]


@pytest.mark.parametrize("path", _files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_run_downward(path):
    name = str(path.relative_to(ROOT))
    height = FLOORS.index(name.split("/")[0])
    for module in _imports(path):
        package = module.split(".")[0]
        if package in FLOORS and name not in RECIPES:
            assert FLOORS.index(package) <= height, f"{name} imports {module} from a floor above"
        assert f"{module.replace('.', '/')}.py" not in RECIPES, f"{name} imports the recipe {module}"


def test_no_file_hides_a_module_of_the_standard_library():
    """A command's own folder comes first on sys.path."""
    assert not {path.stem for path in _files()} & (sys.stdlib_module_names - {"__init__"})
