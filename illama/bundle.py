"""A bundle: the folder that every step reads and writes. Nothing else passes between steps.

    manifest.json        what made it, from which inputs (SHA-256), versions, seed, config, metrics
    model.safetensors    the weights
    model.onnx           after quantization: the graph for CPUs
    model.fused.onnx     after quantization: the graph for TensorRT
    model.torchao.safetensors  after quantization by torchao: the network for PyTorch
    engines/             after a build: engines, each with a JSON of its own
    temperature.json     after an evaluation: what calibrates the probabilities of these files

It appears whole or not at all: it is written beside its place and renamed into it.
"""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
TEMPERATURE = "temperature.json"
FRAME = "frame"  # in a manifest's metrics: (height, width, channels) that graphs with preprocessing take
SOFTMAX_OUTPUT = "softmax_output"  # in a fused graph's metadata: how attention's softmax output is rounded
_PACKAGES = ("torch", "torchvision", "timm", "segmentation-models-pytorch", "nvidia-modelopt", "torchao", "onnx",
             "onnxruntime", "openvino", "tensorrt-rtx", "tensorrt", "numpy")  # fmt: skip


@dataclass
class Manifest:
    """What a bundle says of itself; ``manifest.json`` holds exactly these fields.

    Attributes:
        made_by: the command line that wrote it.
        inputs: path of each input file -> its SHA-256.
        config: :class:`illama.ModelConfig` as a dict.
        preprocessing: :class:`illama.data.Preprocessing` as a dict.
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
    """The folder of the bundle that a file or an engine belongs to, or that ``path`` is."""
    folder = path if path.is_dir() else path.parent
    return folder.parent if folder.name == ENGINES else folder


def is_bundle(folder: Path) -> bool:
    """Whether a folder is a bundle, and so may be replaced by a newer one."""
    try:
        return bool(Manifest.read(folder))
    except UserError:
        return False


@contextmanager
def write_folder(folder: Path, is_ours: Callable[[Path], bool] = is_bundle) -> Iterator[Path]:
    """A temporary folder that takes the place of ``folder`` if the block succeeds and vanishes if not.

    Raises:
        UserError: at once, if ``folder`` cannot be written, or holds files and ``is_ours`` denies it.
    """
    folder = folder.resolve()
    if folder.exists() and not (folder.is_dir() and (not any(folder.iterdir()) or is_ours(folder))):
        raise UserError(f"{folder} holds other files and will not be replaced: choose another folder")
    draft, old = (folder.with_name(f".{folder.name}.{kind}-{os.getpid()}") for kind in ("draft", "old"))
    try:
        _sweep(folder)
        draft.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error.strerror}; choose another folder") from error
    try:
        yield draft
        if folder.exists():
            folder.rename(old)
        draft.rename(folder)
    finally:
        if old.exists() and not folder.exists():
            old.rename(folder)
        for leftover in (draft, old):
            shutil.rmtree(leftover, ignore_errors=True)


def make_out(out: Path) -> None:
    """The folder that a command writes into; UserError if it cannot be made."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror}; choose another --out") from error


def _sweep(folder: Path) -> None:
    """Clear up after processes that were killed while they wrote ``folder``."""
    for leftover in [*folder.parent.glob(f".{folder.name}.old-*"), *folder.parent.glob(f".{folder.name}.draft-*")]:
        kind, _, process = leftover.name.rpartition("-")
        if process.isdigit() and not Path(f"/proc/{process}").exists():
            if kind.endswith(".old") and not folder.exists():
                leftover.rename(folder)
            else:
                shutil.rmtree(leftover, ignore_errors=True)


@contextmanager
def write_file(path: Path) -> Iterator[Path]:
    """A temporary path that takes the place of ``path`` if the block succeeds and vanishes if not."""
    draft = path.with_name(f".{path.name}.draft-{os.getpid()}")
    try:
        yield draft
        with draft.open("rb") as file:
            os.fsync(file.fileno())
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def write_pinned(path: Path, data: bytes) -> None:
    """Write a file, and beside it its SHA-256 in sha256sum's form."""
    for target, content in ((path, data), (_pin(path), f"{hashlib.sha256(data).hexdigest()}  {path.name}\n".encode())):
        with write_file(target) as draft:
            draft.write_bytes(content)


def read_pinned(path: Path) -> bytes | None:
    """What :func:`write_pinned` wrote; None if there is no such file, or it is not what its SHA-256 is of."""
    try:
        data, pin = path.read_bytes(), _pin(path).read_text()
    except (OSError, UnicodeDecodeError):
        return None
    return data if pin.split()[:1] == [hashlib.sha256(data).hexdigest()] else None


def _pin(path: Path) -> Path:
    return path.with_name(f"{path.name}.sha256")
