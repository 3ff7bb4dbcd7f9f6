"""A bundle is a folder that every step reads or writes. Steps exchange data in no other way.

    manifest.json        the command line, input files (SHA-256), versions, seed, config, metrics
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
import json
import os
import shlex
import shutil
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
SCHEME = "scheme.yaml"  # the scheme of the quantization
ENGINES = "engines"
INPUT, OUTPUT = "images", "logits"  # names in every graph: (B, C, H, W) float32 and (B, classes, ...) float32
SHIPPED = Path(__file__).parent / "weights" / "nano-fashion-mnist"  # the checkpoint in this repository
TEMPERATURE = "temperature.json"
FRAME = "frame"  # key in a manifest's metrics: (height, width, channels) of the input of graphs with preprocessing
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


@dataclass
class Manifest:
    """Metadata of a bundle, stored as ``manifest.json``.

    Attributes:
        made_by: command line that wrote the bundle.
        config: :class:`illama.ModelConfig` as a dict.
        preprocessing: :class:`illama.data.datasets.Preprocessing` as a dict.
        classes: class names in the order of the logits.
        seed: seed of the command.
        inputs: path of each input file -> its SHA-256.
        metrics: measured values, under any keys.
        versions: package -> its version.
        format: version of this format.
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
        """Reads the manifest of a bundle; raises UserError if it is missing, damaged or of another format."""
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


def data_file(path: Path) -> Path:
    """Returns the path of the external data of an ONNX file, which exists if the file's weights are large."""
    return path.with_name(f"{path.name}.data")


def with_data(path: Path) -> list[Path]:
    """Returns a file, and the external data beside it, if there is any."""
    return [each for each in (path, data_file(path)) if each == path or each.is_file()]


def sha256(path: Path) -> str:
    """Returns the hexadecimal SHA-256 of a file, followed by its external data, if it has any."""
    digest = hashlib.sha256()
    for each in with_data(path):
        with each.open("rb") as file:
            while block := file.read(2**20):
                digest.update(block)
    return digest.hexdigest()


def size_of(path: Path) -> int:
    """Returns the bytes of a file and of its external data."""
    return sum(each.stat().st_size for each in with_data(path))


def copy_with_data(path: Path, folder: Path) -> None:
    """Copies a file and its external data into a folder."""
    for each in with_data(path):
        shutil.copyfile(each, folder / each.name)


def bundle_of(path: Path) -> Path:
    """Returns the bundle that contains a file, an engine or an engine's folder; ``path`` may be the bundle itself."""
    folder = path if path.is_dir() else path.parent
    if not (folder / MANIFEST).exists():
        for each in (folder, folder.parent):
            if each.name == ENGINES and (each.parent / MANIFEST).exists():
                return each.parent
    return folder


def is_bundle(folder: Path) -> bool:
    """Returns whether a folder is a bundle."""
    try:
        return bool(Manifest.read(folder))
    except UserError:
        return False
