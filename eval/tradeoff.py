"""Accuracy and latency of every file in a set of bundles, under the same conditions."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.utils.data import Dataset

from deploy.engines import OnnxRuntimeEngine
from eval.accuracy_drop import paired_drop
from eval.latency import measure_latency
from eval.machine import describe_machine
from eval.report import Row
from illama.accuracy import Infer, load_images, predict, torch_infer
from illama.bundle import CPU_ONNX, ENGINES, FUSED_ONNX, TORCHAO, Manifest
from illama.data import Sample, Transform

LIBRARY_TITLES = {"tensorrt": "TensorRT", "tensorrt_rtx": "TensorRT-RTX"}


def weigh(
    bundles: Sequence[Path],
    test: Dataset[Sample],
    transform: Transform,
    seed: int = 0,
    networks: Mapping[str, nn.Module] | None = None,
) -> list[Row]:
    """One row for each file that runs, over the whole test split, and timed at batch 1 where that has a meaning.

    The first bundle's ``model.onnx`` is the reference that drops are against. The bundles stand in one folder, each
    under the name of its scheme.

    Args:
        networks: by the bundle's name, those that run inside PyTorch.
    """
    networks = networks or {}
    paths = [
        bundle / name for name in (CPU_ONNX, TORCHAO, FUSED_ONNX) for bundle in bundles if (bundle / name).exists()
    ]
    engines = {str(path): _engine(path, networks) for path in paths}
    logits, labels = predict(engines, test, transform)
    correct = {name: values.argmax(1) == labels for name, values in logits.items()}
    rows = [_row(path, correct[str(path)], correct[str(paths[0])], seed) for path in paths]
    timed = {str(path): row for path, row in zip(paths, rows, strict=True) if path.name != FUSED_ONNX and not row.note}
    for name, latency in measure_latency(
        {name: engines[name] for name in timed}, load_images(test, transform, 1)[0]
    ).items():
        timed[name].latency, timed[name].device = latency, describe_machine()["cpu"]
    return rows


def _engine(path: Path, networks: Mapping[str, nn.Module]) -> Infer:
    return torch_infer(networks[path.parent.name]) if path.name == TORCHAO else OnnxRuntimeEngine(path).infer


def _row(path: Path, correct: np.ndarray, reference: np.ndarray, seed: int) -> Row:
    inside_torch = path.name == TORCHAO
    row = Row(
        scheme=path.parent.name,
        runtime="PyTorch, CPU" if inside_torch else "ONNX Runtime, CPU",
        evaluated_with=f"torch {torch.__version__} CPU" if inside_torch else OnnxRuntimeEngine.runtime,
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
