"""Options that commands of several packages share. Imports no large library, so that ``--help`` is fast."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, is_dataclass
from pathlib import Path
from types import FunctionType
from typing import Annotated, Any, Literal, TypeVar, get_args, get_type_hints

import tyro
from annotated_types import Interval

from illama.bundle import SHIPPED
from illama.errors import UserError, check_exists
from illama.structured_files import check_fields

Options = TypeVar("Options")
Flat = Annotated[Options, tyro.conf.OmitArgPrefixes]  # options of a dataclass within a dataclass, without a prefix
DATA_FORMS = (
    "fashion-mnist, fashion-mnist:FOLDER, cifar10:FOLDER, cifar100:FOLDER, webdataset:FOLDER, parquet:FOLDER, or a "
    "folder with train/CLASS/ and val/CLASS/ (quantize and benchmark also take a folder of pictures without classes)"
)
DATA_SETS = ("fashion-mnist", "cifar10", "cifar100", "webdataset", "parquet")


def check_data(spec: str) -> str:
    """Returns the name of a data set; raises UserError if there is no such data set and no such folder."""
    if spec.partition(":")[0] in DATA_SETS or Path(spec).is_dir():
        return spec
    raise UserError(f"{spec!r} is no data set and no folder: give {DATA_FORMS}")


# Types of options with functions that :func:`check_names` calls where a command starts; stored values are not checked.
Existing = Annotated[Path, check_exists]
DataName = Annotated[str, check_data]  # a data set, as illama.data.datasets.open_data takes it
Data = Annotated[DataName, tyro.conf.arg(help=DATA_FORMS)]
BundleData = Annotated[
    DataName | None, tyro.conf.arg(help=f"{DATA_FORMS}; if not given, the data set in the first bundle's manifest")
]
Exif = Literal["apply", "ignore"]
ClassOrder = Literal["words", "natural"]
Interpolation = Literal["bicubic", "bilinear"]
Device = Literal["auto", "cpu", "cuda"]
Head = Literal["classes", "embedding", "none", "tokens"]

# Types of options with their bounds, which :func:`check_bounds` checks.
_MOST = (1 << 31) - 1
Count = Annotated[int, Interval(ge=1, le=_MOST)]
CountOrZero = Annotated[int, Interval(ge=0, le=_MOST)]
BatchSize = Annotated[int, Interval(ge=1, le=1 << 16)]
ImageSize = Annotated[int, Interval(ge=1, le=1 << 16)]
Threads = Annotated[int, Interval(ge=1, le=1024)]
InputSize = Annotated[ImageSize | tuple[ImageSize, ImageSize] | None, tyro.conf.arg(metavar="INT [INT]")]
ThreadsOrAll = Annotated[int, Interval(ge=0, le=1024)]
Workers = Annotated[int, Interval(ge=0, le=1024)]
Seed = Annotated[int, Interval(ge=0, lt=1 << 32)]
Port = Annotated[int, Interval(ge=1, le=65535)]
Fraction = Annotated[float, Interval(ge=0, le=1)]
Positive = Annotated[float, Interval(gt=0, lt=math.inf)]
Number = Annotated[float, Interval(gt=-math.inf, lt=math.inf)]
NotNegative = Annotated[float, Interval(ge=0, lt=math.inf)]


def check_bounds(options: Any) -> None:
    """Raises UserError for the first option whose value does not fit its type, or is out of the bounds of it."""
    check_fields(options, lambda name: f"--{name.replace('_', '-')}")


def check_names(options: Any) -> None:
    """Raises UserError for the first option that names something that does not exist."""
    for name, hint in get_type_hints(type(options), include_extras=True).items():
        value = getattr(options, name)
        if is_dataclass(value):
            check_names(value)
        for each in value if isinstance(value, tuple) else (value,) if value is not None else ():
            for check in _checks(hint):
                check(each)


def _checks(hint: Any) -> list[Callable[[Any], Any]]:
    return [hint] if isinstance(hint, FunctionType) else [check for part in get_args(hint) for check in _checks(part)]


@dataclass(frozen=True)
class SourceOptions:
    """Where a network and its images come from.

    Attributes:
        checkpoint: bundle folder, .safetensors file or released .pth file; defaults to the shipped nano.
        model: timm:NAME for the checkpoint of a timm ViT; hf for a folder of Hugging Face. The architecture of an
            iLLaMA, and of a folder with a config.json, is read from the checkpoint.
        data: the data set.
        calibration_images: number of training images for calibration. Defaults to 512, or to all if there are fewer.
        image_size: image size in pixels, or height and width for a timm ViT; the position embedding is interpolated.
            Defaults to the checkpoint's.
        model_args: options of timm.create_model that the weights were trained with and that neither they nor a folder's
            config.json say, such as global_pool=avg,fc_norm=false.
        head: what the network returns. classes: logits of its classifier. embedding: output of a head without classes,
            such as CLIP's projection. none: pooled features in front of the head. tokens: features of every token.
        mean: mean of each channel of pixels from 0 to 1. This and the next three default to the checkpoint's, or to
            timm's for the model.
        std: standard deviation of each channel.
        crop_pct: share of the shorter side that the center crop keeps; 1 resizes the shorter side to the image size.
        interpolation: interpolation of the resize.
        exif: apply or ignore the orientation that image files declare. Defaults to the value in the checkpoint's
            bundle, or to apply without a bundle.
        class_order: order of class folders; words: lexicographic (1 10 2); natural: numeric (1 2 10). Defaults to the
            value in the checkpoint's bundle; without a bundle, natural for a timm ViT and words for an iLLaMA.
        device: where PyTorch calibrates and reconstructs: cpu, cuda, or auto for the GPU if there is one.
    """

    checkpoint: Existing = SHIPPED
    model: str | None = None
    data: Data = "fashion-mnist"
    calibration_images: Count | None = None
    image_size: InputSize = None
    model_args: str = ""
    head: Head = "classes"
    mean: tuple[Number, ...] | None = None
    std: tuple[Positive, ...] | None = None
    crop_pct: Annotated[float, Interval(gt=0, le=1)] | None = None
    interpolation: Interpolation | None = None
    exif: Exif | None = None
    class_order: ClassOrder | None = None
    device: Device = "auto"


@dataclass(frozen=True)
class Constraints:
    """Limits that the chosen engine must satisfy; None for no limit.

    Attributes:
        batch: batch size that the latency limit applies to.
        latency_ms: limit on the median latency (p50) of one call, in milliseconds.
        drop: limit on the accuracy drop in points of top-1, at the upper end of its 95% confidence interval.
        megabytes: limit on the size of the deployed file, in 10^6 bytes.
    """

    batch: BatchSize = 1
    latency_ms: Positive | None = None
    drop: Number | None = None
    megabytes: Positive | None = None


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
        emulate: evaluate files that this CPU can only emulate (FP8, half precision) on more than 10,000 test images
            too, which can take hours.
        seed: random seed of the confidence intervals and of the order in which targets are timed.
    """

    batches: tuple[BatchSize, ...] = (1, 8, 64)
    seconds: Annotated[float, Interval(gt=0, le=86_400)] = 10.0
    threads: Threads | None = None
    max_latency_ms: Positive | None = None
    max_drop: Number | None = None
    max_megabytes: Positive | None = None
    also: tuple[Existing, ...] = ()
    fail_on_regression: Existing | None = None
    emulate: bool = False
    seed: Seed = 0

    def __post_init__(self) -> None:
        check_bounds(self)
        if not self.batches or len(set(self.batches)) < len(self.batches):
            raise UserError("--batches takes one batch size or more, each given once")

    @property
    def constraints(self) -> Constraints:
        return Constraints(self.batches[0], self.max_latency_ms, self.max_drop, self.max_megabytes)
