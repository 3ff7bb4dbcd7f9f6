"""Options that the commands of this package share. Imports nothing slow, so that ``--help`` answers at once."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from illama.bundle import SHIPPED
from illama.options import ClassOrder, Count, Exif


@dataclass(frozen=True)
class InputOptions:
    """Where a network and its images come from.

    Attributes:
        checkpoint: bundle folder, .safetensors file or released .pth file; defaults to the shipped nano.
        model: timm:NAME for the checkpoint of a timm ViT; the architecture of an iLLaMA is read from the checkpoint.
        data: fashion-mnist, cifar10:FOLDER, cifar100:FOLDER, webdataset:FOLDER, parquet:FOLDER, or a folder with
            train/ and val/.
        calibration_images: number of training images that ranges are calibrated on.
        exif: apply or ignore the orientation that image files declare. Defaults to the value in the checkpoint's
            bundle, or to apply without a bundle.
        class_order: order of class folders; words: lexicographic (1 10 2); natural: numeric (1 2 10). Defaults to the
            value in the checkpoint's bundle; without a bundle, natural for a timm ViT and words for an iLLaMA.
    """

    checkpoint: Path = SHIPPED
    model: str | None = None
    data: str = "fashion-mnist"
    calibration_images: Count = 512
    exif: Exif | None = None
    class_order: ClassOrder | None = None
