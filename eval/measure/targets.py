"""Benchmark targets of bundles: each file paired with each runtime that can run it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
from torch import nn

from deploy.runtimes.cpu_runtime import runs_in_openvino
from deploy.runtimes.engine import Engine
from deploy.runtimes.names import TITLES
from deploy.runtimes.onnxruntime_engine import OnnxRuntimeEngine
from deploy.runtimes.open_engine import load_engine
from deploy.runtimes.openvino_engine import OpenVinoEngine
from deploy.runtimes.torch_engine import TorchEngine
from deploy.runtimes.verification import verify
from deploy.trt.record import ENGINE, EngineRecord, find_engines
from eval.measure.open_bundles import check_alike
from eval.measure.reopened_engine import EngineStore, ReopenedEngine, engine_store
from eval.report.decision import RowKey
from illama.atomic_write import bundles_in
from illama.bundle import CPU_ONNX, FUSED_ONNX, MANIFEST, SCHEME, TORCHAO, bundle_of, sha256
from illama.errors import UserError, check_exists
from illama.graph.emulate_half import half_dtypes
from illama.graph.reader import load_graph
from illama.inference import Infer
from illama.manifest import EMULATED, Manifest
from illama.progress import track


@dataclass(frozen=True)
class NotTimed:
    """Why a target is not timed.

    Attributes:
        reason: the runtime emulates the file's formats; this machine cannot run the engine; or there is no engine.
        sentence: the reason for people.
    """

    reason: Literal["emulated", "cannot run", "no engine"]
    sentence: str


@dataclass(frozen=True)
class BenchmarkTarget:
    """A file in a runtime.

    Attributes:
        scheme: scheme of its bundle.
        path: the ONNX file, or PyTorch's weights.
        engine: engine that computes its logits on this machine; targets may share one.
        runtime: the runtime that the file is for, for people.
        runtime_id: the runtime's name, as :func:`deploy.runtimes.open_engine.open_engine` takes it.
        built: TensorRT engine built from the ONNX file, with its record (read once, because reading hashes the whole
            engine).
        emulates: whether the engine emulates the half precision of a file for TensorRT.
        on_gpu: whether it runs on a GPU.
        precision: float type that the runtime chose for this machine; None if the file alone determines it.
        not_timed: why it is not timed; None if it is. ``engine`` then only computes its accuracy.
        left_out: messages about rejected engines of its bundle.
    """

    scheme: str
    path: Path
    engine: Engine
    runtime: str
    runtime_id: str
    built: tuple[Path, EngineRecord] | None = None
    emulates: bool = False
    on_gpu: bool = False
    not_timed: NotTimed | None = None
    left_out: tuple[str, ...] = ()
    precision: str | None = None

    @property
    def name(self) -> str:
        """Unique name for people; :attr:`key` identifies the target."""
        return f"{self.scheme}, {self.runtime}"

    @property
    def file(self) -> Path:
        """The deployed file: the engine if there is one."""
        return self.built[0] if self.built else self.path

    @property
    def key(self) -> RowKey:
        file = self.file.parent.resolve() / self.file.name  # in a cache of downloads the file itself may be a link
        return RowKey(self.scheme, self.runtime_id, file.relative_to(bundle_of(file)).as_posix())

    @property
    def is_emulated(self) -> bool:
        """Whether this machine only emulates the formats of its file."""
        return self.emulates or (self.not_timed is not None and self.not_timed.reason == "emulated")

    @property
    def is_float(self) -> bool:
        """Whether its bundle is not quantized."""
        return not (bundle_of(self.path) / SCHEME).exists()

    def infer(self, images: np.ndarray) -> np.ndarray:
        """Returns the logits of any number of images, in calls of batch sizes that the engine takes."""
        if self.built is None or self.not_timed:
            return self.engine.infer(images)
        min_batch, _, max_batch = self.built[1].batch
        return in_calls_of(self.engine.infer, images, min_batch, max_batch)


class FailedEngine(Engine):
    """An engine that cannot be opened, or whose answers are wrong; ``infer`` raises the UserError that says so."""

    def __init__(self, error: UserError) -> None:
        self.runtime, self._error = "failed", error

    def infer(self, images: np.ndarray) -> np.ndarray:
        """Raises UserError."""
        raise self._error


def _open(load: Callable[[], Engine], file: Path, store: EngineStore) -> Engine:
    """Returns the verified engine of a file, or a :class:`FailedEngine`."""
    try:
        return _verified(ReopenedEngine(load, file, store), file)
    except UserError as error:
        return FailedEngine(error)


def _verified(engine: Engine, file: Path) -> Engine:
    """Returns the engine; a :class:`FailedEngine` if its golden answers are wrong."""
    try:
        engine.verified = verify(engine, file)
    except UserError as error:
        return FailedEngine(error)
    return engine


def in_calls_of(infer: Infer, images: np.ndarray, min_batch: int, max_batch: int) -> np.ndarray:
    """Returns the logits of images (n, C, H, W), in calls of ``min_batch`` to ``max_batch`` images.

    The last call repeats its last image if it would be too small.
    """
    parts = []
    for start in range(0, len(images), max_batch):
        part = images[start : start + max_batch]
        padded = np.concatenate([part, np.repeat(part[-1:], max(0, min_batch - len(part)), axis=0)])
        parts.append(infer(padded)[: len(part)])
    return np.concatenate(parts)


def find_targets(
    given: Sequence[Path], networks: Mapping[str, nn.Module] | None = None, threads: int = 0
) -> list[BenchmarkTarget]:
    """Returns the targets of bundles: files for CPUs first, then those for PyTorch, then those for TensorRT.

    Args:
        given: bundles, or single files or engines of them.
        networks: bundle's name -> its network for PyTorch, if it is in memory already.
        threads: number of CPU threads of ONNX Runtime and OpenVINO; 0 for one per core.

    Raises:
        UserError: a path is given twice, has nothing to run, cannot run, or takes other images than the first.
    """
    check_alike(given)
    store = engine_store()
    by_path = [
        [
            [*_on_cpu(path, scheme, threads, store)],
            [*_in_torch(path, scheme, networks or {}, store)],
            [*_in_tensorrt(path, scheme, threads, store)],
        ]
        for path, scheme in track([*zip(given, scheme_names(given), strict=True)], "open", "bundle")
    ]
    for path, kinds in zip(given, by_path, strict=True):
        if not any(kinds):
            raise UserError(
                f"{path} has no {CPU_ONNX}, {FUSED_ONNX} or {TORCHAO}: run python quant/ptq.py first, or leave it out"
            )
    found = [each for kind in zip(*by_path, strict=True) for targets in kind for each in targets]
    names, keys = [each.name for each in found], [each.key for each in found]
    if twice := [name for name, key in zip(names, keys, strict=True) if keys.count(key) > 1 or names.count(name) > 1]:
        raise UserError(f"{twice[0]} was given twice, by its bundle and by its file: give it once")
    return found


def choose_reference(targets: Sequence[BenchmarkTarget]) -> BenchmarkTarget:
    """Returns the target that the others are compared with: the first of a float network, or the first without one.

    :func:`find_targets` puts files for CPUs first, so that FP32 comes before half precision.
    """
    return next((each for each in targets if each.is_float), targets[0])


def expand(given: Sequence[Path]) -> list[Path]:
    """Expands folders of bundles to the bundles that can run, and folders of engines to their files.

    Returns:
        The paths, with the bundles of float networks first. UserError if one does not exist, or holds no such bundle.
    """
    paths: list[Path] = []
    for path in given:
        if not check_exists(path).is_dir() or (path / MANIFEST).exists() or bundle_of(path) != path:
            paths.append(path / ENGINE if path.is_dir() and bundle_of(path) != path else path)
            continue
        bundles = bundles_in(path, (CPU_ONNX, FUSED_ONNX, TORCHAO))
        if not bundles:
            raise UserError(f"{path} is not a bundle and holds none that can run: run python quant/ptq.py first")
        paths += bundles
    if not paths:
        raise UserError("no bundles given: give at least one, such as runs/ptq/fp32, or a folder of them")
    return sorted(paths, key=lambda path: (bundle_of(path) / SCHEME).exists())  # the sort is stable


def scheme_names(given: Sequence[Path]) -> list[str]:
    """Returns the names of the bundles; if names repeat, their paths within the folder that holds all of them.

    Raises:
        UserError: a path is given twice.
    """
    if len({path.resolve() for path in given}) < len(given):
        raise UserError("a path was given twice: give each path once")
    folders = [bundle_of(path).resolve() for path in given]
    if len({folder.name for folder in folders}) == len(set(folders)):
        return [folder.name for folder in folders]
    root = os.path.commonpath([folder.parent for folder in folders])
    return [folder.relative_to(root).as_posix() for folder in folders]


def _on_cpu(path: Path, scheme: str, threads: int, store: EngineStore) -> Iterator[BenchmarkTarget]:
    graph = path / CPU_ONNX if path.is_dir() else path
    if graph.suffix != ".onnx" or graph.name == FUSED_ONNX or not graph.exists():
        return
    quantization = Manifest.read(graph.parent).quantization
    emulated = quantization and quantization.emulated
    not_timed = NotTimed("emulated", f"Not timed: {EMULATED[emulated]}") if emulated else None
    engine = _open(partial(OnnxRuntimeEngine, graph, threads), graph, store)
    yield BenchmarkTarget(scheme, graph, engine, "ONNX Runtime, CPU", "onnxruntime", not_timed=not_timed)
    if not isinstance(engine, FailedEngine) and runs_in_openvino(graph):
        other = _open(partial(OpenVinoEngine, graph, threads), graph, store)
        floats = other.floats if isinstance(other, ReopenedEngine) else None
        yield BenchmarkTarget(scheme, graph, other, "OpenVINO, CPU", "openvino", not_timed=not_timed, precision=floats)


def _in_torch(
    path: Path, scheme: str, networks: Mapping[str, nn.Module], store: EngineStore
) -> Iterator[BenchmarkTarget]:
    weights = path / TORCHAO if path.is_dir() else path
    if weights.name != TORCHAO or not weights.exists():
        return
    network = networks.get(weights.parent.name)
    given = partial(TorchEngine, network, "cpu") if network is not None else partial(load_engine, weights)
    engine = _open(given, weights, store)
    on_gpu = "cuda" in engine.runtime
    yield BenchmarkTarget(scheme, weights, engine, f"PyTorch, {'GPU' if on_gpu else 'CPU'}", "torch", on_gpu=on_gpu)


def _in_tensorrt(path: Path, scheme: str, threads: int, store: EngineStore) -> Iterator[BenchmarkTarget]:
    """Yields the engines built from a fused graph; for those that cannot run here, half precision is emulated."""
    graph = bundle_of(path) / FUSED_ONNX
    whole = path.is_dir() or path.name == FUSED_ONNX
    if not graph.exists() or not (whole or path.suffix == ".engine"):
        return
    usable, left_out = _engines_of(graph)
    engines = usable if whole else [(path, _read_record(path, graph))]
    substitute, halves = None, tuple[str, ...]()
    with suppress(UserError):  # its engine says that it is damaged
        halves = half_dtypes(load_graph(graph))
    emulated = f", emulated in {' and '.join(halves)}" if halves else ""
    for built, record in engines:
        title = TITLES.get(record.library, record.library)
        if sum(each.library == record.library for _, each in usable) > 1:
            title += f", {built.parent.name if built.name == ENGINE else built.stem}"
        try:
            engine, not_timed = _verified(load_engine(built), built), None
        except UserError as error:  # no GPU, or another than it was built for
            engine = substitute = substitute or _open(partial(OnnxRuntimeEngine, graph, threads), graph, store)
            title += emulated
            trouble = str(error).replace(str(built), "it")
            not_timed = NotTimed(
                "cannot run", f"Accuracy is that of the ONNX file the engine was built from{emulated}: {trouble}"
            )
        target = BenchmarkTarget(
            scheme, graph, engine, title, record.library, built=(built, record), not_timed=not_timed
        )
        here = not_timed is None
        yield replace(target, emulates=not here and bool(halves), on_gpu=here, left_out=left_out if whole else ())
    if not engines:
        not_timed = NotTimed("no engine", "No engine was built from it, or none can be used")
        engine = _open(partial(OnnxRuntimeEngine, graph, threads), graph, store)
        target = BenchmarkTarget(scheme, graph, engine, f"TensorRT{emulated}", "tensorrt", not_timed=not_timed)
        yield replace(target, emulates=bool(halves), left_out=left_out)


def _engines_of(graph: Path) -> tuple[list[tuple[Path, EngineRecord]], tuple[str, ...]]:
    """Returns the engines built from a bundle's graph, with their records, and messages about those left out."""
    engines, left_out = [], []
    for path in find_engines(graph.parent):
        try:
            engines.append((path, _read_record(path, graph)))
        except UserError as error:
            left_out.append(f"The engine {path} was left out: {error}.")
    return engines, tuple(left_out)


def _read_record(engine: Path, graph: Path) -> EngineRecord:
    record = EngineRecord.read(engine)
    if record.onnx_sha256 != sha256(graph):
        raise UserError(f"{engine} was built from another {graph.name}: run python deploy/build.py again")
    return record
