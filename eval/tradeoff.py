"""Accuracy and latency of every file in a set of bundles, under the same conditions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import nn
from torch.utils.data import Dataset

from deploy.engines import Engine, OnnxRuntimeEngine, OpenVinoEngine, TorchEngine, cpu_runtime, open_engine
from deploy.record import EngineRecord
from deploy.tensorrt_library import TITLES
from eval.accuracy_drop import paired_drop
from eval.latency import measure_latency
from eval.machine import describe_machine
from eval.report import Row
from illama.accuracy import load_images, predict
from illama.bundle import CPU_ONNX, ENGINES, FUSED_ONNX, TORCHAO, Manifest
from illama.data import Sample, Transform
from illama.errors import UserError


@dataclass(frozen=True)
class Candidate:
    """A file and what runs it.

    Attributes:
        runtime: what the file is for, in words.
        note: why that is not what runs it here.
    """

    path: Path
    engine: Engine
    runtime: str
    note: str | None = None

    @property
    def name(self) -> str:
        return f"{self.path} in {self.engine.runtime}"


def weigh(
    bundles: Sequence[Path],
    test: Dataset[Sample],
    transform: Transform,
    seed: int = 0,
    networks: Mapping[str, nn.Module] | None = None,
) -> list[Row]:
    """One row for each file and runtime, over the whole test split, and timed at batch 1 where that has a meaning.

    The first bundle's ``model.onnx`` in ONNX Runtime is the reference that drops are against. The bundles stand in one
    folder, each under the name of its scheme.

    Args:
        networks: by the bundle's name, those that run inside PyTorch.
    """
    candidates = find_candidates(bundles, networks or {})
    logits, labels = predict({each.name: each.engine.infer for each in candidates}, test, transform)
    correct = {name: values.argmax(1) == labels for name, values in logits.items()}
    rows = {each.name: _row(each, correct[each.name], correct[candidates[0].name], seed) for each in candidates}
    rows[candidates[0].name].reference = True
    timed = {each.name: each.engine.infer for each in candidates if not rows[each.name].note}
    for name, (latency,) in measure_latency(timed, load_images(test, transform, 1)[0]).latency.items():
        machine = describe_machine()
        on_gpu = rows[name].runtime in TITLES.values()  # what is not run there has a note, and is not timed
        rows[name].latency, rows[name].device = latency, machine["gpu" if on_gpu else "cpu"]
    for each in candidates:
        each.engine.close()
    return list(rows.values())


def find_candidates(bundles: Sequence[Path], networks: Mapping[str, nn.Module]) -> list[Candidate]:
    """Every file of the bundles in every runtime that it is for here: CPU files, PyTorch's, TensorRT's."""
    found = []
    for path in (bundle / CPU_ONNX for bundle in bundles if (bundle / CPU_ONNX).exists()):
        found.append(Candidate(path, OnnxRuntimeEngine(path), "ONNX Runtime, CPU"))
        if cpu_runtime(path) == "openvino":
            engine = OpenVinoEngine(path)
            found.append(Candidate(path, engine, f"OpenVINO, CPU ({engine.floats})"))
    for path in (bundle / TORCHAO for bundle in bundles if (bundle / TORCHAO).exists()):
        found.append(Candidate(path, TorchEngine(networks[path.parent.name], "cpu"), "PyTorch, CPU"))
    for path in (bundle / FUSED_ONNX for bundle in bundles if (bundle / FUSED_ONNX).exists()):
        found.append(_of_fused(path))
    return found


def _of_fused(path: Path) -> Candidate:
    """The engine built from a fused graph if it runs here, else the graph itself in ONNX Runtime."""
    engines = sorted((path.parent / ENGINES).glob("*.engine"))
    if not engines:
        return Candidate(path, OnnxRuntimeEngine(path), "TensorRT", "No engine was built from it")
    title = TITLES[EngineRecord.read(engines[0]).library]
    try:
        return Candidate(path, open_engine(engines[0]), title)
    except UserError as error:  # no GPU, or another than it was built for: the rest of the table is worth having
        note = f"It is the graph that the engine was built from; the engine itself was not run: {error}"
        return Candidate(path, OnnxRuntimeEngine(path), title, note)


def _row(candidate: Candidate, correct: np.ndarray, reference: np.ndarray, seed: int) -> Row:
    path = candidate.path
    row = Row(
        scheme=path.parent.name,
        runtime=candidate.runtime,
        evaluated_with=candidate.engine.runtime,
        images=len(correct),
        top1=float(correct.mean() * 100),
        drop=paired_drop(reference, correct, seed),
        onnx=f"{path.parent.name}/{path.name}",
        onnx_bytes=path.stat().st_size,
    )
    if path.name == FUSED_ONNX:
        row.note = candidate.note
        _describe_engine(row, path.parent)
    elif reason := Manifest.read(path.parent).metrics.get("not_timed"):
        row.note = f"Not timed: {reason}"
    return row


def _describe_engine(row: Row, bundle: Path) -> None:
    """Fill in the engine that was built from the row's graph, if one was."""
    for engine in sorted((bundle / ENGINES).glob("*.engine"))[:1]:
        record = EngineRecord.read(engine)
        row.engine, row.engine_bytes = f"{bundle.name}/{ENGINES}/{engine.name}", record.engine_bytes
        row.fused = record.fused
