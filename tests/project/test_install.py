"""The wheel: its size, what it holds, and that its `runtime` extra alone classifies images."""

import importlib.metadata
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from packaging.requirements import Requirement
from PIL import Image
from safetensors.torch import load_file
from support import ROOT, assert_one_line_error

from illama.bundle import SHIPPED, weights_of
from illama.checkpoints.tensor_files import read_tensors
from illama.data.datasets import SHIPPED_FASHION_MNIST
from illama.data.idx_files import read_idx_pair
from quant import quantize

PACKAGE = "illama-toolkit"
SHARED = ("google", "nvidia")  # folders that several distributions install into


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


def _needed(wheel, extra):
    """Returns the installed distributions that `pip install 'WHEEL[EXTRA]'` would install besides the wheel."""
    (metadata,) = (path for path in zipfile.Path(wheel).iterdir() if path.name.endswith(".dist-info"))
    ours = importlib.metadata.PathDistribution(metadata)
    found, left = {}, [Requirement(f"{PACKAGE}[{extra}]")]
    while left:
        asked = left.pop()
        found[asked.name] = ours if asked.name == PACKAGE else importlib.metadata.distribution(asked.name)
        for needed in map(Requirement, found[asked.name].requires or []):
            extras = [*asked.extras, ""]
            wanted = needed.marker is None or any(needed.marker.evaluate({"extra": each}) for each in extras)
            if wanted and (needed.name not in found or needed.extras):
                left.append(needed)
    return [each for name, each in found.items() if name != PACKAGE]


def _environment(wheel, extra, folder):
    """Returns the Python of a new environment with a wheel and what an extra of it needs, linked from this one."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    for distribution in _needed(wheel, extra):
        for file in distribution.files:
            part = Path(*file.parts[: 2 if file.parts[0] in SHARED else 1])
            if part.name not in ("..", "__pycache__") and not (packages / part).is_symlink():
                (packages / part).parent.mkdir(exist_ok=True)
                (packages / part).symlink_to(distribution.locate_file(part).resolve())
    python = folder / "bin" / "python"
    install = [sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-deps", "--no-index", wheel]
    subprocess.run(list(map(str, install)), check=True, capture_output=True, timeout=300)
    return python


@pytest.fixture(scope="module")
def runtime(wheel, tmp_path_factory):
    return _environment(wheel, "runtime", tmp_path_factory.mktemp("environment"))


def _run(python, *arguments, cwd):
    command = [python.parent / "illama", *arguments]
    return subprocess.run(list(map(str, command)), cwd=cwd, capture_output=True, text=True, timeout=300)


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
    weights = weights_of(small / SHIPPED.relative_to(ROOT / "illama"))
    halves, floats = read_tensors(weights), load_file(SHIPPED / "model.safetensors")
    assert all(torch.equal(halves[name], value.half()) for name, value in floats.items()) and len(halves) == len(floats)


def test_the_runtime_extra_alone_classifies_images(runtime, shipped_int8, tmp_path):
    assert subprocess.run([runtime, "-c", "import torch"], capture_output=True).returncode
    pixels = read_idx_pair(SHIPPED_FASHION_MNIST, "t10k", 10)[0][0]
    Image.fromarray(pixels).save(tmp_path / "boot.png")
    result = _run(runtime, "predict", "boot.png", "--engine", shipped_int8, cwd=tmp_path)
    assert (result.returncode, result.stderr) == (0, "")
    assert "verified" in result.stdout and "NOT" not in result.stdout
    assert result.stdout.splitlines()[1].startswith("boot.png: Ankle boot ")


def test_the_wheel_runs_the_main_job(wheel, tmp_path):
    """With the extras that README names for it, and no more: the report's libraries are part of `quantize`."""
    python = _environment(wheel, "quantize,rtx", tmp_path / "environment")
    options = ("--schemes", "int8", "--images", 20, "--calibration-images", 32, "--batches", 1, "--seconds", 0.1)
    result = _run(python, "quantize", *options, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    out = tmp_path / "runs" / "ptq"
    assert (out / "report.html").exists() and list(out.glob("int8/engines/*/model.engine"))


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
