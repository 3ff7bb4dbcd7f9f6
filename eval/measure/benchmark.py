"""Accuracy and latency of benchmark targets, measured under the same conditions, as the rows of a report."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from deploy.runtimes.cpu_runtime import CpuLatency
from deploy.runtimes.onnxruntime_engine import OnnxRuntimeEngine
from deploy.runtimes.temperature import store_temperatures
from eval.measure.benchmark_notes import layers_of, lint_targets, notes_on
from eval.measure.benchmark_rows import failed_row, flipped_images, make_row
from eval.measure.effort import describe_estimate, estimate_seconds, without_long_emulation
from eval.measure.evaluate_split import CHUNK, Evaluation, evaluate
from eval.measure.evaluation_images import EvaluationImages
from eval.measure.latency import TimingOptions, Timings
from eval.measure.machine import peak_memory_gib, pin_threads, share_of_cores, torch_on_all_cores
from eval.measure.reopened_engine import ReopenedEngine, engine_store, free, time_engines
from eval.measure.sensors import find_gpu, open_meter
from eval.measure.targets import BenchmarkTarget, choose_reference
from eval.metrics.calibration import fit_temperatures
from eval.metrics.measured import measure
from eval.metrics.paired import NO_DROP, drop_between
from eval.metrics.predictions import Evaluated, NotFinite, Predictions
from eval.report.pareto import decide
from eval.report.schema import FailedRow, HalfSoftmax, Report, Row
from eval.report.store import read_results
from illama.bundle import CPU_ONNX, as_run, bundle_of, command_line, package_versions, sha256
from illama.data.datasets import Transformed
from illama.errors import UserError
from illama.hardware import describe_machine, usable_cores
from illama.inference import Infer, load_images
from illama.manifest import Manifest, NumericRange
from illama.nearest_neighbors import NearestNeighbors
from illama.options import BenchmarkOptions
from illama.training.distributed import ALONE, Processes

_ELSEWHERE = (
    "Accuracy on corrupted and out-of-distribution images: python eval/robustness.py and python "
    "eval/out_of_distribution.py measure it, and --also adds their results to this report."
)

_VALUES = 1 << 23  # of the outputs of a model that are held at once
_LONG = 5000  # test images from which the time is estimated before the evaluation


@dataclass(frozen=True)
class BenchmarkResult:
    """The rows in the order of the targets.

    Attributes:
        conditions: the conditions during timing, such as threads and clocks.
        notes: what was not measured, and why.
        layers: scheme -> rows of (layer, format of its weight, format of its input).
        ranges: scheme -> the range of half precision that its graph for TensorRT uses.
        findings: ONNX file -> what the linter finds in it (:func:`deploy.findings.show.describe`).
        failed: the targets that could not be measured.
    """

    rows: list[Row]
    conditions: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    layers: dict[str, list[list[str]]] = field(default_factory=dict)
    ranges: dict[str, NumericRange] = field(default_factory=dict)
    findings: dict[str, list[str]] = field(default_factory=dict)
    failed: list[FailedRow] = field(default_factory=list)


@dataclass(frozen=True)
class Execution:
    """Where a benchmark runs, and in which processes.

    Attributes:
        out: folder of the report; paths in the rows are relative to it.
        work: folder for finished parts of the evaluation; see :func:`eval.measure.evaluate_split.evaluate`.
        restart: discard another evaluation in ``work``, instead of raising UserError.
        workers: number of processes that read images.
        processes: those that share the evaluation. The main one alone measures latency and returns rows.
        store: store each fitted temperature beside its file.
        reopen: opens the targets again for timing, with all cores, after several processes shared the cores.
    """

    out: Path
    work: Path | None = None
    restart: bool = False
    workers: int = 0
    processes: Processes = ALONE
    store: bool = False
    reopen: Callable[[], Sequence[BenchmarkTarget]] | None = None


def run_benchmark(
    targets: Sequence[BenchmarkTarget], images: EvaluationImages, options: BenchmarkOptions, execution: Execution
) -> BenchmarkResult:
    """Evaluates every target, and measures the latency of those that run here as they would be deployed.

    A target that fails does not affect the others.

    Raises:
        UserError: the reference fails, or a target's logits do not fit the images.
    """
    reference = choose_reference(targets)
    targets, left_out = without_long_emulation(targets, reference, len(images.split), options.emulate)  # type: ignore[arg-type]
    if features := images.features:
        transform, gallery = images.preprocessing.transform(), images.data.calibration(images.calibration)
        classes = len(images.data.classes) if images.data.labeled else 0
        neighbors = NearestNeighbors.of(reference.infer, gallery, transform, classes)
        images = replace(images, classifier=neighbors.logits)
    found = _evaluate(targets, images, execution, reference)
    if reason := found.failed.get(reference.name):
        raise UserError(f"{reference.name}, which the others are compared with: {reason}: check its checkpoint")
    manifests = {each.scheme: Manifest.read(bundle_of(each.path)) for each in targets}
    failed = [failed_row(each, found.failed[each.name]) for each in targets if each.name in found.failed]
    targets = [each for each in targets if each.name not in found.failed]
    base, labeled = found.predictions[reference.name].plain, images.data.labeled
    drops = {name: drop_between(base, each.plain, labeled, options.seed) for name, each in found.predictions.items()}
    doubtful = [each for each in targets if each.emulates and not drops[each.name].includes_zero]
    if doubtful:
        free(each.engine for each in targets)
    again = _evaluate_half_softmax(doubtful, images, execution)
    if not execution.processes.main:
        return BenchmarkResult([])
    notes = [*left_out, *found.notes, *(_store(targets, found.temperatures, images) if execution.store else [])]
    measured, rows = measure(found.predictions, found.temperatures, reference.name, labeled, features), []
    for each in targets:
        row = make_row(each, measured[each.name], execution.out)
        row.reference = each is reference
        row.drop = NO_DROP if row.reference else drops[each.name]
        row.flipped = flipped_images(row, base, found.predictions[each.name].plain, images)
        row.half_softmax = _half_softmax(base, again[each.name], labeled, options.seed) if each.name in again else None
        rows.append(row)
    targets = _reopened(targets, execution, options.threads)
    with torch_on_all_cores():
        conditions, unread = _time(targets, rows, images, options)
    _close(targets)
    notes += [*notes_on(targets, manifests), *unread]
    ranges = {scheme: each.numeric_range for scheme, each in manifests.items() if each.numeric_range}
    return BenchmarkResult(rows, conditions, notes, layers_of(manifests), ranges, lint_targets(targets), failed)


def _store(
    targets: Sequence[BenchmarkTarget], temperatures: Mapping[str, float], images: EvaluationImages
) -> list[str]:
    """Stores the temperatures beside their files; returns why some could not be stored."""
    fitted = [
        (each.path, temperatures[each.name], each.engine.runtime) for each in targets if each.name in temperatures
    ]
    return store_temperatures(fitted, images.calibration, images.name)


def _reopened(
    targets: Sequence[BenchmarkTarget], execution: Execution, threads: int | None
) -> Sequence[BenchmarkTarget]:
    """Returns the targets with all cores, if several processes shared these."""
    if execution.reopen is None or execution.processes.count == 1:
        return targets
    _close(targets)
    pin_threads(threads or usable_cores())
    names = {each.name for each in targets}
    return [each for each in execution.reopen() if each.name in names]


@dataclass(frozen=True)
class _Evaluations:
    """What the targets predict, by their names.

    Attributes:
        predictions: of the targets that have not failed.
        temperatures: those that were fitted.
        failed: the reason, of each other target.
        notes: why a target has no temperature.
    """

    predictions: dict[str, Evaluated]
    temperatures: dict[str, float]
    failed: dict[str, str]
    notes: list[str]


def _evaluate(
    targets: Sequence[BenchmarkTarget], images: EvaluationImages, execution: Execution, reference: BenchmarkTarget
) -> _Evaluations:
    """Evaluates each engine once; targets may share one."""
    manifest, transform = Manifest.read(bundle_of(reference.path)), images.preprocessing.transform()
    errors: dict[str, str] = {}
    first: dict[int, str] = {}
    shown = {each.name: first.setdefault(id(each.engine), each.name) for each in targets}
    models = {
        each.name: _guarded(each.name, each.infer, errors, manifest.output_shape)
        for each in targets
        if shown[each.name] == each.name
    }
    if execution.processes.main and (total := len(images.split)) >= _LONG:  # type: ignore[arg-type]
        print(describe_estimate(estimate_seconds(models, Transformed(images.split, transform)), total), flush=True)
    fitted_on = 0 if images.features else images.calibration
    temperatures, unfitted = fit_temperatures(models, images.data, transform, fitted_on, execution.processes)
    how = replace(
        _evaluation(targets, images, execution, ""), reference=shown[reference.name], labeled=images.data.labeled
    )
    results = evaluate(models, Transformed(images.split, transform), temperatures, how)
    execution.processes.barrier()  # until all have read what the others computed
    by_target = {name: results[model] for name, model in shown.items()}
    failed = {
        name: errors.get(shown[name], str(each)) for name, each in by_target.items() if isinstance(each, NotFinite)
    }
    return _Evaluations(
        {name: each for name, each in by_target.items() if isinstance(each, Evaluated)},
        {name: temperatures[model] for name, model in shown.items() if model in temperatures},
        failed,
        [f"{model} has no temperature: {reason}." for model, reason in unfitted.items() if model not in failed],
    )


def _evaluation(
    targets: Sequence[BenchmarkTarget], images: EvaluationImages, execution: Execution, part: str
) -> Evaluation:
    """Returns how a part of the benchmark is evaluated; ``part`` is its folder in the folder of finished work."""
    values = math.prod(Manifest.read(bundle_of(targets[0].path)).output_shape)
    return Evaluation(
        execution.work / part if execution.work else None,
        execution.workers,
        facts=_facts(targets, images),
        processes=execution.processes,
        chunk=max(1, min(CHUNK, _VALUES // values)),
        restart=execution.restart,
        classifier=images.classifier,
    )


def _guarded(name: str, infer: Infer, errors: dict[str, str], shape: tuple[int, ...]) -> Infer:
    """Returns a function whose outputs are not finite if ``infer`` fails, which adds the reason to ``errors``.

    Args:
        shape: shape of the output for an image.
    """

    def guarded(images: np.ndarray) -> np.ndarray:
        try:
            return infer(images)
        except UserError as error:
            errors[name] = str(error)
            return np.full((len(images), *shape), np.nan, np.float32)

    return guarded


def _evaluate_half_softmax(
    targets: Sequence[BenchmarkTarget], images: EvaluationImages, execution: Execution
) -> dict[str, Evaluated | NotFinite]:
    """Returns what emulated targets predict with the softmax inside attention in half precision, by their names."""
    graphs = {each.path: each for each in targets}
    if not graphs:
        return {}
    threads = share_of_cores() if execution.processes.count > 1 else 0
    store = engine_store()
    opens = {path: partial(OnnxRuntimeEngine, path, threads, softmax="half") for path in graphs}
    models = {each.name: ReopenedEngine(opens[path], path, store).infer for path, each in graphs.items()}
    how = _evaluation(targets, images, execution, "half_softmax")
    found = evaluate(models, Transformed(images.split, images.preprocessing.transform()), how=how)
    execution.processes.barrier()
    return {each.name: found[graphs[each.path].name] for each in targets}


def _half_softmax(reference: Predictions, found: Evaluated | NotFinite, labeled: bool, seed: int) -> HalfSoftmax:
    if isinstance(found, NotFinite):
        return HalfSoftmax()
    drop = drop_between(reference, found.plain, labeled, seed)
    return HalfSoftmax(float(reference.right.mean() * 100) - drop.points, drop)


def _facts(targets: Sequence[BenchmarkTarget], images: EvaluationImages) -> dict[str, Any]:
    """Returns what determines the predictions, besides the models' names and temperatures."""
    return {
        "data": images.name,
        "preprocessing": asdict(images.preprocessing),
        "classes": images.data.classes,
        "calibration": images.calibration,
        "files": {each.name: sha256(each.path) for each in targets},
        "runtimes": {each.name: each.engine.runtime for each in targets},
    }


