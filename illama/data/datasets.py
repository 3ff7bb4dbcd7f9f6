"""Data sets: Fashion-MNIST (partly in this repository), CIFAR, ImageNet-style folders, tar and parquet shards.

A string specifies a data set:

    fashion-mnist            the test split and 2,000 calibration images, which are in this repository
    fashion-mnist:FOLDER     the same, with the full training split from FOLDER's idx files
    cifar10:FOLDER           torchvision's layout (cifar-10-batches-py/); also cifar100:FOLDER
    FOLDER                   ImageNet's layout: train/CLASS/*.jpg and val/CLASS/*.jpg; or pictures without classes
    webdataset:FOLDER        train-*.tar and val-*.tar (or train/*.tar and so on) with KEY.jpg and KEY.cls
    parquet:FOLDER           Hugging Face's data/train-*.parquet and validation-*.parquet (or test-*)

Calibration images are evenly spaced images of the training split, never of the test split.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, Subset
from torchvision import datasets

from illama.data.idx_files import read_idx_pair
from illama.data.image_folders import ClassFolders, Pictures
from illama.data.images import PICTURES
from illama.data.preprocessing import Preprocessing, Transform
from illama.data.webdataset import Sample, TarImages, check_labels, find_shards, name_classes
from illama.errors import UserError, warn_once
from illama.options import ClassOrder, Exif, check_data

SHIPPED_FASHION_MNIST = Path(__file__).parents[1] / "datasets" / "fashion_mnist"
DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
FASHION_MNIST_CLASSES: tuple[str, ...] = tuple(datasets.FashionMNIST.classes)
VALIDATION_IMAGES = 2000
_CALIBRATION_IMAGES = 512  # if not given
_LOOKED_AT = 4  # images that show whether a data set is gray


class ImageData:
    """A data set. Items of its splits are (image, label) pairs, without any transform.

    Unless a class says otherwise, it has ImageNet's preprocessing, and images in RGB.

    Attributes:
        name: name of the data set.
        classes: class names in the order of the labels.
        labeled: whether the images have labels; without them, ``classes`` are the network's, and labels are 0.
        exif: see :class:`Preprocessing`.
        class_order: see :class:`Preprocessing`.
    """

    name: str
    classes: tuple[str, ...]
    labeled = True
    exif: Exif = "apply"
    class_order: ClassOrder = "words"
    held_out = VALIDATION_IMAGES
    _test: Dataset[Sample]

    def preprocessing(self, image_size: int, in_channels: int) -> Preprocessing:
        """Returns the preprocessing for these images."""
        imagenet = Preprocessing.imagenet(image_size, in_channels)
        return replace(imagenet, exif=self.exif, class_order=self.class_order)

    def test(self) -> Dataset[Sample]:
        """Returns the test split."""
        return self._test

    def calibration(self, count: int | None) -> Dataset[Sample]:
        """Returns ``count`` evenly spaced images of the training split, or all; raises UserError if there are fewer."""
        return evenly_spaced(self._train(shuffled=False), count, "calibration images")

    def training(self) -> tuple[Dataset[Sample], Dataset[Sample]]:
        """Returns (training images, validation images), two disjoint parts of the training split."""
        images = self._train(shuffled=True)
        validation: Any = evenly_spaced(images, max(1, min(self.held_out, len(images) // 10)))  # type: ignore[arg-type]
        return others(validation), validation

    def _train(self, shuffled: bool) -> Dataset[Sample]:
        """Returns the training split; ``shuffled`` says whether it will be read in random order."""
        raise NotImplementedError


class TensorImages(Dataset[Sample]):
    """Gray images in memory: uint8 (N, H, W) and labels (N,)."""

    def __init__(self, images: np.ndarray, labels: np.ndarray) -> None:
        self.images, self.labels = torch.from_numpy(images), labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Sample:
        return self.images[index : index + 1], int(self.labels[index])


class FashionMNIST(ImageData):
    """Fashion-MNIST (Xiao et al., arXiv 1708.07747): 28x28 gray images, ten classes of clothing, MIT license."""

    name = "fashion-mnist"
    classes = FASHION_MNIST_CLASSES

    def __init__(self, folder: Path = DEBIAN_FASHION_MNIST) -> None:
        self.folder = folder

    def preprocessing(self, image_size: int, in_channels: int) -> Preprocessing:
        mean, std = (0.2860,) * in_channels, (0.3530,) * in_channels
        side = (image_size, image_size)
        return Preprocessing(side, in_channels, mean, std, exif=self.exif, class_order=self.class_order)

    def test(self) -> Dataset[Sample]:
        return self._read(SHIPPED_FASHION_MNIST, "t10k")

    def calibration(self, count: int | None) -> Dataset[Sample]:
        images = self._read(SHIPPED_FASHION_MNIST, "calibration")
        return evenly_spaced(images, count, "calibration images")

    def _train(self, shuffled: bool) -> Dataset[Sample]:
        if not (self.folder / "train-images-idx3-ubyte.gz").exists():
            raise UserError(
                f"no Fashion-MNIST training images in {self.folder}: on Debian or Ubuntu run "
                "'apt-get install dataset-fashion-mnist', or give the folder of train-images-idx3-ubyte.gz "
                "with --data fashion-mnist:FOLDER"
            )
        return self._read(self.folder, "train")

    def _read(self, folder: Path, split: str) -> TensorImages:
        return TensorImages(*read_idx_pair(folder, split, len(self.classes)))


class Cifar(ImageData):
    """CIFAR-10 or CIFAR-100 from a folder in torchvision's layout; the MD5 of its files is checked."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self.folder = name, folder
        self._reader = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name]
        test = self._read(train=False)
        self._test, self.classes = test, tuple(test.classes)

    def _read(self, train: bool) -> Any:
        try:
            return self._reader(self.folder, train=train, download=False)
        except RuntimeError as error:
            raise UserError(f"no intact {self.name} in {self.folder}: unpack its Python version there") from error

    def _train(self, shuffled: bool) -> Dataset[Sample]:
        return self._read(train=True)


