"""A bundle: the folder that every step reads and writes. Nothing else passes between steps.

    manifest.json        what made it, from which inputs (SHA-256), versions, seed, config, metrics
    model.safetensors    the weights
    model.onnx           after quantization: the graph for CPUs
    model.fused.onnx     after quantization: the graph for TensorRT
    model.torchao.safetensors  after quantization by torchao: the network for PyTorch
    engines/             after a build: a folder for each engine, with its record
    temperature.json     after an evaluation: what calibrates the probabilities of these files

It appears whole or not at all: it is written beside its place and renamed into it.
"""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import sys
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from illama.errors import UserError

FORMAT = 1
MANIFEST = "manifest.json"
WEIGHTS = "model.safetensors"
CPU_ONNX = "model.onnx"
FUSED_ONNX = "model.fused.onnx"
TORCHAO = "model.torchao.safetensors"
SCHEME = "scheme.yaml"  # what quantized it, to be read, changed and replayed
ENGINES = "engines"
INPUT, OUTPUT = "images", "logits"  # of every graph: (B, C, H, W) float32 and (B, classes, ...) float32
SHIPPED = Path(__file__).parent / "weights" / "nano-fashion-mnist"  # the checkpoint that comes with the project
TEMPERATURE = "temperature.json"
FRAME = "frame"  # in a manifest's metrics: (height, width, channels) that graphs with preprocessing take
SOFTMAX_OUTPUT = "softmax_output"  # in a fused graph's metadata: how attention's softmax output is rounded
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


@dataclass
class Manifest:
    """What a bundle says of itself; ``manifest.json`` holds exactly these fields.

    Attributes:
        made_by: the command line that wrote it.
        inputs: path of each input file -> its SHA-256.
        config: :class:`illama.ModelConfig` as a dict.
        preprocessing: :class:`illama.data.datasets.Preprocessing` as a dict.
        classes: names of the classes, in the order of the logits.
        metrics: figures measured on the way, free in form.
    """

    made_by: str
    config: dict[str, Any]
    preprocessing: dict[str, Any]
    classes: list[str]
    seed: int = 0
    inputs: dict[str, str] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=lambda: package_versions())
    format: int = FORMAT

    def write(self, folder: Path) -> None:
        (folder / MANIFEST).write_text(json.dumps(asdict(self), indent=2) + "\n")

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """The manifest of a bundle; UserError if it is missing, damaged or of another format."""
        path = folder / MANIFEST
        try:
            values = json.loads(path.read_text())
            if values["format"] != FORMAT:
                raise UserError(f"{path} has bundle format {values['format']}, this version reads {FORMAT}")
            return cls(**values)
        except FileNotFoundError as error:
            raise UserError(f"{folder} is not a bundle: it has no {MANIFEST}") from error
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} is damaged: make the bundle again") from error


def command_line() -> str:
    """The running command as a person would type it."""
    return shlex.join(["python", os.path.relpath(sys.argv[0]), *sys.argv[1:]])


def package_versions() -> dict[str, str]:
    """Versions of the packages that decide the numbers, those installed."""
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def bundle_of(path: Path) -> Path:
    """The folder of the bundle that a file, an engine or an engine's folder belongs to, or that ``path`` is."""
    folder = path if path.is_dir() else path.parent
    if not (folder / MANIFEST).exists():
        for each in (folder, folder.parent):
            if each.name == ENGINES and (each.parent / MANIFEST).exists():
                return each.parent
    return folder


def is_bundle(folder: Path) -> bool:
    """Whether a folder is a bundle, and so may be replaced by a newer one."""
    try:
        return bool(Manifest.read(folder))
    except UserError:
        return False
