"""Images in folders: all under one folder, or in one folder for each class."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Any

from timm.utils.misc import natural_key
from torch.utils.data import Dataset
from torchvision import datasets

from illama.data.images import decode_image, list_pictures
from illama.data.webdataset import Sample
from illama.errors import UserError, warn_once
from illama.options import ClassOrder, Exif


class Pictures(Dataset[Sample]):
    """All pictures under a folder, at any depth, in the order of their paths; every label is 0.

    Raises:
        UserError: there are no pictures.
    """

    def __init__(self, folder: Path, exif: Exif = "apply") -> None:
        self.exif = exif
        self.paths = list_pictures(folder)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Sample:
        return decode_image(str(self.paths[index]), exif=self.exif), 0


class ClassFolders(datasets.ImageFolder):
    """A split of an image folder, with images read by :func:`decode_image` and classes in the given order."""

    def __init__(self, folder: Path, exif: Exif, class_order: ClassOrder) -> None:
        self.class_order = class_order
        super().__init__(folder, loader=partial(decode_image, exif=exif))

    @staticmethod
    def make_dataset(directory: str | Path, class_to_idx: dict[str, int], *_: Any, **__: Any) -> list[tuple[str, int]]:
        """Returns (path, label) of the images in each class's folder, at any depth; links to folders end there.

        torchvision follows such links, and two of them that lead to each other double its work at every level.
        """
        images = []
        for name, label in sorted(class_to_idx.items()):
            paths = [
                str(Path(folder) / file)
                for folder, _, files in sorted(os.walk(Path(directory) / name))
                for file in sorted(files)
                if file.lower().endswith(datasets.folder.IMG_EXTENSIONS)
            ]
            if not paths:
                raise FileNotFoundError(f"Found no valid file for the class {name}.")
            images += [(path, label) for path in paths]
        return images

    def find_classes(self, directory: str | Path) -> tuple[list[str], dict[str, int]]:
        words, _ = super().find_classes(directory)
        if wrong := next((name for name in words if not _is_text(name)), None):
            raise UserError(f"the class folder {wrong!a} in {directory} has a name that is not UTF-8: rename it")
        try:
            natural = sorted(words, key=natural_key)
        except ValueError:  # timm cannot order digits that are not a decimal number, such as a superscript 2
            natural = words
        if natural != words:
            warn_once(
                f"the class folders in {Path(directory).parent} are read in the order {self.class_order!r}, and the "
                "other order (words: 1 10 2, natural: 1 2 10) gives other labels: see docs/images.md"
            )
        names = natural if self.class_order == "natural" else words
        return names, {name: label for label, name in enumerate(names)}


def _is_text(name: str) -> bool:
    """Returns whether a file's name is UTF-8; in Python, other bytes become surrogates, which JSON cannot hold."""
    return not any("\ud800" <= character <= "\udfff" for character in name)
