"""Accuracy, latency, metrics and the report.

:func:`benchmark` does what ``python eval/tradeoff.py`` does.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from eval.report.schema import Report

__all__ = ["benchmark"]


def benchmark(
    paths: Sequence[str | Path],
    data: str | None = None,
    out: str | Path = "runs/tradeoff",
    images: int | None = None,
    seconds: float = 10.0,
) -> Report:
    """Evaluates and times bundles and engines on the test split of a data set, and writes a report.

    Args:
        paths: bundles, folders of bundles, or single files or engines. The first float file that runs on a CPU is the
            reference of the accuracy drops.
        data: the data set, such as a folder with ``train/CLASS/`` and ``val/CLASS/``; see
            :func:`illama.data.datasets.open_data`. Defaults to the one in the first bundle's manifest.
        out: folder of the report: ``report.html``, ``report.json``, ``report.md`` and a plot.
        images: number of test images, evenly spaced. Defaults to all.
        seconds: approximate duration of the latency benchmark of each batch size, in seconds.

    Returns:
        The report, with a row for each file in each runtime.

    Raises:
        UserError: the bundles do not fit each other or the data, or one cannot be opened.
    """
    from illama.errors import check_packages

    check_packages()
    from eval.measure.comparison import TradeoffOptions, compare
    from illama.options import BenchmarkOptions

    timing = BenchmarkOptions(seconds=seconds)
    report = compare(TradeoffOptions(tuple(map(Path, paths)), timing, data, images, out=Path(out)))
    assert report is not None  # in other processes than the main one only, and these run the command
    return report
