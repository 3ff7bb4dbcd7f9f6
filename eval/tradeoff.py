"""Accuracy and latency of every ONNX file in a set of bundles, under the same conditions."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from torch.utils.data import Dataset

from deploy.engines import OnnxRuntimeEngine
from eval.accuracy_drop import paired_drop
from eval.latency import measure_latency
from eval.machine import describe_machine
from eval.report import Row
from illama.accuracy import load_images, predict
from illama.bundle import CPU_ONNX, ENGINES, FUSED_ONNX, Manifest
from illama.data import Sample, Transform

LIBRARY_TITLES = {"tensorrt": "TensorRT", "tensorrt_rtx": "TensorRT-RTX"}


def weigh(bundles: Sequence[Path], test: Dataset[Sample], transform: Transform, seed: int = 0) -> list[Row]:
    """One row for each ONNX file, run over the whole test split and timed at batch 1 where that has a meaning.

    The first bundle's ``model.onnx`` is the reference that drops are against. The bundles stand in one folder, each
    under the name of its scheme.
    """
    paths = [bundle / name for name in (CPU_ONNX, FUSED_ONNX) for bundle in bundles if (bundle / name).exists()]
    engines = {str(path): OnnxRuntimeEngine(path).infer for path in paths}
    logits, labels = predict(engines, test, transform)
    correct = {name: values.argmax(1) == labels for name, values in logits.items()}
    rows = [_row(path, correct[str(path)], correct[str(paths[0])], seed) for path in paths]
    del engines
    _time(bundles, rows, load_images(test, transform, limit=1)[0])
    return rows


def _time(bundles: Sequence[Path], rows: Sequence[Row], images: np.ndarray) -> None:
    """Fill in the latency of the CPU's rows, but for those whose speed says nothing."""
    device = describe_machine()["cpu"]
    timed = {row.onnx: row for row in rows if row.onnx.endswith(f"/{CPU_ONNX}") and row.note is None}
    engines = {name: OnnxRuntimeEngine(bundles[0].parent / name).infer for name in timed}
    for name, latency in measure_latency(engines, images).items():
        timed[name].latency, timed[name].device = latency, device


def _row(path: Path, correct: np.ndarray, reference: np.ndarray, seed: int) -> Row:
    row = Row(
        scheme=path.parent.name,
        runtime="ONNX Runtime, CPU",
        evaluated_with=OnnxRuntimeEngine.runtime,
        images=len(correct),
        top1=float(correct.mean() * 100),
        drop=paired_drop(reference, correct, seed),
        onnx=f"{path.parent.name}/{path.name}",
        onnx_bytes=path.stat().st_size,
    )
    if path.name == FUSED_ONNX:
        _describe_engine(row, path.parent)
    elif reason := Manifest.read(path.parent).metrics.get("not_timed"):
        row.note = f"Not timed: {reason}"
    return row


def _describe_engine(row: Row, bundle: Path) -> None:
    """Fill in the engine that was built from the row's graph, if one was."""
    row.runtime, row.note = "TensorRT", "No engine was built from it"
    for engine in sorted((bundle / ENGINES).glob("*.engine")):
        record = json.loads(engine.with_suffix(".json").read_text())
        row.runtime = LIBRARY_TITLES[record["library"]]
        row.engine, row.engine_bytes = f"{bundle.name}/{ENGINES}/{engine.name}", record["engine_bytes"]
        row.note = "It is the graph that the engine was built from; the engine itself was not run"
