"""Every command's --help: it imports no large library, and describes every option."""

import dataclasses
import importlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from project_files import ROOT, commands, module_name, relative

from illama.cli import option_helps
from illama.dispatch import COMMANDS

LARGE = {
    "torch",
    "torchvision",
    "timm",
    "numpy",
    "scipy",
    "onnx",
    "onnxruntime",
    "openvino",
    "modelopt",
    "torchao",
    "tensorrt",
    "tensorrt_rtx",
    "matplotlib",
    "pandas",
    "pyarrow",
    "PIL",
}
NEEDED = {"deploy/probe.py": {"numpy"}}  # a health check runs once, and compares logits
RUN = """
import json, pathlib, runpy, sys
path, *rest = sys.argv[1:]
sys.argv = [path, *rest]
sys.path.insert(0, str(pathlib.Path(path).parent))
status = 0
try:
    runpy.run_path(path, run_name="__main__")
except SystemExit as end:
    status = end.code or 0
print("\\n" + json.dumps([status, list(sys.modules)]))
"""


def run(path, *arguments):
    """Runs a command; the last line of its output is its status and the modules that it imported."""
    line = [sys.executable, "-c", RUN, str(path), *arguments]
    result = subprocess.run(line, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result


@pytest.mark.parametrize("path", commands(), ids=relative)
def test_help_imports_no_large_library(path):
    result = run(path, "--help")
    status, modules = json.loads(result.stdout.splitlines()[-1])
    assert status == 0 and "--" in result.stdout
    assert "None" not in result.stdout and str(ROOT) not in result.stdout.partition("\n")[2]
    given = re.findall(r"^  ((?:python|torchrun) .*)", result.stdout.partition("Examples:")[2], re.MULTILINE)
    about = result.stdout.partition("Examples:")[0]
    assert "--out" not in result.stdout or re.search(r"\b[Ww]rites?\b", about)  # and what, and where
    assert len(given) >= 2 - ("list_schemes" in path.name)
    assert {option for line in given for option in re.findall(r" (--[\w-]+)", line)} <= set(
        re.findall(r"--[\w-]+", result.stdout.partition("─ ")[2])
    ) | {"--nproc-per-node"}
    loaded = LARGE & set(modules) - NEEDED.get(relative(path), set())
    if not relative(path).startswith("eval/"):
        loaded |= {module for module in modules if module.split(".")[0] == "eval"}
    assert not loaded


@pytest.mark.parametrize("name", COMMANDS)
def test_help_names_commands_as_they_are_run(name):
    illama = Path(sys.executable).with_name("illama")
    text = subprocess.run([illama, name, "--help"], capture_output=True, text=True, check=True).stdout
    joined = " ".join(re.sub(r"[│╭╮╰╯─]", " ", text).split())
    assert not re.search(r"python \w+/|(quant|deploy|eval)/\w+\.py", joined)
    assert "[[" not in joined


@pytest.mark.parametrize(
    "command, wrong",
    [
        ("quant/ptq.py", ["--schemes", "nosuch"]),
        ("quant/ptq.py", ["--schemes", "nosuch.yaml"]),
        ("quant/ptq.py", ["--data", "nosuch"]),
        ("quant/qat.py", ["--checkpoint", "nosuch"]),
        ("illama/train.py", ["--init", "nosuch"]),
        ("eval/accuracy.py", ["nosuch", "nosuch"]),
        ("eval/tradeoff.py", [".", "--data", "nosuch"]),
    ],
)
def test_wrong_values_are_told_before_large_libraries_are_imported(command, wrong):
    result = run(ROOT / command, *wrong)
    status, modules = json.loads(result.stdout.splitlines()[-1])
    assert status == 2 and "nosuch" in result.stderr and len(result.stderr.splitlines()) == 1
    assert not LARGE & set(modules)


@pytest.mark.parametrize("path", commands(), ids=relative)
def test_every_option_is_described(path):
    """Each field of the options has an entry of its own in the docstring, and each entry has a field."""
    name = re.search(r"\brun_command\((\w+)", path.read_text())[1]
    options = getattr(importlib.import_module(module_name(path)), name)
    helps = option_helps(options)
    assert set(helps) == {field.name for field in dataclasses.fields(options)}
    assert all(helps.values())
