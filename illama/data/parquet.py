"""Hugging Face's parquet folders: data/train-00000-of-00010.parquet with columns image {bytes, path} and label.

Parquet gives no image alone: to read one, its whole row group is read and unpacked. On the machine it was measured
on, with images of 110 kB that take 4 ms to decode, that is 15 ms for row groups of 100 images and 110 ms for those of
100 MB which the datasets library writes now. So:

- The test split and calibration images are read in order, with the last row group kept: nothing is copied.
- Training reads in a random order, so its split is unpacked once, each image as it is, into one file in the cache
  folder ($XDG_CACHE_HOME or ~/.cache, under illama/), where an image takes 0.04 ms. The datasets library does the
  same into Arrow files, also for splits that are only read once, and brings some twenty more packages.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from torch.utils.data import Dataset
from tqdm import tqdm

from illama.atomic_write import file_lock, sweep, write_folder
from illama.data.images import decode_image
from illama.data.webdataset import (
    PLACE,
    PackedImages,
    Sample,
    check_labels,
    evaluation_shards,
    find_shards,
    name_classes,
    train_shards,
)
from illama.errors import UserError
from illama.options import Exif

IMAGE_COLUMNS = ("image", "img")
LABEL_COLUMNS = ("label", "fine_label", "labels")


class ParquetImages(Dataset[Sample]):
    """The images of a split's parquet shards, in the shards' order: quick to read in order, and slow in any other.

    Attributes:
        labels: of all images, (N,) int32.
        names: of the classes, from the metadata that the datasets library writes; None if there are none.
        exif: see :func:`illama.data.images.decode_image`.

    Raises:
        UserError: a shard is truncated, a column is missing or of another type, or a row has no image or label.
    """

    def __init__(self, paths: list[Path], exif: Exif = "apply") -> None:
        self.paths, self.exif = paths, exif
        opened = [_open(path) for path in paths]
        self.image_column, self.label_column = _columns(opened[0], paths[0])
        self.names = _class_names(opened[0], self.label_column)
        groups = [(shard, group) for shard, file in enumerate(opened) for group in range(file.num_row_groups)]
        self.groups = np.array(groups, np.int32).reshape(-1, 2)
        self.starts = np.cumsum([0, *(opened[s].metadata.row_group(g).num_rows for s, g in groups)])
        self.labels = np.concatenate([self._read_labels(path, file) for path, file in zip(paths, opened, strict=True)])
        if not len(self):
            raise UserError(f"no images in {paths[0]}" + " and the other shards of its split" * (len(paths) > 1))
        self._group = -1
        self._rows: pa.ChunkedArray | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Sample:
        content = io.BytesIO(self.read(index))
        return decode_image(content, lambda: self.describe(index), self.exif), int(self.labels[index])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_group": -1, "_rows": None}  # a worker is not sent the row group

    def read(self, index: int) -> bytes:
        """The image file in a row, as it was stored."""
        group = int(np.searchsorted(self.starts, index, side="right")) - 1
        if group != self._group or self._rows is None:
            self._rows, self._group = self._read_group(*map(int, self.groups[group])), group
        content = self._rows[int(index - self.starts[group])]["bytes"].as_py()
        if content is None:
            where = self.describe(index)
            raise UserError(f"the image {where} is a path alone: write the set with its images embedded")
        return content

    def describe(self, index: int) -> str:
        """Where an image comes from, for messages: the row, from 0, and the shard."""
        shard = self.groups[np.searchsorted(self.starts, index, side="right") - 1, 0]
        first = self.starts[np.searchsorted(self.groups[:, 0], shard)]
        return f"in row {index - first} of {self.paths[shard]}"

    def _read_group(self, shard: int, group: int) -> pa.ChunkedArray:
        path = self.paths[shard]
        try:  # threads of Arrow's would not live on in a forked worker
            table = _open(path).read_row_group(group, columns=[f"{self.image_column}.bytes"], use_threads=False)
        except (pa.ArrowException, OSError) as error:
            raise UserError(f"{path} is damaged: fetch it again") from error
        return table.column(self.image_column)

    def _read_labels(self, path: Path, file: pq.ParquetFile) -> np.ndarray:
        if _columns(file, path) != (self.image_column, self.label_column):
            raise UserError(f"{path} has other columns than {self.paths[0]}")
        try:
            column = file.read(columns=[self.label_column], use_threads=False).column(0)
        except (pa.ArrowException, OSError) as error:
            raise UserError(f"{path} is damaged: fetch it again") from error
        if column.null_count:
            raise UserError(f"{path}: a row has no {self.label_column}")
        return column.to_numpy().astype(np.int32)


class UnpackedParquet(PackedImages):
    """A parquet split's images, unpacked into one file of the cache folder unless they are there already.

    Raises:
        UserError: the cache folder cannot be written or has no room for the images.
    """

    def __init__(self, images: ParquetImages) -> None:
        folder = _cache_folder(images)
        _unpack(images, folder)
        super().__init__([folder / "images"], np.load(folder / "index.npy"), images.exif)
        self.source = images

    def describe(self, index: int) -> str:
        return self.source.describe(index)


class ParquetFolder:
    """A folder in the layout that the datasets library writes and Hugging Face publishes.

    Classes are named by the ClassLabel in the first test shard, and are numbers if it has none.
    """

    def __init__(self, folder: Path, exif: Exif = "apply") -> None:
        self.folder, self.shards, self.exif = folder, find_shards(folder, "parquet"), exif
        self.test = ParquetImages(evaluation_shards(self.shards, folder), exif)
        self.classes = name_classes(self.test.names, self.test.labels, folder)
        self._train: ParquetImages | None = None

    def train(self, shuffled: bool) -> Dataset[Sample]:
        """The training images; if they will be read ``shuffled``, from a copy that is made on first use."""
        if self._train is None:
            self._train = ParquetImages(train_shards(self.shards, self.folder), self.exif)
            check_labels(self._train.labels, len(self.classes), self.folder, all_present=True)
        return UnpackedParquet(self._train) if shuffled else self._train


def _open(path: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(path, memory_map=True)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path} is truncated or no parquet file: fetch it again") from error


def _columns(file: pq.ParquetFile, path: Path) -> tuple[str, str]:
    """The names of the columns of images and labels."""
    schema = file.schema_arrow
    for kind, names in (("image", IMAGE_COLUMNS), ("label", LABEL_COLUMNS)):
        if not set(names) & set(schema.names):
            raise UserError(f"{path} has no column {' or '.join(names)} ({kind}), but {', '.join(schema.names)}")
    image = next(name for name in IMAGE_COLUMNS if name in schema.names)
    label = next(name for name in LABEL_COLUMNS if name in schema.names)
    kind = schema.field(image).type
    if not pa.types.is_struct(kind) or kind.get_field_index("bytes") < 0:
        raise UserError(f"{path}: column {image} is {kind}, not a struct of bytes and path")
    if not pa.types.is_integer(schema.field(label).type):
        raise UserError(f"{path}: column {label} is {schema.field(label).type}, not an integer")
    return image, label


def _class_names(file: pq.ParquetFile, column: str) -> list[str] | None:
    """The names in the ClassLabel of ``column``, if the file's metadata has one."""
    try:
        features = json.loads((file.schema_arrow.metadata or {})[b"huggingface"])["info"]["features"]
        return features[column]["names"]
    except (KeyError, TypeError, ValueError):
        return None


