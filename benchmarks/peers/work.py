"""Runs one peer in its own process: python -m peers.work (started by quant_peers.py)."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch.utils.data import Subset

from illama.cli import run_command
from eval.measure.machine import peak_memory_gib
from illama.atomic_write import write_file
from illama.bundle import package_versions
from illama.data.datasets import ImageData
from illama.data.preprocessing import Preprocessing
from illama.errors import UserError
from illama.inference import Infer, load_images, predict
from illama.models.illama import ILLaMA
from illama.options import SourceOptions
from peers.all_peers import PEERS
from peers.base import Peer, Task, be_quiet, reason
from peers.findings import count_findings
from peers.runtimes import LOADERS
from quant.inputs import open_inputs

RESULT, LABELS = "result.json", "labels.npy"
VALIDATION_IMAGES = 1000  # of the training split, for a peer that measures accuracy during quantization
_PACKAGES = (
    "nncf",
    "openvino",
    "neural-compressor",
    "onnx-graphsurgeon",
    "onnxslim",
    "onnxconverter-common",
    "aimet-onnx",
    "olive-ai",
)


@dataclass(frozen=True)
class WorkOptions:
    """Quantize a checkpoint with one peer, and test its file.

    Attributes:
        peer: name of the peer.
        checkpoint: path to a checkpoint, as for quant/ptq.py.
        data: data set, as for quant/ptq.py.
        out: folder of the peer.
        calibration_images: number of calibration images, of the training split.
        threads: number of threads for quantization and inference.
        test_images: number of test images. If not given, all.
    """

    peer: str
    checkpoint: Path
    data: str
    out: Path
    calibration_images: int = 512
    threads: int = 2
    test_images: int | None = None


def open_both(checkpoint: Path, data: str) -> tuple[ILLaMA, ImageData, Preprocessing]:
    """Opens network, data and preprocessing; raises UserError if the classes of network and data differ."""
    inputs = open_inputs(SourceOptions(checkpoint, data=data))
    return cast(ILLaMA, inputs.model), inputs.data, inputs.preprocessing


def work(options: WorkOptions, peers: dict[str, Peer] = PEERS) -> dict[str, Any]:
    """Quantizes, and tests in every runtime; returns the content of ``result.json``, and writes the logits."""
    peer = peers[options.peer]
    peer.check_installed()
    torch.set_num_threads(options.threads)
    model, data, preprocessing = open_both(options.checkpoint, options.data)
    transform = preprocessing.transform()
    images, _ = load_images(data.calibration(options.calibration_images), transform)
    checks = data.calibration(VALIDATION_IMAGES if peer.validates else 1)
    validation = load_images(checks, transform)
    result = make(peer, Task(model, images, validation, options.out))
    path = options.out / result["file"]
    engines = {}
    for runtime in peer.runtimes:
        try:
            engines[runtime] = loaded_and_tried(runtime, path, options, images[:1])
        except Exception as error:  # reported in the table
            result["failed"][runtime] = reason(error)
    test = data.test()
    subset = Subset(test, range(min(options.test_images or len(test), len(test))))  # type: ignore[arg-type]
    logits, labels = predict(engines, subset, transform, progress=False)
    np.save(options.out / LABELS, labels)
    for runtime, values in logits.items():
        np.save(options.out / logits_file(runtime), values)
    return result


def make(peer: Peer, task: Task) -> dict[str, Any]:
    """Runs a peer; returns its file, seconds, MB, the peak memory of this process so far, and versions."""
    for module, _ in peer.needs:
        __import__(module)  # so that it is not timed
    start = time.perf_counter()
    path = peer.make(task)
    seconds = time.perf_counter() - start
    return {
        "file": path.name,
        "seconds": seconds,
        "peak_gib": peak_memory_gib(),
        "mb": sum(file.stat().st_size for file in task.folder.glob("model.*")) / 1e6,
        "about": peer.about,
        "versions": package_versions() | peer_versions(),
        "findings": count_findings(path)[0] or "none" if path.suffix == ".onnx" else None,
        "failed": {},
    }


def loaded_and_tried(runtime: str, path: Path, options: WorkOptions, image: np.ndarray) -> Infer:
    """Loads the file in a runtime, and calls it with one image."""
    infer = LOADERS[runtime](path, options.checkpoint, options.threads)
    infer(image)
    return infer


def logits_file(runtime: str) -> str:
    """Returns the name of the file of a runtime's logits for the test split."""
    return f"logits-{runtime.replace(' ', '-')}.npy"


def peer_versions() -> dict[str, str]:
    """Returns the versions of the peers' packages that are installed."""
    found = {name: next(iter(metadata.distributions(name=name)), None) for name in _PACKAGES}
    return {name: package.version for name, package in found.items() if package}


def main(options: WorkOptions) -> None:
    be_quiet()
    options.out.mkdir(parents=True, exist_ok=True)
    result: dict[str, Any]
    try:
        result = work(options)
    except Exception as error:  # reported in the table; the log has the traceback
        result = {"error": reason(error)}
        if not isinstance(error, UserError):
            import traceback

            traceback.print_exc()
    with write_file(options.out / RESULT) as draft:
        draft.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    run_command(WorkOptions, main)
