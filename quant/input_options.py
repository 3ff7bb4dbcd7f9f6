"""Options that the commands of this package share. Imports nothing slow, so that ``--help`` answers at once."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from illama.bundle import SHIPPED
from illama.options import ClassOrder, Exif


@dataclass(frozen=True)
class InputOptions:
    """Where a network and its images come from.

    Attributes:
        checkpoint: a bundle folder, a .safetensors or a released .pth; the shipped nano if not given.
        model: timm:NAME where the checkpoint is that of a timm ViT; an iLLaMA's says itself what it is.
        data: fashion-mnist, cifar10:FOLDER, cifar100:FOLDER, or a folder with train/ and val/.
        calibration_images: how many training images the ranges are taken from.
        exif: apply the orientation that image files declare, or ignore it; what the checkpoint's bundle says if not
            given, and apply without a bundle.
        class_order: of class folders, words (1 10 2) or natural (1 2 10); what the checkpoint's bundle says if not
            given, and without a bundle natural for a timm ViT and words for an iLLaMA.
    """

    checkpoint: Path = SHIPPED
    model: str | None = None
    data: str = "fashion-mnist"
    calibration_images: int = 512
    exif: Exif | None = None
    class_order: ClassOrder | None = None
