"""The Python files of the four packages, and what they import."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGES = ("illama", "quant", "deploy", "eval")


def python_files(*folders: str) -> list[Path]:
    """Returns every Python file in folders of the repository, at any depth."""
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def commands() -> list[Path]:
    """Returns the files that a person runs: those on top of a package that have a main block."""
    return [
        path
        for path in python_files(*PACKAGES)
        if path.parent.parent == ROOT and 'if __name__ == "__main__"' in path.read_text()
    ]


def relative(path: Path) -> str:
    """Returns the path from the root of the repository."""
    return path.relative_to(ROOT).as_posix()


def module_name(path: Path) -> str:
    """Returns the dotted name of a file's module; of an ``__init__.py``, that of its package."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imported_names(path: Path) -> Iterator[str]:
    """Yields every name that a file imports, as ``module`` and ``module.name``, also inside functions.

    Relative imports are resolved. Blocks of ``if TYPE_CHECKING:`` are left out.
    """
    module = module_name(path)
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in _walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
            source = ".".join([*parents, *filter(None, [node.module])])
            yield source
            yield from (f"{source}.{alias.name}" for alias in node.names)


def _walk(node: ast.AST) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
            for other in child.orelse:
                yield other
                yield from _walk(other)
        else:
            yield child
            yield from _walk(child)
