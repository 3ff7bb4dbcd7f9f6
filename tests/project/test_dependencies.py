"""The dependency rule: layers import downward only, nothing imports a command, and there are no import cycles."""

import importlib.metadata
import re
import sys
from collections import Counter
from graphlib import TopologicalSorter

import pytest
from project_files import PACKAGES, ROOT, commands, imported_names, module_name, python_files, relative

MAY_IMPORT = {"illama": set(), "quant": {"illama"}, "deploy": {"illama"}, "eval": {"deploy", "illama"}}
RECIPES = {"quant/ptq.py", "quant/qat.py", "quant/search.py"}  # commands that run the whole path, across all layers


@pytest.mark.parametrize("path", python_files(*PACKAGES), ids=relative)
def test_a_package_imports_lower_layers_only(path):
    if relative(path) not in RECIPES:
        package = relative(path).split("/")[0]
        imported = {name.split(".")[0] for name in imported_names(path)} & set(PACKAGES)
        assert imported <= {package} | MAY_IMPORT[package]


@pytest.mark.parametrize("path", python_files(*PACKAGES), ids=relative)
def test_nothing_imports_a_command(path):
    imported = set(imported_names(path)) & {module_name(command) for command in commands()}
    assert not imported


def _import_graph():
    """Module -> the modules of this project that it imports, and their packages except those that it is in."""
    files = {module_name(path): path for path in python_files(*PACKAGES, "benchmarks")}
    graph = {}
    for module, path in files.items():
        names = set(imported_names(path))
        if module.startswith("benchmarks."):  # scripts import each other from their own folder
            names |= {f"{folder}.{name}" for name in names for folder in ("benchmarks", module.rpartition(".")[0])}
        packages = {each for name in names & set(files) for each in _packages_of(name)} - _packages_of(module)
        graph[module] = ((names | packages) & set(files)) - {module}
    return graph


def _packages_of(module):
    parts = module.split(".")
    return {".".join(parts[:count]) for count in range(1, len(parts))}


def test_no_module_imports_itself_by_way_of_others():
    graph = _import_graph()
    assert "illama.models.illama" in graph["illama.models"]
    assert {"benchmarks.peers", "benchmarks.peers.base"} <= graph["benchmarks.quant_peers"]
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the modules of a cycle


def test_every_product_file_has_a_name_of_its_own():
    stems = Counter(path.stem for path in python_files(*PACKAGES) if path.stem != "__init__")
    assert not [stem for stem, count in stems.items() if count > 1]


def _installed_modules():
    """Returns the top-level modules of the installed distributions that constraints.txt pins."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = {_normalized(match[0]) for line in lines if (match := re.match(r"[\w.-]+(?===)", line))}
    by_module = importlib.metadata.packages_distributions()
    return {module for module, owners in by_module.items() if pinned & set(map(_normalized, owners))}


def _normalized(distribution):
    return re.sub(r"[-_.]+", "-", distribution).lower()


def test_no_name_hides_a_library():
    """A command's own folder comes first on sys.path."""
    installed = _installed_modules()
    assert {"torch", "timm", "onnx", "tensorrt_rtx", "PIL", "yaml"} <= installed
    folders = [path for package in PACKAGES for path in (ROOT / package).rglob("*") if path.is_dir()]
    names = {path.stem for path in (*python_files(*PACKAGES), *folders)} - {"__init__", "__pycache__"}
    assert not names & (installed | sys.stdlib_module_names)