class ImageFolder(ImageData):
    """A folder in ImageNet's layout: train/CLASS/image and val/CLASS/image."""

    def __init__(self, folder: Path, exif: Exif = "apply", class_order: ClassOrder = "words") -> None:
        self.name, self.folder = folder.name, folder
        self.exif, self.class_order = exif, class_order
        test = self._read("val")
        self._test, self.classes = test, tuple(test.classes)

    def _read(self, split: str) -> datasets.ImageFolder:
        folder = self.folder / split
        if not folder.is_dir():
            raise UserError(f"{self.folder} has no {split}/ folder: expected train/CLASS/images and val/CLASS/images")
        try:
            images = ClassFolders(folder, self.exif, self.class_order)
        except FileNotFoundError as error:
            raise UserError(f"{folder}: {str(error).splitlines()[0]} Put the images in one folder per class") from error
        if len(images.classes) < 2:
            raise UserError(f"{folder} has one class only ({images.classes[0]}): a classifier needs two or more")
        return images

    def _train(self, shuffled: bool) -> Dataset[Sample]:
        images = self._read("train")
        if tuple(images.classes) != self.classes:
            raise UserError(f"train/ and val/ in {self.folder} have different classes")
        return images


class UnlabeledFolder(ImageData):
    """Pictures without classes, in one folder. In the order of their paths, every second one is a test image.

    They are enough to calibrate a network, and to measure its agreement with another, but not its accuracy.
    """

    labeled = False

    def __init__(self, folder: Path, exif: Exif = "apply") -> None:
        self.name, self.folder, self.exif, self.classes = folder.name, folder, exif, ()
        pictures = Pictures(folder, exif)
        if len(pictures) < 2:
            raise UserError(f"{folder} has one picture only: give two or more, one half for calibration")
        self._calibration, self._test = (Subset(pictures, range(first, len(pictures), 2)) for first in (0, 1))

    def training(self) -> tuple[Dataset[Sample], Dataset[Sample]]:
        raise unlabeled(self.folder)

    def _train(self, shuffled: bool) -> Dataset[Sample]:
        return self._calibration


class Shards(ImageData):
    """A folder of tar or parquet shards: see :mod:`illama.data.webdataset` and :mod:`illama.data.parquet`."""

    def __init__(self, kind: str, folder: Path, exif: Exif = "apply") -> None:
        self.name, self.folder, self.exif = folder.resolve().name, folder, exif
        self._kind: Any = TarImages
        if kind == "parquet":
            from illama.data.parquet import ParquetImages  # only here, since importing pyarrow takes a while

            self._kind = ParquetImages
        self._train_shards, test_shards = find_shards(folder, self._kind.suffix)
        test = self._kind(test_shards, "test", exif)
        self._test, self.classes = test, name_classes(test.class_names(folder), test.labels, folder)
        self._training: Any = None

    def _train(self, shuffled: bool) -> Dataset[Sample]:
        if not self._train_shards:
            raise UserError(f"{self.folder} has no training shards: expected train in their names")
        if self._training is None:
            self._training = self._kind(self._train_shards, "train", self.exif)
            check_labels(self._training.labels, len(self.classes), self.folder, all_present=True)
        return self._training.in_random_order() if shuffled else self._training


