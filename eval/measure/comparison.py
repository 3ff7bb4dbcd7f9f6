"""Evaluates and times bundles, and writes a report: the work of ``python eval/tradeoff.py`` and :func:`eval.benchmark`.

Imports no large library, so that ``--help`` is fast.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from illama.options import BenchmarkOptions, BundleData, Count, CountOrZero, Flat, Workers

if TYPE_CHECKING:
    from eval.report.schema import Report


@dataclass(frozen=True)
class TradeoffOptions:
    """Benchmark any number of bundles and engines: accuracy, calibration, latency, size.

    Prints a table, and writes the report to OUT: report.html for people, report.json, report.md, summary.json, a plot.

    Attributes:
        benchmark: the benchmark.
        paths: paths to bundles, folders of bundles such as runs/ptq, or single files or engines.
        data: data set that the models were trained on; its test split is evaluated.
        images: number of test images, evenly spaced; all if not given.
        calibration_images: number of training images that temperatures are fitted on; 0 for none. Defaults to 512, or
            to all if there are fewer.
        workers: number of processes that read images.
        store: store each model's calibration temperature beside its file, for python deploy/predict.py.
        out: folder of the report; an interrupted evaluation resumes from it.
    """

    paths: Annotated[tuple[Path, ...], tyro.conf.Positional] = ()
    benchmark: Flat[BenchmarkOptions] = field(default_factory=BenchmarkOptions)
    data: BundleData = None
    images: Count | None = None
    calibration_images: CountOrZero | None = None
    workers: Workers = 0
    store: bool = False
    out: Path = Path("runs/tradeoff")


def compare(options: TradeoffOptions) -> Report | None:
    """Evaluates and times all targets and writes the report; returns it in the main process, None in others.

    Raises:
        UserError: the bundles do not fit each other or the data, or cannot be opened.
        SystemExit: there is a regression from ``fail_on_regression``.
    """
    from eval.measure.benchmark import Execution, make_report, run_benchmark
    from eval.measure.evaluate_split import UNFINISHED
    from eval.measure.evaluation_images import EvaluationImages
    from eval.measure.machine import pin_threads, share_of_cores
    from eval.measure.open_bundles import check_alike
    from eval.measure.targets import expand, find_targets
    from eval.report.baseline import check_baseline, exit_on_regression, read_baseline
    from eval.report.write_report import write_and_print
    from illama.atomic_write import lock_folder, remove_folder
    from illama.progress import Activity
    from illama.steps import Steps
    from illama.training.distributed import processes

    baseline, steps = read_baseline(options.benchmark), Steps()
    with processes(apart=True) as group, lock_folder(options.out, group.main), steps.time("evaluate and time"):
        paths = expand(options.paths)
        manifest = check_alike(paths)
        name = options.data or manifest.data
        images = EvaluationImages.open(name, manifest, options.images, options.calibration_images)
        check_baseline(baseline, images)
        pin_threads(options.benchmark.threads)
        unfinished = options.out / UNFINISHED
        execution = Execution(
            options.out,
            unfinished,
            workers=options.workers,
            processes=group,
            store=options.store,
            reopen=lambda: find_targets(paths),
        )
        with Activity("evaluate and time", shown=group.main):
            result = run_benchmark(find_targets(paths, threads=share_of_cores()), images, options.benchmark, execution)
        if not group.main:
            return None
        checkpoint = ", ".join(map(os.path.relpath, manifest.provenance.inputs)) or str(paths[0])
        report = make_report(result, images, options.benchmark, checkpoint, steps.seconds)
        write_and_print(report, images.data.test(), options.out, options.out)
        remove_folder(unfinished)
    exit_on_regression(baseline, report)
    return report
