"""The wheel: its size, what it holds, and that its `runtime` extra alone classifies images."""

import importlib.metadata
import shutil
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import torch
from packaging.requirements import Requirement
from PIL import Image
from safetensors.torch import load_file
from support import ROOT, assert_one_line_error

from illama.bundle import SHIPPED
from illama.data.datasets import SHIPPED_FASHION_MNIST
from illama.data.idx_files import read_idx_pair
from quant import quantize
from quant.export.onnx_export import export_onnx  # noqa: F401 - imported before the tests are timed

PACKAGE = "illama-toolkit"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel of this tree, built in a copy, since setuptools leaves files behind."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("illama", "quant", "deploy", "eval"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q", "-w", out, source]
    subprocess.run(list(map(str, command)), check=True, capture_output=True, timeout=300)
    (path,) = out.glob("*.whl")
    return path


def _needed(names):
    """Returns the installed distributions that requirements need, and those that they need."""
    found, left = {}, [Requirement(name) for name in names]
    while left:
        requirement = left.pop()
        for extra in requirement.extras or {""}:
            if requirement.marker and not requirement.marker.evaluate({"extra": extra}):
                continue
        if requirement.name in found or (requirement.marker and not requirement.marker.evaluate({"extra": ""})):
            continue
        found[requirement.name] = importlib.metadata.distribution(requirement.name)
        left += map(Requirement, found[requirement.name].requires or [])
    return found


def _runtime_requirements():
    """Returns what `pip install 'illama-toolkit[runtime]'` needs."""
    lines = map(Requirement, importlib.metadata.requires(PACKAGE))
    return [str(each).split(";")[0] for each in lines if not each.marker or each.marker.evaluate({"extra": "runtime"})]


@pytest.fixture(scope="module")
def runtime(wheel, tmp_path_factory):
    """Python in a new environment with the wheel and what its `runtime` extra needs, linked from this environment."""
    folder = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    for distribution in _needed(_runtime_requirements()).values():
        for top in {file.parts[0] for file in distribution.files} - {"..", "__pycache__"}:
            if not (packages / top).exists():
                (packages / top).symlink_to(distribution.locate_file(top).resolve())
    python = folder / "bin" / "python"
    install = [sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-deps", "--no-index", wheel]
    subprocess.run(list(map(str, install)), check=True, capture_output=True, timeout=300)
    return python


def _run(python, *arguments, cwd):
    command = [python.parent / "illama", *arguments]
    return subprocess.run(list(map(str, command)), cwd=cwd, capture_output=True, text=True, timeout=120)


def test_the_wheel_is_small_and_holds_what_the_main_job_needs(wheel, tmp_path):
    assert wheel.stat().st_size < 8_000_000
    with zipfile.ZipFile(wheel) as archive:
        assert not [name for name in archive.namelist() if "weights/tiny-emoji" in name or name.startswith("tests")]
        archive.extractall(tmp_path)
    small = tmp_path / "illama"
    for split in ("t10k", "calibration"):
        expected = read_idx_pair(SHIPPED_FASHION_MNIST, split, 10)
        actual = read_idx_pair(small / SHIPPED_FASHION_MNIST.relative_to(ROOT / "illama"), split, 10)
        assert all(map(np.array_equal, actual, expected))
    weights = SHIPPED.relative_to(ROOT / "illama") / "model.safetensors"
    halves, floats = load_file(small / weights), load_file(SHIPPED / "model.safetensors")
    assert all(torch.equal(halves[name], value.half()) for name, value in floats.items()) and len(halves) == len(floats)


def test_the_runtime_extra_alone_classifies_images(runtime, shipped_int8, tmp_path):
    assert subprocess.run([runtime, "-c", "import torch"], capture_output=True).returncode
    pixels = read_idx_pair(SHIPPED_FASHION_MNIST, "t10k", 10)[0][0]
    Image.fromarray(pixels).save(tmp_path / "boot.png")
    result = _run(runtime, "predict", "boot.png", "--engine", shipped_int8, cwd=tmp_path)
    assert (result.returncode, result.stderr) == (0, "")
    assert "verified" in result.stdout and "NOT" not in result.stdout
    assert result.stdout.splitlines()[1].startswith("boot.png: Ankle boot ")


def test_a_missing_extra_is_named(runtime, tmp_path):
    assert_one_line_error(_run(runtime, "quantize", "--schemes", "int8", cwd=tmp_path), "[quantize]")


def test_another_package_of_the_same_name_is_named(runtime, tmp_path):
    (packages,) = runtime.parents[1].glob("lib/python*/site-packages")
    (tmp_path / "eval").mkdir()
    (tmp_path / "eval" / "__init__.py").touch()
    (packages / "clash.pth").write_text(f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n")
    try:
        assert_one_line_error(_run(runtime, "predict", "--help", cwd=tmp_path), str(tmp_path / "eval"))
    finally:
        (packages / "clash.pth").unlink()


@pytest.fixture(scope="module")
def shipped_int8(tmp_path_factory):
    """The INT8 bundle of the shipped network, made in memory."""
    from torch.utils.data import DataLoader

    from illama.checkpoints.load import load_checkpoint
    from illama.data.datasets import FASHION_MNIST_CLASSES, Transformed, open_data

    shipped = load_checkpoint(SHIPPED)
    images = Transformed(open_data("fashion-mnist").calibration(64), shipped.preprocessing.transform())
    options = {"preprocessing": shipped.preprocessing, "classes": FASHION_MNIST_CLASSES}
    out = tmp_path_factory.mktemp("quantized") / "out"
    return quantize(shipped.model, DataLoader(images, 32), "int8", out, **options)
