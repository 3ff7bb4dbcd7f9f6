"""Images with a class for every pixel, in ADE20K's layout (Zhou et al., arXiv 1608.05442; ADEChallengeData2016):

    images/training/NAME.jpg          annotations/training/NAME.png
    images/validation/NAME.jpg        annotations/validation/NAME.png
    objectInfo150.txt                 a heading, then a class a line: columns between tabs, the name in the last

An annotation is a PNG of one byte a pixel: 0 for what belongs to no class and is ignored, n for the n-th class.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2

from illama.data.augmentation import Augmented
from illama.data.datasets import ImageSplits, Preprocessing
from illama.data.images import decode_image
from illama.data.webdataset import Sample
from illama.errors import UserError
from illama.options import Exif
from illama.randomness import isolated_randomness

LONGEST = 32  # times the shorter side of an image
IGNORED = 255  # the class index of pixels that belong to no class
_IMAGES = (".jpg", ".jpeg", ".png")


class SegmentationFolder(ImageSplits):
    """A folder in ADE20K's layout; ``validation`` is the test split, and its items are :class:`LabelMaps`'.

    Raises:
        UserError: a folder or the list of classes is missing, or an image has no annotation.
    """

    held_out = 200

    def __init__(self, folder: Path, exif: Exif = "apply") -> None:
        self.name, self.folder, self.exif = folder.resolve().name, folder, exif
        self.classes = _read_classes(folder)
        self._test = LabelMaps(folder, "validation", len(self.classes), exif)

    def preprocessing(self, image_size: int, in_channels: int) -> Preprocessing:
        """ImageNet's colours; the shorter side becomes ``image_size``, and evaluation slides a window of that size."""
        return replace(super().preprocessing(image_size, in_channels), resize=image_size)

    def _train(self, shuffled: bool) -> Dataset[Sample]:
        return LabelMaps(self.folder, "training", len(self.classes), self.exif)


class LabelMaps(Dataset[Any]):
    """A split: (image (3, H, W), classes (H, W)), both uint8, as torchvision's Image and Mask.

    Reading one raises UserError with its path if it is broken, if the two do not fit, or if the image is more than
    LONGEST times as long as wide: whole images are resized by their shorter side, which such a one takes gigabytes for.
    """

    def __init__(self, folder: Path, split: str, classes: int, exif: Exif = "apply") -> None:
        images, maps = folder / "images" / split, folder / "annotations" / split
        if not images.is_dir():
            raise UserError(f"no folder {images}: expected images/{split}/NAME.jpg, annotations/{split}/NAME.png")
        files = sorted(path for path in images.iterdir() if path.suffix.lower() in _IMAGES)
        self.paths = [(path, maps / f"{path.stem}.png") for path in files]
        self.classes, self.exif = classes, exif
        if not files:
            raise UserError(f"no images in {images}")
        annotated = {path.name for path in maps.iterdir()} if maps.is_dir() else set()
        for path, annotation in self.paths:
            if annotation.name not in annotated:
                raise UserError(f"{path} has no annotation: expected {annotation}")

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[tv_tensors.Image, tv_tensors.Mask]:
        path, annotation = self.paths[index]
        picture = decode_image(str(path), lambda: str(path), self.exif)
        if max(picture.size) > LONGEST * min(picture.size):
            raise UserError(f"{path} is more than {LONGEST} times as long as wide: cut it up or take it out")
        image = v2.functional.to_image(picture)
        labels = np.array(decode_image(str(annotation), lambda: str(annotation), mode=None))
        if labels.dtype != np.uint8 or labels.ndim != 2:
            raise UserError(f"{annotation} is not a PNG of one byte a pixel, the number of its class")
        if labels.shape != tuple(image.shape[-2:]):
            raise UserError(f"{annotation} has {labels.shape[1]} x {labels.shape[0]} pixels and its image has not")
        if labels.max() > self.classes:
            raise UserError(f"{annotation} names class {labels.max()} of {self.classes}")
        return image, tv_tensors.Mask(torch.from_numpy(labels - 1))  # 0 - 1 is 255: IGNORED


class AugmentedMaps(Augmented):
    """Augmented images and their maps, addressed by (epoch, index); the pair alone decides the augmentation.

    A shorter side of a half to twice the network's, a crop (padded by the mean colour and ignored pixels where the
    image is smaller), a flip, and colours changed as SSD does (arXiv 1512.02325).
    """

    def __init__(self, images: Dataset[Sample], preprocessing: Preprocessing, seed: int) -> None:
        size = preprocessing.image_size
        mean = [round(255 * value) for value in (preprocessing.mean * 3)[:3]]
        augment = [
            v2.RandomResize(size // 2, 2 * size + 1),
            v2.RandomCrop(size, pad_if_needed=True, fill={tv_tensors.Image: mean, tv_tensors.Mask: IGNORED}),
            v2.RandomHorizontalFlip(),
            v2.RandomPhotometricDistort(),
        ]
        super().__init__(images, preprocessing.transform(augment), seed)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, Any]:
        with isolated_randomness(self.seed, *key):
            image, labels = self.transform(self.images[key[1]])
        return image.as_subclass(Tensor), labels.as_subclass(Tensor)


def _read_classes(folder: Path) -> tuple[str, ...]:
    lists = sorted(folder.glob("objectInfo*.txt"))
    if len(lists) != 1:
        raise UserError(
            f"{folder} must have one objectInfo*.txt: a heading, then a class a line, the name in the last "
            "column, with tabs between them"
        )
    try:
        lines = lists[0].read_text(encoding="utf-8").splitlines()[1:]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {lists[0]} as text") from error
    names = tuple(line.split("\t")[-1].strip() for line in lines if line.strip())
    if not 2 <= len(names) < IGNORED:
        raise UserError(f"{lists[0]} names {len(names)} classes, and a map of bytes holds 2 to {IGNORED - 1}")
    return names