def open_data(spec: str, exif: Exif = "apply", class_order: ClassOrder = "words") -> ImageData:
    """Opens a data set without decoding an image.

    Args:
        spec: :data:`illama.options.DATA_FORMS`; see the docstring of this module.
        exif: see :class:`Preprocessing`; for a trained network, pass its bundle's setting.
        class_order: see :class:`Preprocessing`; for a trained network, pass its bundle's setting.

    Raises:
        UserError: the data set is missing, or its files are incomplete, damaged or inconsistent.
    """
    name, _, folder = check_data(spec).partition(":")
    data: ImageData
    if name == "fashion-mnist":
        data = FashionMNIST(Path(folder)) if folder else FashionMNIST()
    elif name in ("cifar10", "cifar100"):
        data = Cifar(name, Path(folder or "."))
    elif name in ("webdataset", "parquet"):
        data = Shards(name, Path(folder or "."), exif)
    else:
        flat = not any((Path(spec) / split).exists() for split in ("train", "val"))
        flat = flat and any(path.suffix.lower() in PICTURES for path in Path(spec).iterdir())
        data = UnlabeledFolder(Path(spec), exif) if flat else ImageFolder(Path(spec), exif, class_order)
    data.exif, data.class_order = exif, class_order
    return data


def note_channels(images: Dataset[Sample], in_channels: int) -> None:
    """Says how images are converted if the network's channels are others than those of the first few images."""
    some = [images[index][0] for index in range(min(_LOOKED_AT, len(images)))]  # type: ignore[arg-type]
    gray = all(isinstance(each, Tensor) or _is_gray(each) for each in some)
    if gray and in_channels == 3:
        warn_once("the images are gray and the network takes RGB: each gray value is used for all three channels")
    elif not gray and in_channels == 1:
        warn_once("the images are in color and the network takes gray: they are converted to gray (ITU-R 601)")


def _is_gray(image: Image.Image) -> bool:
    values = np.asarray(image)
    return values.ndim == 2 or bool((values == values[..., :1]).all())


def unlabeled(folder: object) -> UserError:
    """Returns the error of a command that needs labels for pictures that have none."""
    return UserError(
        f"the pictures in {folder} have no classes, and this command needs them: give a folder with train/CLASS/ and "
        "val/CLASS/ (quantize and benchmark need no classes)"
    )


class Transformed(Dataset[tuple[Tensor, int]]):
    """Applies a transform to a split; reading a broken image raises UserError with its path."""

    def __init__(self, images: Dataset[Sample], transform: Transform) -> None:
        self.images, self.transform = images, transform

    def __len__(self) -> int:
        return len(self.images)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image, label = self.images[index]
        return self.transform(image), label


def evenly_spaced(images: Dataset[Sample], count: int | None, what: str = "images") -> Dataset[Sample]:
    """Returns ``count`` evenly spaced images, or all if None; raises UserError that names ``what`` if too few."""
    total = len(images)  # type: ignore[arg-type]
    if count is None:
        return images
    if not 1 <= count <= total:
        option = f"--{what.replace(' ', '-')}"
        raise UserError(f"{count} {what} requested, but 1 to {total} are available: change {option}")
    return Subset(images, [i * total // count for i in range(count)])


def calibration_count(data: ImageData, given: int | None, share: int = 1) -> int:
    """Returns the number of calibration images: the given one, else 512, but at most 1/``share`` of those there are."""
    if given is not None:
        return given
    return min(_CALIBRATION_IMAGES, max(1, len(data.calibration(None)) // share))  # type: ignore[arg-type]


def others(taken: Subset[Sample]) -> Subset[Sample]:
    """Returns the images that are not in a part of a split."""
    total = len(taken.dataset)  # type: ignore[arg-type]
    return Subset(taken.dataset, np.setdiff1d(np.arange(total), taken.indices).tolist())
