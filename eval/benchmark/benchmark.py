"""Accuracy and latency of benchmark targets, measured under the same conditions, as the rows of a report."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from deploy.runtimes.temperature import store_temperatures
from eval.benchmark.evaluate_split import Evaluation, evaluate
from eval.benchmark.evaluation_images import EvaluationImages
from eval.benchmark.latency import TimingOptions, measure_latency
from eval.benchmark.machine import peak_memory_gib, pin_threads, torch_on_all_cores
from eval.benchmark.sensors import find_gpu, open_meter
from eval.benchmark.targets import BenchmarkTarget, choose_reference
from eval.metrics.calibration import fit_temperatures
from eval.metrics.measured import measure
from eval.metrics.paired import NO_DROP, paired_drop
from eval.metrics.predictions import Predictions
from eval.report.pareto import decide
from eval.report.schema import FlippedImage, Measured, Report, Row
from eval.report.store import read_results
from illama.bundle import command_line, package_versions, sha256, size_of
from illama.data.datasets import Transformed
from illama.hardware import describe_machine
from illama.inference import Infer, chance_note, load_images, usable_cores
from illama.manifest import NO_TENSORRT, Manifest
from illama.options import BenchmarkOptions
from illama.training.distributed import ALONE, Processes

SHOWN = 24  # flipped images of each kind that a report may show
_ELSEWHERE = (
    "Accuracy on corrupted and out-of-distribution images: eval/robustness.py and eval/out_of_distribution.py measure "
    "it, and --also adds their results to this report."
)


@dataclass(frozen=True)
class BenchmarkResult:
    """The rows in the order of the targets.

    Attributes:
        conditions: the conditions during timing, such as threads and clocks.
        notes: what was not measured, and why.
        layers: scheme -> rows of (layer, format of its weight, format of its input).
    """

    rows: list[Row]
    conditions: dict[str, Any]
    notes: list[str]
    layers: dict[str, list[list[str]]]


@dataclass(frozen=True)
class Execution:
    """Where a benchmark runs, and in which processes.

    Attributes:
        out: folder of the report; paths in the rows are relative to it.
        work: folder for finished parts of the evaluation; see :func:`eval.benchmark.evaluate_split.evaluate`.
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

    Raises:
        UserError: logits that are not finite, or do not fit the images.
    """
    models, first = _models(targets)
    transform, group = images.preprocessing.transform(), execution.processes
    temperatures, failed = fit_temperatures(models, images.data, transform, images.calibration, group)
    how = Evaluation(
        execution.work, execution.workers, facts=_facts(targets, images), processes=group, restart=execution.restart
    )
    evaluated = evaluate(models, Transformed(images.split, transform), temperatures, how)
    group.barrier()  # until all have read what the others computed
    if not group.main:
        return BenchmarkResult([], {}, [], {})
    notes = [f"{model} has no temperature: {reason}." for model, reason in failed.items()]
    if execution.store:
        scaled = [each for each in targets if first[each.name] in temperatures]
        fitted = [(each.path, temperatures[first[each.name]], each.engine.runtime) for each in scaled]
        notes += store_temperatures(fitted, images.calibration, images.name)
    reference = choose_reference(targets)
    measured, base = measure(evaluated, temperatures, first[reference.name]), evaluated[first[reference.name]].plain
    rows = []
    for each in targets:
        own = evaluated[first[each.name]].plain
        row = _row(each, measured[first[each.name]], execution.out)
        row.reference = each is reference
        row.drop = NO_DROP if row.reference else paired_drop(base.right, own.right, options.seed)
        row.flipped = _flipped(row, base, own, images)
        rows.append(row)
        if row.reference and (note := chance_note(row.name, row.top1.percent, len(images.data.classes))):
            notes.append(note)
    if execution.reopen and group.count > 1:
        _close(targets)
        pin_threads(options.threads or usable_cores())
        targets = execution.reopen()
    with torch_on_all_cores():
        conditions, unread = _time(targets, rows, images, options)
    _close(targets)
    return BenchmarkResult(rows, conditions, notes + _notes_on(targets) + unread, _layers_of(targets))


def _facts(targets: Sequence[BenchmarkTarget], images: EvaluationImages) -> dict[str, Any]:
    """Returns what determines the predictions, besides the models' names and temperatures."""
    return {
        "data": images.name,
        "preprocessing": asdict(images.preprocessing),
        "classes": images.data.classes,
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
    return Report(
        rows=result.rows,
        decision=decide(result.rows, options.constraints),
        command=command_line(),
        data=images.name,
        checkpoint=checkpoint,
        classes=tuple(images.data.classes),
        machine=describe_machine(),
        versions=package_versions(),
        constraints=options.constraints,
        conditions=result.conditions,
        calibration_images=images.calibration,
        seconds={**seconds, "all": sum(seconds.values())},
        not_run=[*not_run, *result.notes, *([] if options.also else [_ELSEWHERE])],
        peak_memory_gib=round(peak_memory_gib(), 2),
        layers=result.layers,
        others=[other for folder in options.also for other in read_results(folder)],
    )


def _models(targets: Sequence[BenchmarkTarget]) -> tuple[dict[str, Infer], dict[str, str]]:
    """Returns (name of the first target of each engine -> its infer function; target -> that name)."""
    names: dict[int, str] = {}
    first = {each.name: names.setdefault(id(each.engine), each.name) for each in targets}
    return {each.name: each.infer for each in targets if first[each.name] == each.name}, first


def _row(target: BenchmarkTarget, measured: Measured, out: Path) -> Row:
    """Returns the row of a target, without accuracy drop and latencies."""
    built, record = target.built or (None, None)
    files = [target.path, *([built] if built else [])]
    return Row(
        **vars(measured),
        scheme=target.scheme,
        runtime=target.runtime,
        runtime_id=target.runtime_id,
        file=target.key.file,
        precision=target.precision,
        evaluated_with=target.engine.runtime,
        drop=NO_DROP,
        onnx=os.path.relpath(target.path, out),
        onnx_bytes=size_of(target.path),
        engine=os.path.relpath(built, out) if built else None,
        engine_bytes=record.engine_bytes if record else None,
        fused=record.fused if record else True,
        sha256={os.path.relpath(file, out): sha256(file) for file in files},
        note=target.not_timed.sentence if target.not_timed else None,
    )


def _flipped(
    measured: Measured, reference: Predictions, own: Predictions, images: EvaluationImages
) -> list[FlippedImage]:
    if measured.change is None:
        return []
    flips, facts = measured.change.flips, (own.labels, reference.predicted, own.predicted)
    return [
        FlippedImage(images.index_in_test_split(int(image)), *(int(of[image]) for of in facts))
        for kind in (flips.lost, flips.gained, flips.moved)
        for image in kind[:SHOWN]
    ]


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
    engines = {name: each.engine.infer for name, each in timed.items()}
    some = min(max(options.batches), len(images.split))  # type: ignore[arg-type]
    inputs = load_images(images.split, images.preprocessing.transform(), some)[0]
    found = measure_latency(
        engines, inputs, options.batches, TimingOptions(seconds=options.seconds, seed=options.seed), meters
    )
    for row in rows:
        if row.name in timed:
            row.latency = found.latency[row.name]
            row.device = machine["gpu" if timed[row.name].on_gpu else "cpu"] if row.latency else None
            refused = [f"not timed at batch {batch}: {reason}" for batch, reason in found.refused[row.name].items()]
            row.note = "; ".join(refused) or None
    missing = ", ".join(sorted({"temperature", "clock", "energy"} - found.sensors))
    return found.conditions, [f"No readable sensor during timing for: {missing}."] if missing else []


def _close(targets: Sequence[BenchmarkTarget]) -> None:
    for each in targets:
        each.engine.close()


def _notes_on(targets: Sequence[BenchmarkTarget]) -> list[str]:
    """Returns notes on what was not measured, over all targets."""
    notes = []
    for bundle, scheme in {each.path.parent: each.scheme for each in targets}.items():
        quantization = Manifest.read(bundle).quantization
        if quantization and quantization.no_tensorrt:
            notes.append(f"{scheme} has no graph for TensorRT: {NO_TENSORRT[quantization.no_tensorrt]}.")
    notes += dict.fromkeys(line for each in targets for line in each.left_out)
    engines = [each.built[1] for each in targets if each.built]
    cannot_run = [each for each in targets if each.not_timed and each.not_timed.reason == "cannot run"]
    idle = [each.built[1] for each in cannot_run if each.built]
    if idle:
        proven = " with every attention proven fused" if all(record.fused for record in idle) else ""
        notes.append(
            f"{len(idle)} of {len(engines)} engines were built{proven} but not run or timed, because this machine "
            "has no NVIDIA GPU that they were built for."
        )
    if any(record.library == "tensorrt_rtx" for record in engines):
        notes.append("TensorRT-RTX multiplies INT8 weights in FP16; INT8 tensor cores need the full TensorRT.")
    return notes


def _layers_of(targets: Sequence[BenchmarkTarget]) -> dict[str, list[list[str]]]:
    """Returns scheme -> rows of (layer, format of its weight, format of its input), for quantized bundles."""
    found = {each.scheme: Manifest.read(each.path.parent).quantization for each in targets}
    return {
        scheme: [[layer.layer, layer.weight, layer.input] for layer in quantization.layers]
        for scheme, quantization in found.items()
        if quantization
    }
