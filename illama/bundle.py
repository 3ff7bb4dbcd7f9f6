"""A bundle is a folder that every step reads or writes. Steps exchange data in no other way.

    manifest.json        what the bundle contains and how it was made (:mod:`illama.manifest`)
    model.safetensors    the weights
    model.onnx           after quantization: the graph for CPUs
    model.fused.onnx     after quantization: the graph for TensorRT
    model.torchao.safetensors  after quantization by torchao: the network for PyTorch
    golden.safetensors   with a graph: golden answers, by which its files are verified (:mod:`illama.golden_answers`)
    trtexec.sh           if model.fused.onnx is for an older TensorRT: builds the engine on a board
    engines/             after a build: a folder for each engine, with its record
    temperature.json     after an evaluation: the temperatures that calibrate the files' probabilities
    verified.json        after a file was opened: whether it was right (:mod:`deploy.runtimes.verification`)
    fastest.json         after a file was opened or timed: its latency in the runtimes of a CPU

It is written atomically (:mod:`illama.atomic_write`).
"""

from __future__ import annotations

import hashlib
import os
import re
import shlex
import sys
from importlib import metadata
from pathlib import Path
from typing import Literal

from illama.errors import check_exists

MANIFEST = "manifest.json"
WEIGHTS, PACKED_WEIGHTS = "model.safetensors", "model.safetensors.xz"  # the second in a wheel only
CPU_ONNX = "model.onnx"
FUSED_ONNX = "model.fused.onnx"
TORCHAO = "model.torchao.safetensors"
SCHEME = "scheme.yaml"  # the scheme of the quantization
ENGINES = "engines"
ENGINE_SCRIPT = "trtexec.sh"
# Names in every graph: of images (B, C, H, W) float32, and of the output (B, ...) float32, by whether it is classes'.
INPUT, OUTPUT, FEATURES = "images", "logits", "features"
SHIPPED = Path(__file__).parent / "weights" / "nano-fashion-mnist"  # the checkpoint in this repository
TEMPERATURE = "temperature.json"
GOLDEN = "golden.safetensors"
NetworkKind = Literal["illama", "timm", "segmentation"]  # of the network in a bundle
GoldenImages = Literal["calibration", "noise", "none"]  # what the images of golden answers are made from
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


program: str | None = None  # "illama quantize", for example, if :mod:`illama.dispatch` runs a command
names: dict[str, str] = {}  # "quant.ptq" -> "illama quantize" and so on, likewise


def as_run(text: str) -> str:
    """Returns a message that names commands as the user runs them: ``python quant/ptq.py`` or ``illama quantize``."""
    return re.sub(r"python (\w+)/(\w+)\.py", lambda found: names.get(".".join(found.groups()), found[0]), text)


def command_line() -> str:
    """Returns the command line of this process."""
    start = program or shlex.join(["python", os.path.relpath(sys.argv[0])])
    return " ".join([start, *map(shlex.quote, sys.argv[1:])])


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


def weights_of(bundle: Path) -> Path:
    """Returns the path of a bundle's weights, which need not exist."""
    packed = bundle / PACKED_WEIGHTS
    return packed if packed.exists() else bundle / WEIGHTS


def sha256(path: Path) -> str:
    """Returns the hexadecimal SHA-256 of a file, followed by its external data, if it has any."""
    digest = hashlib.sha256()
    for each in with_data(path):
        with each.open("rb") as file:
            hashlib.file_digest(file, lambda: digest)
    return digest.hexdigest()


def size_of(path: Path) -> int:
    """Returns the bytes of a file and of its external data."""
    return sum(each.stat().st_size for each in with_data(path))


def bundle_of(path: Path) -> Path:
    """Returns the bundle that contains a file, an engine or an engine's folder; ``path`` may be the bundle itself.

    Raises:
        UserError: ``path`` does not exist.
    """
    folder = path if check_exists(path).is_dir() else path.parent
    if not (folder / MANIFEST).exists():
        for each in (folder, folder.parent):
            if each.name == ENGINES and (each.parent / MANIFEST).exists():
                return each.parent
    return folder