def _cache_folder(images: ParquetImages) -> Path:
    """Where the unpacked images belong; another place as soon as a shard changes."""
    stats = [(path.resolve(), path.stat()) for path in images.paths]
    facts = [images.image_column, images.label_column, [(str(p), s.st_size, s.st_mtime_ns) for p, s in stats]]
    key = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "illama" / f"parquet-{key}"


def _unpack(images: ParquetImages, folder: Path) -> None:
    """Write every image, as it is, into one file, and where each of them begins, if that is not yet done."""
    needed = sum(path.stat().st_size for path in images.paths)
    advice = f"training needs {needed / 1e9:.1f} GB there to unpack the images; set XDG_CACHE_HOME to another folder"
    with ExitStack() as stack:
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(file_lock(folder.with_suffix(".lock"), wait=True))  # one process unpacks for all
        except OSError as error:
            raise UserError(f"cannot write {folder.parent} ({error.strerror}): {advice}") from error
        sweep(folder.parent, folder.name)
        if folder.exists():
            return
        free = shutil.disk_usage(folder.parent).free
        if free < needed:
            raise UserError(f"{folder.parent} has {free / 1e9:.1f} GB free: {advice}")
        with write_folder(folder) as draft:
            _write_images(images, draft)


def _write_images(images: ParquetImages, folder: Path) -> None:
    index = np.zeros(len(images), PLACE)
    with (folder / "images").open("wb") as file:
        for row in tqdm(range(len(images)), desc="unpack train", unit="img", disable=None, leave=False):
            content = images.read(row)
            index[row] = (0, images.labels[row], file.tell(), len(content))
            file.write(content)
    np.save(folder / "index.npy", index)
