"""Accuracy against latency of every file and engine, under the same conditions, and which of them to take:

python eval/tradeoff.py runs/ptq --max-drop 0.2
torchrun --nproc-per-node 8 eval/tradeoff.py runs/base --data /data/imagenet    # shares out the images, times alone

The first file that runs on a CPU is the reference. The report goes to the output folder: report.html for people,
report.json for programs, report.md for pull requests, plots for slides.
"""

from __future__ import annotations

import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from torch.utils.data import Dataset

from eval.candidates import expand, find_candidates
from eval.machine import pin_threads
from eval.measured import Report, read_report
from eval.pareto import choose, front
from eval.regression import compare_markdown, find_regressions
from eval.report import write_report
from eval.results import read_results
from eval.table import markdown_table
from eval.thumbnails import draw_thumbnails
from eval.weigh import Images, WeighOptions, report_on, weigh
from illama.bundle import Manifest, bundle_of, make_out
from illama.checkpoint import read_preprocessing
from illama.data import Sample, evenly_spaced, open_data
from illama.distributed import Processes, processes
from illama.errors import UserError, run_command

UNFINISHED = "unfinished"


@dataclass(frozen=True)
class TradeoffOptions(WeighOptions):
    """Weigh accuracy against latency for any number of bundles and engines.

    Attributes:
        paths: bundles, folders of them such as runs/ptq, or single files or engines.
        data: what they were trained on; the test split is evaluated.
        images: how many test images, evenly spaced; all if not given.
        calibration_images: of the training split, which temperatures are fitted on; 0 for none.
        workers: processes that read images.
        out: where the report goes, and where an interrupted evaluation goes on.
    """

    paths: Annotated[tuple[Path, ...], tyro.conf.Positional] = ()
    data: str = "fashion-mnist"
    images: int | None = None
    calibration_images: int = 512
    workers: int = 0


def check_inputs(options: WeighOptions) -> None:
    """UserError, before the long work, for a baseline or results of other commands that cannot be read."""
    for folder in options.also:
        read_results(folder)
    if options.fail_on_regression is not None:
        read_report(options.fail_on_regression)


def write_and_tell(report: Report, split: Dataset[Sample], folder: Path, options: WeighOptions) -> list[str]:
    """Write a report, print its table and its answer; what became worse than in the baseline, if one was given."""
    shown = [flip.image for row in report.rows for flip in row.flipped]
    write_report(report, folder, draw_thumbnails(split, shown))
    batch = report.limits.batch
    print(f"\n{markdown_table(report.rows, batch, front(report.rows, batch))}\n")
    print(choose(report.rows, report.limits).sentence)
    for reason in report.not_run:
        print(reason)
    print(f"{report.seconds['all']:.0f} s, {report.peak_memory_gib} GiB; report: {options.out / 'report.html'}")
    if options.fail_on_regression is None:
        return []
    baseline = read_report(options.fail_on_regression)
    regressions = find_regressions(baseline, report)
    print(f"\n{compare_markdown(baseline, report, regressions)}")
    return regressions


def run(options: TradeoffOptions, group: Processes) -> list[str]:
    """Weigh as one of the processes of ``group``; what became worse, if a baseline was given."""
    start = time.perf_counter()
    paths = expand(options.paths)
    manifest = Manifest.read(bundle_of(paths[0]))
    check_inputs(options)
    data = open_data(options.data)
    if list(data.classes) != manifest.classes:
        raise UserError(f"{options.data} has other classes than {paths[0]} ({len(data.classes)} and "
                        f"{len(manifest.classes)}): give the data that it was trained on")  # fmt: skip
    transform = read_preprocessing(manifest).transform()
    images = Images(options.data, data, evenly_spaced(data.test(), options.images), transform,
                    options.calibration_images)  # fmt: skip
    pin_threads(options.threads)
    candidates = find_candidates(paths)
    make_out(options.out)
    weighed = weigh(candidates, images, options, options.out, options.out / UNFINISHED, options.workers, group)
    if not group.main:
        return []
    seconds = {"evaluate and time": time.perf_counter() - start}
    report = report_on(weighed, images, options, ", ".join(manifest.inputs) or str(paths[0]), seconds)
    shutil.rmtree(options.out / UNFINISHED)
    return write_and_tell(report, images.split, options.out, options)


def main(options: TradeoffOptions) -> None:
    with processes(apart=True) as group:
        regressions = run(options, group)
    if regressions:
        sys.exit(1)


if __name__ == "__main__":
    run_command(TradeoffOptions, main)