def make_report(
    result: BenchmarkResult,
    images: EvaluationImages,
    options: BenchmarkOptions,
    checkpoint: str,
    seconds: Mapping[str, float],
    not_run: Sequence[str] = (),
) -> Report:
    """Returns the report of a benchmark.

    Args:
        checkpoint: path of the checkpoint that was quantized.
        seconds: duration of each step.
        not_run: reasons why something else was not measured.
    """
    shared = {name: value for name, value in vars(result).items() if name != "notes"}  # fields of the same names
    return Report(
        **shared,
        decision=decide(result.rows, options.constraints),
        command=command_line(),
        data=images.name,
        checkpoint=checkpoint,
        classes=tuple(images.data.classes),
        machine=describe_machine(),
        versions=package_versions(),
        constraints=options.constraints,
        calibration_images=images.calibration,
        seconds={**seconds, "all": sum(seconds.values())},
        not_run=[*not_run, *result.notes, *([] if options.also or images.features else [as_run(_ELSEWHERE)])],
        peak_memory_gib=round(peak_memory_gib(), 2),
        preprocessing=str(images.preprocessing),
        others=[other for folder in options.also for other in read_results(folder)],
    )


def _time(
    targets: Sequence[BenchmarkTarget], rows: Sequence[Row], images: EvaluationImages, options: BenchmarkOptions
) -> tuple[dict[str, Any], list[str]]:
    """Fills in the latencies of the targets that run here as they would be deployed.

    Returns:
        The timing conditions, and a note on the sensors that could not be read.
    """
    timed = {each.name: each for each in targets if not each.not_timed}
    gpu, machine = find_gpu(), describe_machine()
    meters = {name: meter for name, each in timed.items() if (meter := open_meter(each.on_gpu, gpu=gpu))}
    engines = {name: each.engine for name, each in timed.items()}
    some = min(max(options.batches), len(images.split))  # type: ignore[arg-type]
    inputs = load_images(images.split, images.preprocessing.transform(), some)[0]
    how = TimingOptions(seconds=options.seconds, seed=options.seed)
    found = time_engines(engines, inputs, options.batches, how, meters)
    for row in rows:
        if row.name in timed:
            row.latency = found.latency[row.name]
            row.device = machine["gpu" if timed[row.name].on_gpu else "cpu"] if row.latency else None
            refused = [f"not timed at batch {batch}: {reason}" for batch, reason in found.refused[row.name].items()]
            row.note = "; ".join(refused) or None
    _keep_latencies(timed.values(), found)
    missing = ", ".join(sorted({"temperature", "clock", "energy"} - found.sensors))
    return found.conditions, [f"No readable sensor during timing for: {missing}."] if missing else []


def _keep_latencies(timed: Iterable[BenchmarkTarget], found: Timings) -> None:
    """Keeps the latencies of files for CPUs, so that their fastest runtime is known when they are opened."""
    measured: dict[Path, dict[str, float]] = {}
    for target in timed:
        single = next((each for each in found.latency[target.name] if each.batch == 1), None)
        if single and target.path.name == CPU_ONNX:
            measured.setdefault(target.path, {})[target.runtime_id] = single.p50
    for path, milliseconds in measured.items():
        if len(milliseconds) > 1:
            CpuLatency.of(path, milliseconds).keep(path)


def _close(targets: Sequence[BenchmarkTarget]) -> None:
    for each in targets:
        each.engine.close()
