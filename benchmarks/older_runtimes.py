"""Loads graphs in older opsets in older versions of ONNX Runtime: python benchmarks/older_runtimes.py

Writes the bundles of ``python quant/ptq.py`` (``--bundles``) in opset 17, 19, 21 and 23, runs each of their graphs in
each version of ONNX Runtime, and compares the logits of test images with those of the original graph in the installed
version. Graphs for TensorRT run without ONNX Runtime's optimizations, some of which round their scales once more; so
does a graph that a version refuses with them. TensorRT-RTX builds every graph for TensorRT. Installs each version, with
a NumPy that it was built for, in a folder of its own in ``runs/older-runtimes``. Writes ``older-runtimes.json`` and
``older-runtimes.md`` to ``results/older-runtimes``.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from illama.cli import run_command
from deploy.rewrites.older_bundle import write_older_bundle
from deploy.trt.builder import build_engine
from deploy.trt.engine_options import EngineOptions
from deploy.trt.library import find_library
from deploy.versions import opset_target
from eval.report.store import write_results
from illama.atomic_write import bundles_in
from illama.bundle import CPU_ONNX, FUSED_ONNX
from illama.data.datasets import open_data
from illama.errors import UserError
from illama.graph.session import cpu_session
from illama.inference import load_images
from illama.manifest import Manifest
from illama.markdown_table import markdown
from illama.options import Count

VERSIONS = {"1.16.3": "1.26.4", "1.18.1": "1.26.4", "1.20.1": "2.2.6", "1.23.2": "2.2.6"}  # and NumPy's
OPSETS = (17, 19, 21, 23)
_FOLDER = Path("runs/older-runtimes")
_SCRIPT = """
import sys, numpy, onnxruntime
options = onnxruntime.SessionOptions()
options.log_severity_level = 4
if sys.argv[4] == "off":
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
session = onnxruntime.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
numpy.save(sys.argv[3], session.run(None, {"images": numpy.load(sys.argv[2])})[0])
"""


@dataclass(frozen=True)
class OlderOptions:
    """Load graphs in older opsets in older versions of ONNX Runtime, and compare their logits.

    Attributes:
        bundles: path to a folder of bundles.
        images: number of test images.
        out: folder for the results.
    """

    bundles: Path = Path("runs/ptq")
    images: Count = 64
    out: Path = Path("results/older-runtimes")


def main(options: OlderOptions) -> None:
    for version, numpy_version in VERSIONS.items():
        _install(version, numpy_version)
    rows = []
    for bundle in bundles_in(options.bundles, [CPU_ONNX, FUSED_ONNX]):
        images = _images(bundle, options.images)
        for opset in OPSETS:
            for row in _rows(bundle, opset, images):
                rows.append(row)
                print(row, flush=True)
    columns = ["bundle", "graph", "opset", *(f"ONNX Runtime {version}" for version in VERSIONS), "TensorRT-RTX"]
    table = markdown(columns, [[str(value) for value in row.values()] for row in rows])
    write_results(options.out, "older-runtimes", {"rows": rows}, table)


def _install(version: str, numpy_version: str) -> None:
    target = _FOLDER / f"onnxruntime-{version}"
    if not target.exists():
        packages = [f"onnxruntime=={version}", f"numpy=={numpy_version}"]
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
        subprocess.run([*pip, "--target", target, *packages], check=True)


def _images(bundle: Path, count: int) -> np.ndarray:
    manifest = Manifest.read(bundle)
    assert manifest.provenance.source is not None
    split = open_data(manifest.provenance.source.data).test()
    return load_images(split, manifest.preprocessing.transform(), count)[0]


def _rows(bundle: Path, opset: int, images: np.ndarray) -> Sequence[dict[str, Any]]:
    """Returns a row for each graph of a bundle that can be written in an opset: what each runtime makes of it."""
    older = _FOLDER / "bundles" / f"{bundle.name}-{opset}"
    try:
        write_older_bundle(bundle, opset_target(opset), older)
    except UserError:
        return []
    rows = []
    for name in (name for name in (CPU_ONNX, FUSED_ONNX) if (older / name).exists()):
        fused = name == FUSED_ONNX
        expected = cpu_session(bundle / name, fused=fused).run(None, {"images": images})[0]
        row: dict[str, Any] = {"bundle": bundle.name, "graph": name, "opset": opset}
        row |= {version: _try(version, older / name, images, expected) for version in VERSIONS}
        rows.append({**row, "TensorRT-RTX": _build(older / name) if fused else ""})
    return rows
    return rows


def _try(version: str, path: Path, images: np.ndarray, expected: np.ndarray) -> str:
    """Returns the largest difference of the logits, relative to the largest logit; or that the graph does not load."""
    environment = {**os.environ, "PYTHONPATH": str(_FOLDER / f"onnxruntime-{version}")}
    given, result = _FOLDER / "images.npy", _FOLDER / "logits.npy"
    np.save(given, images)
    for optimizations in ("off",) if path.name == FUSED_ONNX else ("on", "off"):
        command = [sys.executable, "-c", _SCRIPT, *map(str, (path, given, result)), optimizations]
        if subprocess.run(command, env=environment, capture_output=True).returncode == 0:
            found = np.load(result)
            error = float(np.abs(found - expected).max() / np.abs(expected).max())
            same = float((found.argmax(-1) == expected.argmax(-1)).mean())
            suffix = ", without optimizations" if optimizations == "off" and path.name == CPU_ONNX else ""
            return f"{error:.1e}, {same:.0%} of classes{suffix}"
    return "does not load"


def _build(path: Path) -> str:
    library = find_library("tensorrt_rtx")
    if library is None:
        return "not installed"
    try:
        built = build_engine(library, path, EngineOptions(targets=("sm89",), batch=(1, 1, 8), allow_unfused=True))
    except UserError as error:
        return str(error)[:80]
    return f"builds, {built.attentions} attentions as one operator"


if __name__ == "__main__":
    run_command(OlderOptions, main)
