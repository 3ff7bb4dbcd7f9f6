"""A bundle is a folder that every step reads or writes. Steps exchange data in no other way.

    manifest.json        what the bundle contains and how it was made (:mod:`illama.manifest`)
    model.safetensors    the weights
    model.onnx           after quantization: the graph for CPUs
    model.fused.onnx     after quantization: the graph for TensorRT
    model.torchao.safetensors  after quantization by torchao: the network for PyTorch
    engines/             after a build: a folder for each engine, with its record
    temperature.json     after an evaluation: the temperatures that calibrate the files' probabilities

It is written atomically (:mod:`illama.atomic_write`).
"""

from __future__ import annotations

import hashlib
import os
import shlex
import sys
from importlib import metadata
from pathlib import Path

MANIFEST = "manifest.json"
WEIGHTS = "model.safetensors"
CPU_ONNX = "model.onnx"
FUSED_ONNX = "model.fused.onnx"
TORCHAO = "model.torchao.safetensors"
SCHEME = "scheme.yaml"  # the scheme of the quantization
ENGINES = "engines"
INPUT, OUTPUT = "images", "logits"  # names in every graph: (B, C, H, W) float32 and (B, classes, ...) float32
SHIPPED = Path(__file__).parent / "weights" / "nano-fashion-mnist"  # the checkpoint in this repository
TEMPERATURE = "temperature.json"
SOFTMAX_OUTPUT = "softmax_output"  # key in the metadata of FUSED_ONNX: how attention's softmax output is rounded
_PACKAGES = (
    "torch",
    "torchvision",
    "timm",
    "segmentation-models-pytorch",
    "nvidia-modelopt",
    "torchao",
    "onnx",
    "onnxruntime",
    "openvino",
    "tensorrt-rtx",
    "tensorrt",
    "numpy",
)


def command_line() -> str:
    """Returns the command line of this process."""
    return shlex.join(["python", os.path.relpath(sys.argv[0]), *sys.argv[1:]])


def package_versions() -> dict[str, str]:
    """Returns the versions of installed packages that affect results."""
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def sha256(path: Path) -> str:
    """Returns the hexadecimal SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def bundle_of(path: Path) -> Path:
    """Returns the bundle that contains a file, an engine or an engine's folder; ``path`` may be the bundle itself."""
    folder = path if path.is_dir() else path.parent
    if not (folder / MANIFEST).exists():
        for each in (folder, folder.parent):
            if each.name == ENGINES and (each.parent / MANIFEST).exists():
                return each.parent
    return folder
