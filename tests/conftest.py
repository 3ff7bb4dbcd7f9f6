"""Fixtures: the released code's own outputs, a small trained-shape bundle, small image folders, real commands."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # the tests run side by side; one thread each is fastest

import runpy
import signal
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import onnx
import onnx.helper
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

from deploy.record import EngineRecord
from illama import ILLaMA, ModelConfig
from illama.atomic_write import write_folder
from illama.bundle import FUSED_ONNX, Manifest, bundle_of, sha256
from illama.data import Preprocessing, open_data

ROOT = Path(__file__).parents[1]
PARITY = sorted((ROOT / "tests" / "data").glob("official_*.safetensors"))


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU, and there is none here"))


class Parity:
    """One file of the released code's outputs: its network, input, logits and features."""

    def __init__(self, path: Path) -> None:
        with safe_open(path, "pt") as file:
            facts = {name: int(value) for name, value in file.metadata().items()}
            self.tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        self.config = ModelConfig(
            image_size=facts["image_size"],
            patch_size=facts["patch_size"],
            width=facts["dim"],
            depth=facts["depth"],
            heads=facts["heads"],
            num_classes=facts["num_classes"],
        )
        self.state = {name[6:]: t for name, t in self.tensors.items() if name.startswith("state.")}
        self.input = self.tensors["input"]

    def model(self) -> ILLaMA:
        model = ILLaMA(self.config).eval()
        model.load_state_dict(self.state)
        return model


@pytest.fixture(params=PARITY, ids=lambda path: path.stem)
def parity(request):
    return Parity(request.param)


@pytest.fixture
def wide_parity():
    return Parity(ROOT / "tests" / "data" / "official_wide.safetensors")


def write_bundle(folder: Path, config: ModelConfig, state: dict[str, torch.Tensor] | None = None) -> Path:
    """A bundle as training writes it; random weights unless a state dict is given."""
    torch.manual_seed(0)
    state = state or ILLaMA(config).state_dict()
    preprocessing = Preprocessing.imagenet(config.image_size, config.in_channels)
    classes = [f"class{i}" for i in range(config.num_classes)]
    with write_folder(folder) as draft:
        Manifest("test", config.to_dict(), asdict(preprocessing), classes).write(draft)
        save_file(state, draft / "model.safetensors")
    return folder


SMALL = ModelConfig(image_size=32, patch_size=8, in_channels=3, width=64, depth=2, heads=2, num_classes=3)


@pytest.fixture
def small_bundle(tmp_path):
    return write_bundle(tmp_path / "bundle", SMALL)


def write_linear_bundle(folder: Path, weights: np.ndarray, image_size: int, classes: list[str]) -> Path:
    """A bundle as quantization writes it, of a network simple enough to be known: logits = RGB pixels x weights."""
    nodes = [onnx.helper.make_node("Flatten", ["images"], ["flat"]),
             onnx.helper.make_node("MatMul", ["flat", "w"], ["logits"], name="head/MatMul")]  # fmt: skip
    shapes = {"images": ["batch", 3, image_size, image_size], "logits": ["batch", len(classes)]}
    values = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape) for name, shape in shapes.items()]
    constant = onnx.numpy_helper.from_array(weights.astype(np.float32), "w")
    graph = onnx.helper.make_graph(nodes, "linear", values[:1], values[1:], [constant])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 21)], ir_version=10)
    with write_folder(folder) as draft:
        Manifest("test", {}, asdict(Preprocessing(image_size, 3, (0.5,) * 3, (0.25,) * 3)), classes).write(draft)
        onnx.save(model, draft / "model.onnx")
    return folder


def write_made_up_engine(path: Path, **facts: object) -> EngineRecord:
    """An engine's file that no library has built, and a record that fits it and the fused graph of its bundle."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(f"what a library would have written to {path.name}".encode())
    graph = bundle_of(path) / FUSED_ONNX
    values = {"onnx_sha256": sha256(graph) if graph.exists() else "", "engine_sha256": sha256(path), "engine_bytes": 1,
              "library": "tensorrt", "library_version": "11.4", "targets": ("sm89",), "batch": (1, 8, 64),
              "options": {}, "precisions": {}, "attentions": 2, "fused": True, "preprocessing": {}, "classes": [],
              "inputs": {"images": ["float", [-1, 3, 32, 32]]}, "outputs": {"logits": ["float", [-1, 3]]},
              "trtexec": ""}  # fmt: skip
    record = EngineRecord(**(values | facts))
    record.write(path)
    return record


@pytest.fixture
def overflow(tmp_path):
    """A bundle whose every logit is infinite or no number."""
    return write_linear_bundle(tmp_path / "overflow", np.full((768, 3), np.inf), 16, ["class0", "class1", "class2"])


def write_images(folder: Path, classes: int = 3, train: int = 8, val: int = 6) -> Path:
    """Coloured noise in ImageNet's layout, `train` and `val` images a class."""
    generator = np.random.default_rng(0)
    for split, count in (("train", train), ("val", val)):
        for label in range(classes):
            (folder / split / f"class{label}").mkdir(parents=True)
            for index in range(count):
                pixels = generator.integers(0, 256, (40, 48, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / split / f"class{label}" / f"{index}.png")
    return folder


@pytest.fixture
def image_folder(tmp_path):
    return write_images(tmp_path / "images")


def run_command(*arguments: object, cwd: Path = ROOT, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    """A real command, as a user types it."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=timeout)


@pytest.fixture
def run_here(monkeypatch, capfd):
    """A real command in this process, for the many that would only wait for torch to be imported again."""
    handler = signal.getsignal(signal.SIGTERM)

    def run(*arguments: object) -> subprocess.CompletedProcess[str]:
        monkeypatch.setattr(sys, "argv", [str(argument) for argument in arguments])
        status = 0
        try:
            runpy.run_path(str(ROOT / str(arguments[0])), run_name="__main__")
        except SystemExit as end:
            status = int(end.code or 0)
        return subprocess.CompletedProcess(arguments, status, *capfd.readouterr())

    yield run
    signal.signal(signal.SIGTERM, handler)


def assert_one_line_error(result: subprocess.CompletedProcess[str], *words: str) -> None:
    """Exit status 2 and a last line that says what is wrong, without a traceback."""
    assert result.returncode == 2, result.stderr
    assert "Traceback" not in result.stderr
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ")
    for word in words:
        assert word in last


@pytest.fixture(scope="session")
def real_images():
    """300 real test images, as the shipped checkpoint takes them, and their labels."""
    from illama.accuracy import load_images

    data = open_data("fashion-mnist")
    subset = torch.utils.data.Subset(data.test(), range(300))
    return load_images(subset, data.preprocessing(28, 1).transform())
