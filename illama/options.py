"""Options that commands of several packages share. Imports no large library, so that ``--help`` is fast."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, TypeVar

import tyro

from illama.bundle import SHIPPED
from illama.errors import UserError

Options = TypeVar("Options")
Flat = Annotated[Options, tyro.conf.OmitArgPrefixes]  # options of a dataclass within a dataclass, without a prefix
Exif = Literal["apply", "ignore"]
ClassOrder = Literal["words", "natural"]


@dataclass(frozen=True)
class SourceOptions:
    """Where a network and its images come from.

    Attributes:
        checkpoint: bundle folder, .safetensors file or released .pth file; defaults to the shipped nano.
        model: timm:NAME for the checkpoint of a timm ViT; the architecture of an iLLaMA is read from the checkpoint.
        data: fashion-mnist, fashion-mnist:FOLDER, cifar10:FOLDER, cifar100:FOLDER, webdataset:FOLDER, parquet:FOLDER,
            or a folder with train/ and val/.
        calibration_images: number of training images that ranges are calibrated on.
        image_size: image size in pixels; the position embedding is interpolated. Defaults to the checkpoint's.
        exif: apply or ignore the orientation that image files declare. Defaults to the value in the checkpoint's
            bundle, or to apply without a bundle.
        class_order: order of class folders; words: lexicographic (1 10 2); natural: numeric (1 2 10). Defaults to the
            value in the checkpoint's bundle; without a bundle, natural for a timm ViT and words for an iLLaMA.
    """

    checkpoint: Path = SHIPPED
    model: str | None = None
    data: str = "fashion-mnist"
    calibration_images: int = 512
    image_size: int | None = None
    exif: Exif | None = None
    class_order: ClassOrder | None = None


@dataclass(frozen=True)
class Constraints:
    """Limits that the chosen engine must satisfy; None for no limit.

    Attributes:
        batch: batch size that the latency limit applies to.
        latency_ms: limit on the median latency (p50) of one call, in milliseconds.
        drop: limit on the accuracy drop in points of top-1, at the upper end of its 95% confidence interval.
        megabytes: limit on the size of the deployed file, in 10^6 bytes.
    """

    batch: int = 1
    latency_ms: float | None = None
    drop: float | None = None
    megabytes: float | None = None


def check_constraints(constraints: Constraints) -> None:
    """Raises UserError for a limit that no engine can satisfy."""
    for name, value in {
        "latency": constraints.latency_ms,
        "size": constraints.megabytes,
        "the batch size": constraints.batch,
    }.items():
        if value is not None and not value > 0:
            raise UserError(f"the limit on {name} must be above zero, not {value}")
    if constraints.drop is not None and math.isnan(constraints.drop):
        raise UserError("the limit on the accuracy drop must be a number")


@dataclass(frozen=True)
class BenchmarkOptions:
    """Options of a benchmark.

    Attributes:
        batches: batch sizes to time; --max-latency-ms applies to the first.
        seconds: approximate duration of the benchmark of each batch size, in seconds.
        threads: number of CPU threads. If not given, one per core.
        max_latency_ms: largest acceptable median latency of one call, in milliseconds.
        max_drop: largest acceptable accuracy drop in points of top-1, at the upper end of its 95% confidence interval.
        max_megabytes: largest acceptable size of the deployed file, in 10^6 bytes.
        also: folders with results of other commands, such as runs/robustness, to include in the report.
        fail_on_regression: path to an earlier report.json; exit with status 1 after a regression (docs/evaluation.md).
        seed: random seed of the confidence intervals and of the order in which targets are timed.
    """

    batches: tuple[int, ...] = (1, 8, 64)
    seconds: float = 10.0
    threads: int | None = None
    max_latency_ms: float | None = None
    max_drop: float | None = None
    max_megabytes: float | None = None
    also: tuple[Path, ...] = ()
    fail_on_regression: Path | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.batches or min(self.batches) < 1 or len(set(self.batches)) < len(self.batches):
            raise UserError("--batches takes one batch size or more, each above 0 and given once")
        if not 0 < self.seconds < math.inf or self.seed < 0:
            raise UserError("--seconds must be a number above 0, and --seed 0 or more")
        check_constraints(self.constraints)

    @property
    def constraints(self) -> Constraints:
        return Constraints(self.batches[0], self.max_latency_ms, self.max_drop, self.max_megabytes)
