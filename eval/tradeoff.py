"""Accuracy against latency of every file and engine, under the same conditions, and which of them to take:

python eval/tradeoff.py runs/ptq --max-drop 0.2
torchrun --nproc-per-node 8 eval/tradeoff.py runs/base --data /data/imagenet    # shares out the images, times alone

The first float file that runs on a CPU is the reference. The report goes to the output folder: report.html for people,
report.json for programs, report.md for pull requests, plots for slides.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, cast

import tyro
from torch.utils.data import Dataset, Subset

from eval.benchmark.benchmark import Images, report_on, run_benchmark
from eval.benchmark.machine import pin_threads, share_of_cores
from eval.benchmark.open_bundles import check_alike, open_fitting_data
from eval.benchmark.targets import expand, find_targets
from eval.report.pareto import choose, pareto_front
from eval.report.regression import check_images, compare_markdown, find_regressions
from eval.report.schema import Report, read_report
from eval.report.store import read_results
from eval.report.table import markdown_table
from eval.report.thumbnails import draw_thumbnails
from eval.report.write_report import write_report
from illama.atomic_write import lock_folder, remove_folder
from illama.checkpoints.load import read_preprocessing
from illama.cli import run_command
from illama.data.datasets import Sample, evenly_spaced
from illama.errors import UserError
from illama.options import BenchmarkOptions
from illama.training.distributed import Processes, processes

UNFINISHED = "unfinished"


@dataclass(frozen=True)
class TradeoffOptions(BenchmarkOptions):
    """Weigh accuracy against latency for any number of bundles and engines.

    Attributes:
        paths: bundles, folders of them such as runs/ptq, or single files or engines.
        data: what they were trained on; the test split is evaluated.
        images: how many test images, evenly spaced; all if not given.
        calibration_images: of the training split, which temperatures are fitted on; 0 for none.
        workers: processes that read images.
        store: keep each temperature with its file, for deploy/predict.py.
        out: where the report goes, and where an interrupted evaluation goes on.
    """

    paths: Annotated[tuple[Path, ...], tyro.conf.Positional] = ()
    data: str = "fashion-mnist"
    images: int | None = None
    calibration_images: int = 512
    workers: int = 0
    store: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.workers, self.calibration_images) < 0:
            raise UserError("--workers and --calibration-images must be 0 or more")


def check_inputs(options: BenchmarkOptions) -> Mapping[str, Any] | None:
    """The baseline, if one was given, read before the long work and before a new report takes its place.

    Raises:
        UserError: for a baseline, or results of other commands, that cannot be read.
    """
    for folder in options.also:
        read_results(folder)
    return read_report(options.fail_on_regression) if options.fail_on_regression is not None else None


def check_baseline(baseline: Mapping[str, Any] | None, images: Images) -> None:
    """UserError for a baseline, if there is one, of other images than these."""
    if baseline is not None:
        check_images(baseline, images.name, images.data.classes, len(images.split))  # type: ignore[arg-type]


def write_and_tell(report: Report, split: Dataset[Sample], folder: Path, options: BenchmarkOptions) -> None:
    """Write a report, and print its table and its answer."""
    shown = [flip.image for row in report.rows for flip in row.flipped]
    write_report(report, folder, draw_thumbnails(split, shown))
    batch = report.constraints.batch
    print(f"\n{markdown_table(report.rows, batch, pareto_front(report.rows, batch))}\n")
    print(choose(report.rows, report.constraints).sentence)
    for reason in report.not_run:
        print(reason)
    print(f"{report.seconds['all']:.0f} s, {report.peak_memory_gib} GiB; report: {options.out / 'report.html'}")


def exit_on_regression(baseline: Mapping[str, Any] | None, report: Report) -> None:
    """Print what changed since a baseline, if there is one, and exit with 1 if something became worse."""
    if baseline is not None:
        regressions = find_regressions(baseline, report)
        print(f"\n{compare_markdown(baseline, report, regressions)}")
        if regressions:
            sys.exit(1)


def run(options: TradeoffOptions, group: Processes, baseline: Mapping[str, Any] | None) -> Report | None:
    """Weigh as one of the processes of ``group``; the main one writes the report, and returns it."""
    start = time.perf_counter()
    paths = expand(options.paths)
    manifest = check_alike(paths)
    preprocessing = read_preprocessing(manifest)
    data = open_fitting_data(options.data, manifest.classes, preprocessing)
    split = evenly_spaced(data.test(), options.images)
    indices = cast(Subset[Sample], split).indices if options.images is not None else None
    images = Images(options.data, data, split, preprocessing, options.calibration_images, indices)
    check_baseline(baseline, images)
    pin_threads(options.threads)
    targets = find_targets(paths, threads=share_of_cores())
    result = run_benchmark(
        targets,
        images,
        options,
        options.out,
        options.out / UNFINISHED,
        options.workers,
        group,
        store=options.store,
        alone=lambda: find_targets(paths),
    )
    if not group.main:
        return None
    seconds = {"evaluate and time": time.perf_counter() - start}
    source = ", ".join(map(os.path.relpath, manifest.inputs)) or str(paths[0])
    report = report_on(result, images, options, source, seconds)
    write_and_tell(report, data.test(), options.out, options)
    remove_folder(options.out / UNFINISHED)
    return report


def main(options: TradeoffOptions) -> None:
    baseline = check_inputs(options)
    with processes(apart=True) as group, lock_folder(options.out, group.main):
        report = run(options, group, baseline)
    if report is not None:
        exit_on_regression(baseline, report)


if __name__ == "__main__":
    run_command(TradeoffOptions, main)
