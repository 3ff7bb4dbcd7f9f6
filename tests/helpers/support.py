"""What tests share: small bundles and image folders, running commands, and checking errors."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import onnx
import onnx.helper
import torch
from PIL import Image
from safetensors.torch import save_file

from deploy.trt.record import EngineRecord
from illama import ILLaMA, ModelConfig
from illama.atomic_write import write_folder
from illama.bundle import FUSED_ONNX, MANIFEST, bundle_of, sha256
from illama.data.preprocessing import Preprocessing
from illama.manifest import Manifest

ROOT = Path(__file__).parents[2]


def write_bundle(folder: Path, config: ModelConfig, state: dict[str, torch.Tensor] | None = None) -> Path:
    """Writes a bundle as training does, with random weights unless a state dict is given."""
    torch.manual_seed(0)
    state = state or ILLaMA(config).state_dict()
    preprocessing = Preprocessing.imagenet(config.image_size, config.in_channels)
    classes = [f"class{i}" for i in range(config.num_classes)]
    with write_folder(folder) as draft:
        Manifest(config.kind, config.to_dict(), preprocessing, tuple(classes)).write(draft)
        save_file(state, draft / "model.safetensors")
    return folder


SMALL = ModelConfig(image_size=32, patch_size=8, in_channels=3, width=64, depth=2, heads=2, num_classes=3)


def write_linear_bundle(folder: Path, weights: np.ndarray, image_size: int, classes: list[str]) -> Path:
    """Writes a bundle as quantization does, of a linear network: logits = RGB pixels x weights."""
    nodes = [
        onnx.helper.make_node("Flatten", ["images"], ["flat"]),
        onnx.helper.make_node("MatMul", ["flat", "w"], ["logits"], name="head/MatMul"),
    ]
    shapes = {"images": ["batch", 3, image_size, image_size], "logits": ["batch", len(classes)]}
    values = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape) for name, shape in shapes.items()]
    constant = onnx.numpy_helper.from_array(weights.astype(np.float32), "w")
    graph = onnx.helper.make_graph(nodes, "linear", values[:1], values[1:], [constant])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 21)], ir_version=10)
    with write_folder(folder) as draft:
        preprocessing = Preprocessing((image_size, image_size), 3, (0.5,) * 3, (0.25,) * 3)
        Manifest("illama", {}, preprocessing, tuple(classes)).write(draft)
        onnx.save(model, draft / "model.onnx")
    return folder


def write_format_1(bundle: Path, *without: str) -> None:
    """Rewrites a bundle's manifest in format 1, without some fields of the preprocessing."""
    manifest = Manifest.read(bundle)
    preprocessing = {"image_size": manifest.preprocessing.size[0], **asdict(manifest.preprocessing)}
    for name in ("size", "interpolation", *without):
        del preprocessing[name]
    facts = {"made_by": "python old.py", "config": dict(manifest.config), "preprocessing": preprocessing}
    facts |= {"classes": manifest.classes, "seed": 0, "inputs": {}, "metrics": {}, "versions": {}, "format": 1}
    (bundle / MANIFEST).write_text(json.dumps(facts))


def write_made_up_engine(path: Path, **facts: object) -> EngineRecord:
    """Writes a file in place of an engine, and a record that fits it and the fused graph of its bundle."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(f"what a library would have written to {path.name}".encode())
    graph = bundle_of(path) / FUSED_ONNX
    values = {
        "onnx_sha256": sha256(graph) if graph.exists() else "",
        "engine_sha256": sha256(path),
        "engine_bytes": 1,
        "library": "tensorrt",
        "library_version": "11.4",
        "targets": ("sm89",),
        "batch": (1, 8, 64),
        "options": {},
        "precisions": {},
        "attentions": 2,
        "fused": True,
        "preprocessing": {},
        "classes": [],
        "inputs": {"images": ["float", [-1, 3, 32, 32]]},
        "outputs": {"logits": ["float", [-1, 3]]},
        "trtexec": "",
    }
    record = EngineRecord(**(values | facts))
    record.write(path)
    return record


def write_images(folder: Path, classes: int = 3, train: int = 8, val: int = 6) -> Path:
    """Writes color noise in ImageNet's layout, with `train` and `val` images per class."""
    generator = np.random.default_rng(0)
    for split, count in (("train", train), ("val", val)):
        for label in range(classes):
            (folder / split / f"class{label}").mkdir(parents=True)
            for index in range(count):
                pixels = generator.integers(0, 256, (40, 48, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / split / f"class{label}" / f"{index}.png")
    return folder


def write_untimed_baseline(report: Path, to: Path) -> Path:
    """Writes the report to ``to`` without latencies, which differ between runs; returns ``to``."""
    content = json.loads(report.read_text())
    content["rows"] = [{**row, "latency": []} for row in content["rows"]]
    to.write_text(json.dumps(content))
    return to


def run_command(*arguments: object, cwd: Path = ROOT, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    """Runs a command as a user does."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=timeout)


def assert_one_line_error(result: subprocess.CompletedProcess[str], *words: str) -> None:
    """Checks for exit status 2, no traceback, and a last line with the error and all ``words``."""
    assert result.returncode == 2, result.stderr
    assert "Traceback" not in result.stderr
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ")
    for word in words:
        assert word in last
