"""A report compared with an earlier one, and the command's exit status."""

from __future__ import annotations

import sys

from eval.measure.evaluation_images import EvaluationImages
from eval.report.regression import Baseline, check_images, compare_markdown, find_regressions
from eval.report.schema import Report
from eval.report.store import read_results
from illama.options import BenchmarkOptions


def read_baseline(options: BenchmarkOptions) -> Baseline | None:
    """Returns the report that ``--fail-on-regression`` names; None if it is not given.

    It is read before the long work, and before a new report replaces it; so are the results that ``--also`` names.

    Raises:
        UserError: the baseline, or results of another command, cannot be read.
    """
    for folder in options.also:
        read_results(folder)
    return Baseline.read(options.fail_on_regression) if options.fail_on_regression is not None else None


def check_baseline(baseline: Baseline | None, images: EvaluationImages) -> None:
    """Raises UserError for a baseline of other images."""
    if baseline is not None:
        neighbors = images.calibration if images.features else 0
        check_images(baseline, images.name, images.data.classes, len(images.split), neighbors)  # type: ignore[arg-type]


def exit_on_regression(baseline: Baseline | None, report: Report) -> None:
    """Prints the differences from the baseline, if there is one, and exits with status 1 after a regression."""
    if baseline is not None:
        regressions = find_regressions(baseline, report)
        print(f"\n{compare_markdown(baseline, report, regressions)}")
        if regressions:
            sys.exit(1)
