"""Reads WebDataset's tar shards, and contains the functions that parquet folders share.

The split of a shard is part of its path: train-0000.tar, train/0000.tar and imagenet1k-train-0000.tar belong to the
training split. Images must be readable by index in any order, since a seed determines each epoch's order (WebDataset's
own reader streams). So all tar headers are scanned once, and the position of every image is kept. This takes 20 bytes
per image (26 MB for ImageNet) and 27 us per member (4 s for ImageNet's validation split, 100 s for its training split).
"""

from __future__ import annotations

import io
import re
import tarfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from illama.data.images import decode_image
from illama.errors import UserError
from illama.options import Exif
from illama.progress import track
from illama.structured_files import check_regular, read_lines

Sample = tuple[Any, int]
SPLIT_IN_PATH = re.compile(r"(?:^|[-_/])(train|val|validation|test)(?=[-_/.])")
MAX_CLASSES = 1_000_000  # larger labels are damage
MAX_IMAGE_BYTES, _MAX_LABEL_BYTES = 1 << 30, 9
TEST_SPLITS = ("validation", "val", "test")  # the first that exists is used; some data sets have no labels in "test"
IMAGE_SUFFIXES = {"jpg", "jpeg", "png", "webp"}
CLASS_FILES = ("classes.txt", "classnames.txt")
PLACE = np.dtype([("file", np.int32), ("label", np.int32), ("start", np.int64), ("size", np.int32)])


def find_shards(folder: Path, suffix: str) -> tuple[list[Path], list[Path]]:
    """Returns the shards of the training split, if there are any, and of the test split, sorted by name.

    Raises:
        UserError: there is no folder or no shard for the test, or fewer shards than their names ("-of-00010") say.
    """
    if not folder.is_dir():
        raise UserError(f"no folder {folder}")
    shards: dict[str, list[Path]] = defaultdict(list)
    for path in sorted(folder.rglob(f"*.{suffix}")):
        relative = path.relative_to(folder).as_posix()
        split = SPLIT_IN_PATH.search(relative)
        if split and not relative.startswith(".") and "/." not in relative:
            shards[split[1]].append(path)
    if not shards:
        raise UserError(f"no shards in {folder}: expected train-*.{suffix} and val-*.{suffix}, or train/ and val/")
    for split_name, paths in shards.items():
        totals = {int(found[1]) for path in paths if (found := re.search(r"-of-(\d+)", path.name))}
        if len(totals) == 1 and len(paths) != min(totals):
            raise UserError(f"{folder} has {len(paths)} of {min(totals)} {split_name} shards: download the others")
    test = next((shards[split] for split in TEST_SPLITS if split in shards), None)
    if test is None:
        raise UserError(f"{folder} has no validation shards: expected val, validation or test in their names")
    return shards.get("train", []), test


def name_classes(names: Sequence[str] | None, labels: np.ndarray, folder: Path) -> tuple[str, ...]:
    """Returns ``names``, or numbers if there are none; raises UserError if they do not match the labels."""
    check_labels(labels, min(int(labels.max(initial=0)) + 1, MAX_CLASSES), folder)  # refuses negative labels
    classes = tuple(names or (str(label) for label in range(int(labels.max()) + 1)))
    if len(classes) < 2:
        raise UserError(f"{folder} has one class only ({', '.join(classes)}): a classifier needs two or more")
    check_labels(labels, len(classes), folder)
    return classes


def check_labels(labels: np.ndarray, classes: int, folder: Path, all_present: bool = False) -> None:
    """Raises UserError if a label is not in 0..classes-1 or, with ``all_present``, a class has no image."""
    wrong = labels[(labels < 0) | (labels >= classes)]
    if len(wrong):
        raise UserError(
            f"{folder} has an image of label {wrong[0]}, outside 0..{classes - 1}: "
            f"the split has no labels, or {CLASS_FILES[0]} must name more classes"
        )
    missing = np.flatnonzero(np.bincount(labels, minlength=classes) == 0)
    if all_present and len(missing):
        raise UserError(
            f"{folder} has no training image of class {missing[0]} ({len(missing)} of {classes} classes "
            "have none): is a shard missing?"
        )


class PackedImages(Dataset[Sample]):
    """Images at known positions in larger files, which can be read in any order by any number of workers.

    A file is opened for each image, so that workers inherit no open files. Opening takes 35 us, decoding milliseconds.

    Attributes:
        paths: paths to the files.
        index: a PLACE record for each image.
        exif: see :func:`illama.data.images.decode_image`.
    """

    def __init__(self, paths: list[Path], index: np.ndarray, exif: Exif = "apply") -> None:
        self.paths, self.index, self.exif = paths, index, exif

    @property
    def labels(self) -> np.ndarray:
        return self.index["label"]

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, index: int) -> Sample:
        place = self.index[index]
        with self.paths[place["file"]].open("rb", buffering=0) as file:
            file.seek(int(place["start"]))
            content = io.BytesIO(file.read(int(place["size"])))
        return decode_image(content, lambda: self.describe(index), self.exif), int(place["label"])

    def describe(self, index: int) -> str:
        """Returns a description of where an image is stored, for messages."""
        raise NotImplementedError


