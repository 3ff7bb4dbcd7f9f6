"""Segmentation data in ADE20K's layout (Zhou et al., arXiv 1608.05442; ADEChallengeData2016):

    images/training/NAME.jpg          annotations/training/NAME.png
    images/validation/NAME.jpg        annotations/validation/NAME.png
    objectInfo150.txt                 a heading, then one line per class: tab-separated columns, the name in the last

An annotation is a PNG with one byte per pixel: n for the n-th class, 0 for pixels without a class, which are ignored.
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
from illama.data.datasets import ImageData
from illama.data.images import decode_image
from illama.data.preprocessing import Preprocessing
from illama.data.webdataset import Sample
from illama.errors import UserError
from illama.options import Exif
from illama.randomness import isolated_randomness
from illama.structured_files import read_lines

LONGEST = 32  # maximum ratio of an image's longer side to its shorter side
IGNORED = 255  # class index of pixels without a class
_IMAGES = (".jpg", ".jpeg", ".png")


class SegmentationFolder(ImageData):
    """A folder in ADE20K's layout. The test split is ``validation``; splits are :class:`LabelMaps`.

    Raises:
        UserError: a folder or the list of classes is missing, or an image has no annotation.
    """

    held_out = 200

    def __init__(self, folder: Path, exif: Exif = "apply") -> None:
        self.name, self.folder, self.exif = folder.resolve().name, folder, exif
        self.classes = _read_classes(folder)
        self._test = LabelMaps(folder, "validation", len(self.classes), exif)

    def preprocessing(self, image_size: int, in_channels: int) -> Preprocessing:
        """Returns ImageNet's preprocessing, with the shorter side resized to ``image_size``, the side of a window."""
        return replace(super().preprocessing(image_size, in_channels), resize=image_size)

    def _train(self, shuffled: bool) -> Dataset[Sample]:
        return LabelMaps(self.folder, "training", len(self.classes), self.exif)


class LabelMaps(Dataset[Any]):
    """A split of (image (3, H, W), classes (H, W)), both uint8, as torchvision's Image and Mask.

    Reading an item raises UserError with its path if the image is broken or does not match its annotation, or if one
    side is more than LONGEST times the other, since resizing its shorter side would take gigabytes.
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
        picture = decode_image(str(path), exif=self.exif)
        if max(picture.size) > LONGEST * min(picture.size):
            raise UserError(f"{path} has a side ratio of more than {LONGEST}: crop it or remove it")
        image = v2.functional.to_image(picture)
        labels = np.array(decode_image(str(annotation), mode=None))
        if labels.dtype != np.uint8 or labels.ndim != 2:
            raise UserError(f"{annotation} is not a PNG with one byte per pixel, the number of its class")
        if labels.shape != tuple(image.shape[-2:]):
            raise UserError(f"{annotation} has {labels.shape[1]} x {labels.shape[0]} pixels, unlike its image")
        if labels.max() > self.classes:
            raise UserError(f"{annotation} has class {labels.max()}, and there are {self.classes} classes")
        return image, tv_tensors.Mask(torch.from_numpy(labels - 1))  # 0 - 1 is 255: IGNORED


class AugmentedMaps(Augmented):
    """Augmented images and their label maps, see :class:`Augmented`.

    An image is resized so that its shorter side is 1/2 to 2 times the network's input. It is then cropped (padded with
    the mean color and ignored pixels if too small), flipped, and distorted in color as in SSD (arXiv 1512.02325).
    """

    def __init__(self, images: Dataset[Sample], preprocessing: Preprocessing, seed: int) -> None:
        size = min(preprocessing.size)
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
            f"{folder} must have one objectInfo*.txt: a heading, then one line per class, tab-separated, with the name "
            "in the last column"
        )
    names = tuple(line.split("\t")[-1].strip() for line in read_lines(lists[0])[1:])
    if not 2 <= len(names) < IGNORED:
        raise UserError(f"{lists[0]} has {len(names)} classes, and only 2 to {IGNORED - 1} are supported")
    return names
