"""The runtime of an ONNX file on this CPU: the fastest one, measured once (docs/cpu.md).

Which one that is depends on the network, the batch and the CPU, so that no rule is right everywhere. What was measured
is kept beside the file as ``fastest.json``, or in the cache folder if the file's folder is read-only.
"""

from __future__ import annotations

import importlib.util
import math
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import cast

import numpy as np
import onnx_ir as ir

from deploy.runtimes.engine import Engine
from deploy.runtimes.kept_facts import keep_fact, kept_facts, stamp
from deploy.runtimes.names import RuntimeName
from deploy.runtimes.onnxruntime_engine import OnnxRuntimeEngine
from deploy.runtimes.openvino_engine import OpenVinoEngine
from deploy.runtimes.verification import verify
from illama.bundle import package_versions
from illama.errors import UserError
from illama.graph.emulate_half import half_dtypes
from illama.graph.reader import has_4bit_activations, has_constant, load_graph
from illama.hardware import cpu_name, usable_cores
from illama.progress import Activity

FASTEST = "fastest.json"
_TURNS = 2  # of each runtime
_SECONDS = 0.12  # of timed calls in a turn
_SETTLE = 0.03  # seconds of calls before them, while the threads of the other runtime go to sleep
_RUNTIMES: dict[str, type[OnnxRuntimeEngine | OpenVinoEngine]] = {
    "onnxruntime": OnnxRuntimeEngine,
    "openvino": OpenVinoEngine,
}


@dataclass(frozen=True)
class CpuLatency:
    """The latency of a file in the runtimes of a CPU.

    Attributes:
        file, bytes, modified_ns: of the file (:func:`deploy.runtimes.kept_facts.stamp`).
        device: the processor.
        threads: number of threads.
        versions: version of each runtime.
        milliseconds: runtime -> median latency at batch 1. A runtime that does not run the file, or gives wrong
            answers, is not in it.
    """

    file: str
    bytes: int
    modified_ns: int
    device: str
    threads: int
    versions: Mapping[str, str]
    milliseconds: Mapping[str, float]

    @classmethod
    def of(cls, path: Path, milliseconds: Mapping[str, float], threads: int = 0) -> CpuLatency:
        """Returns what was measured on this CPU."""
        installed = package_versions()
        versions = {name: installed.get(name, "") for name in _RUNTIMES}
        return cls(*stamp(path), cpu_name(), threads or usable_cores(), versions, {**milliseconds})

    def keep(self, path: Path) -> None:
        """Keeps it, so that the file is not measured again here."""
        keep_fact(path, FASTEST, self, self.is_same)

    def is_same(self, other: CpuLatency) -> bool:
        """Whether another measurement is of the same file on the same CPU, with the same threads and versions."""
        return vars(self) | {"milliseconds": None} == vars(other) | {"milliseconds": None}


def cpu_runtime(path: Path, threads: int = 0) -> RuntimeName:
    """Returns the fastest runtime for an ONNX file on this CPU at batch 1, among those with right answers.

    It is measured if it has not been: about a second for a small network, after both runtimes have opened it.

    Args:
        threads: number of threads; 0 for one per core.
    """
    return next(iter(cpu_latencies(path, threads)))


def cpu_latencies(path: Path, threads: int = 0) -> dict[RuntimeName, float]:
    """Returns runtime -> median latency in milliseconds, the fastest first; see :func:`cpu_runtime`.

    If there is nothing to choose, nothing is measured, and the latency is NaN.
    """
    if not runs_in_openvino(path):
        return {"onnxruntime": math.nan}
    asked = CpuLatency.of(path, {}, threads)
    measured = next(filter(asked.is_same, kept_facts(path, FASTEST, CpuLatency)), None)
    if measured is None:
        measured = CpuLatency.of(path, _measure(path, threads), threads)
        if measured.milliseconds:
            measured.keep(path)
    in_order = sorted((value, name) for name, value in measured.milliseconds.items() if name in _RUNTIMES)
    found = {cast(RuntimeName, name): value for value, name in in_order}
    return found or {"onnxruntime": math.nan}  # which says what is wrong when it opens the file


def runs_in_openvino(path: Path) -> bool:
    """Returns whether OpenVINO is installed and supports an ONNX file: no FP8, 4-bit activations, half precision."""
    if importlib.util.find_spec("openvino") is None:
        return False
    model = load_graph(path)
    return not (has_constant(model, ir.DataType.FLOAT8E4M3FN) or has_4bit_activations(model) or half_dtypes(model))


def _measure(path: Path, threads: int) -> dict[str, float]:
    """Times the runtimes that run the file and have right answers; a warning says why another one is left out."""
    engines, failed = dict[str, Engine](), dict[str, Exception]()
    images = _example(path)
    with Activity(f"choose the runtime of {path.name}"):
        for name, kind in _RUNTIMES.items():
            try:
                engine = kind(path, threads)
                verify(engine, path)
                engine.infer(images)
            except (UserError, RuntimeError) as error:  # RuntimeError: of OpenVINO
                failed[name] = error
            else:
                engines[name] = engine
        latencies = _time(engines, images)
    for name, reason in failed.items() if engines else ():
        print(f"warning: {path} does not run in {name}: {reason}", file=sys.stderr)
    return latencies


def _example(path: Path) -> np.ndarray:
    """Returns noise that the graph takes as its input, at batch 1."""
    [value] = load_graph(path).graph.inputs
    sizes = [size if isinstance(size, int) else 1 for size in value.shape or ()]
    noise = np.random.default_rng(0).normal(size=[1, *sizes[1:]])
    return noise.astype((value.dtype or ir.DataType.FLOAT).numpy())


def _time(engines: Mapping[str, Engine], images: np.ndarray) -> dict[str, float]:
    """Returns the median milliseconds of a call of each engine; they take turns."""
    times: dict[str, list[float]] = {name: [] for name in engines}
    for name in [*engines] * _TURNS:
        _calls(engines[name], images, _SETTLE)
        times[name] += _calls(engines[name], images, _SECONDS)
    return {name: median(each) for name, each in times.items()}


def _calls(engine: Engine, images: np.ndarray, seconds: float) -> list[float]:
    """Returns the milliseconds of consecutive calls for some seconds, at least of one."""
    times: list[float] = []
    while sum(times) < seconds * 1000:
        start = time.perf_counter()
        engine.infer(images)
        times.append((time.perf_counter() - start) * 1000)
    return times