class TarImages(PackedImages):
    """The images of a split's tar shards, in the order of the shards.

    Their members are KEY.jpg (or .png, .webp) and KEY.cls, a label. ImageNet is published in this layout, as
    imagenet1k-train-0000.tar and so on. A file classes.txt or classnames.txt may contain the class names, one per line.

    Args:
        split: name of the split, for messages.

    Raises:
        UserError: a shard is truncated, or has an image without a label or a label without an image.
    """

    suffix = "tar"

    def __init__(self, paths: list[Path], split: str, exif: Exif) -> None:
        bar = track(paths, f"index {split}", "shard")
        parts = [np.array(list(_scan(path, number)), dtype=PLACE) for number, path in enumerate(bar)]
        super().__init__(paths, np.concatenate(parts), exif)
        if not len(self):
            raise UserError(f"no images in {paths[0]} and the other {split} shards: expected KEY.jpg and KEY.cls")

    @staticmethod
    def class_names(folder: Path) -> list[str] | None:
        """Returns the lines of classes.txt or classnames.txt, the class names in the order of the labels, or None."""
        path = next((folder / name for name in CLASS_FILES if (folder / name).exists()), None)
        return None if path is None else read_lines(path)

    def in_random_order(self) -> TarImages:
        """Returns these images, which can be read in any order."""
        return self

    def describe(self, index: int) -> str:
        path, start = self.paths[self.index[index]["file"]], self.index[index]["start"]
        with tarfile.open(path, "r:") as tar:
            name = next((member.name for member in tar if member.offset_data == start), "that was there")
        return f"{name} in {path}"


def _scan(path: Path, number: int) -> Iterator[tuple[int, int, int, int]]:
    """Yields the PLACE of every image in a tar file, in the order of the keys' first members."""
    check_regular(path)
    try:
        places, labels, sound = _members(path)
    except UserError:
        raise
    except Exception as error:  # a damaged file can raise anything in tarfile
        raise UserError(f"{path} is truncated or not a tar file: download it again") from error
    if not sound:
        raise UserError(f"{path} is truncated or damaged: download it again")
    for key in places.keys() ^ labels.keys():
        lacks = "label (.cls)" if key in places else "image"
        raise UserError(f"{path}: {key.removeprefix('/')} has no {lacks}: put both into one shard")
    for key, (start, size) in places.items():
        yield number, labels[key], start, size


def _members(path: Path) -> tuple[dict[str, tuple[int, int]], dict[str, int], bool]:
    """Returns key -> (start, size) of the images, key -> label, and whether the archive ends as it must."""
    places: dict[str, tuple[int, int]] = {}
    labels: dict[str, int] = {}
    with tarfile.open(path, "r:") as tar:
        offset = -1
        for member in tar:
            tar.members.clear()  # type: ignore[attr-defined]  # otherwise, it keeps all members in memory
            if member.offset <= offset:  # a negative size leads back
                return places, labels, False
            offset = member.offset
            folder, _, name = member.name.rpartition("/")
            stem, _, suffix = name.partition(".")
            key = f"{folder}/{stem}"
            if suffix.lower() in IMAGE_SUFFIXES:
                _check_member(member, key in places, MAX_IMAGE_BYTES, path)
                places[key] = (member.offset_data, member.size)
            elif suffix == "cls":
                _check_member(member, key in labels, _MAX_LABEL_BYTES, path)
                labels[key] = _label(tar, member, path)
        return places, labels, _ends_here(path, tar.offset)


def _check_member(member: tarfile.TarInfo, twice: bool, limit: int, path: Path) -> None:
    """Raises UserError for a second member of one key, one that is no regular file, or one that is too large."""
    regular = member.isreg() and not member.issparse()
    if twice or not regular or not 0 <= member.size <= limit:
        problem = "is there twice" if twice else f"has {member.size} bytes" if regular else "is not a regular file"
        raise UserError(f"{path}: {member.name} {problem}, which a shard cannot hold")


def _ends_here(path: Path, offset: int) -> bool:
    """Returns whether a block of zeros follows; tarfile does not notice damage between two members."""
    with path.open("rb") as file:
        file.seek(offset)
        return file.read(tarfile.BLOCKSIZE) == bytes(tarfile.BLOCKSIZE)


def _label(tar: tarfile.TarFile, member: tarfile.TarInfo, path: Path) -> int:
    content = tar.extractfile(member)
    text = content.read() if content else b""
    if not text.strip().isdigit():
        raise UserError(f"{path}: {member.name} contains {text[:20]!r}, not a label in digits")
    return int(text)
