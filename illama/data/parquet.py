"""Hugging Face's parquet folders: data/train-00000-of-00010.parquet with columns image {bytes, path} and label.

To read an image from parquet, its whole row group must be read and decompressed. For images of 110 kB, which take 4 ms
to decode, this was measured at 15 ms for row groups of 100 images, and 110 ms for row groups of 100 MB, which the
datasets library now writes. So:

- The test split and the calibration images are read in order, and the last row group is kept in memory.
- Training reads in random order, so its split is first unpacked into one file in the cache folder ($XDG_CACHE_HOME or
  ~/.cache, under illama/), from which an image takes 0.04 ms. The datasets library does the same into Arrow files, but
  also for splits that are read once, and needs about twenty more packages.
"""

from __future__ import annotations

import hashlib
import io
import json
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from torch.utils.data import Dataset

from illama.atomic_write import cache_folder, file_lock, sweep, write_folder
from illama.data.images import decode_image
from illama.data.webdataset import MAX_CLASSES, PLACE, PackedImages, Sample
from illama.errors import UserError
from illama.options import Exif
from illama.progress import track
from illama.structured_files import check_regular, parse_json

IMAGE_COLUMNS = ("image", "img")
LABEL_COLUMNS = ("label", "fine_label", "labels")
MAX_ROW_GROUP = 4 << 30  # bytes after decompression; a whole group is in memory at a time


class ParquetImages(Dataset[Sample]):
    """The images of a split's parquet shards, in the order of the shards; fast to read in order, slow in random order.

    Attributes:
        labels: labels of all images, (N,) int32.
        exif: see :func:`illama.data.images.decode_image`.

    Raises:
        UserError: a shard is truncated, a column is missing or of another type, or a row has no image or label.
    """

    suffix = "parquet"

    def __init__(self, paths: list[Path], split: str, exif: Exif = "apply") -> None:
        self.paths, self.exif = paths, exif
        opened = [open_parquet(path) for path in paths]
        self.image_column, self.label_column = _columns(opened[0], paths[0])
        self._names = _class_names(opened[0], self.label_column, paths[0])
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
        return {**self.__dict__, "_group": -1, "_rows": None}  # the row group is not copied to workers

    def class_names(self, folder: Path) -> list[str] | None:
        """Returns those in the metadata of the first shard, which the datasets library writes; None if it has none."""
        return self._names

    def in_random_order(self) -> Dataset[Sample]:
        """Returns the images of an unpacked copy, which is made on first use."""
        return UnpackedParquet(self)

    def read(self, index: int) -> bytes:
        """Returns the encoded image file in a row."""
        group = int(np.searchsorted(self.starts, index, side="right")) - 1
        if group != self._group or self._rows is None:
            self._rows, self._group = self._read_group(*map(int, self.groups[group])), group
        content = self._rows[int(index - self.starts[group])]["bytes"].as_py()
        if content is None:
            where = self.describe(index)
            raise UserError(f"the image {where} is only a path: write the data set with embedded images")
        return content

    def describe(self, index: int) -> str:
        """Returns the row, from 0, and the shard of an image, for messages."""
        shard = self.groups[np.searchsorted(self.starts, index, side="right") - 1, 0]
        first = self.starts[np.searchsorted(self.groups[:, 0], shard)]
        return f"in row {index - first} of {self.paths[shard]}"

    def _read_group(self, shard: int, group: int) -> pa.ChunkedArray:
        path, rows = self.paths[shard], self.starts[1:] - self.starts[:-1]
        with _damaged(path):  # Arrow's threads do not survive the fork of a worker
            table = open_parquet(path).read_row_group(group, columns=[f"{self.image_column}.bytes"], use_threads=False)
            table.validate(full=True)
        column = table.column(self.image_column)
        claimed = rows[(self.groups == (shard, group)).all(axis=1)]
        if len(column) != claimed[0]:
            raise UserError(f"{path} is damaged: download it again")
        return column

    def _read_labels(self, path: Path, file: pq.ParquetFile) -> np.ndarray:
        if _columns(file, path) != (self.image_column, self.label_column):
            raise UserError(f"{path} does not have the columns of {self.paths[0]}")
        with _damaged(path):
            column = file.read(columns=[self.label_column], use_threads=False).column(0)
        if column.null_count:
            raise UserError(f"{path}: a row has no {self.label_column}")
        if len(column) != file.metadata.num_rows:
            raise UserError(f"{path} is damaged: download it again")
        labels = column.to_numpy()
        if len(labels) and not -MAX_CLASSES <= labels.min() <= labels.max() < MAX_CLASSES:
            raise UserError(f"{path} has labels from {labels.min()} to {labels.max()}: there are no such classes")
        return labels.astype(np.int32)


class UnpackedParquet(PackedImages):
    """A parquet split's images, unpacked into one file in the cache folder on first use.

    Raises:
        UserError: the cache folder cannot be written, or its disk is too small.
    """

    def __init__(self, images: ParquetImages) -> None:
        folder = _cache_folder(images)
        _unpack(images, folder)
        super().__init__([folder / "images"], np.load(folder / "index.npy"), images.exif)
        self.source = images

    def describe(self, index: int) -> str:
        return self.source.describe(index)


@contextmanager
def _damaged(path: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # a damaged file can raise anything in Arrow
        raise UserError(f"{path} is truncated, damaged or not a parquet file: download it again") from error


def open_parquet(path: Path) -> pq.ParquetFile:
    """Opens a parquet file, whose sizes cannot be larger than its bytes allow; raises UserError if they are."""
    check_regular(path)
    with _damaged(path):
        file = pq.ParquetFile(path, memory_map=True, page_checksum_verification=True)
        groups = [file.metadata.row_group(index) for index in range(file.num_row_groups)]
        rows, bytes_ = [group.num_rows for group in groups], [group.total_byte_size for group in groups]
    if sum(rows) != file.metadata.num_rows or min(rows, default=0) < 0 or sum(rows) > path.stat().st_size:
        raise UserError(f"{path} claims {sum(rows)} rows, more than it can have: download it again")
    if max(bytes_, default=0) > MAX_ROW_GROUP:
        raise UserError(f"{path} has a row group of {max(bytes_)} bytes: write it with smaller ones")
    return file


def _columns(file: pq.ParquetFile, path: Path) -> tuple[str, str]:
    """Returns the names of the image and label columns."""
    schema = file.schema_arrow
    for kind, names in (("image", IMAGE_COLUMNS), ("label", LABEL_COLUMNS)):
        if not set(names) & set(schema.names):
            raise UserError(f"{path} has no column {' or '.join(names)} ({kind}), but {', '.join(schema.names)}")
    image = next(name for name in IMAGE_COLUMNS if name in schema.names)
    label = next(name for name in LABEL_COLUMNS if name in schema.names)
    kind = schema.field(image).type
    if not pa.types.is_struct(kind) or kind.get_field_index("bytes") < 0 or not _is_binary(kind.field("bytes").type):
        raise UserError(f"{path}: column {image} is {kind}, not a struct of bytes and path")
    if not pa.types.is_integer(schema.field(label).type):
        raise UserError(f"{path}: column {label} is {schema.field(label).type}, not an integer")
    return image, label


def _is_binary(kind: pa.DataType) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


@dataclass(frozen=True)
class _Feature:
    """A column in the metadata that the datasets library writes; ``names`` are those of a ClassLabel."""

    names: list[str] | None = None


@dataclass(frozen=True)
class _Info:
    features: dict[str, _Feature | list[Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class _HuggingFace:
    info: _Info = field(default_factory=_Info)


def _class_names(file: pq.ParquetFile, column: str, path: Path) -> list[str] | None:
    """Returns the names in the ClassLabel of ``column``, or None if the file's metadata has none."""
    text = (file.schema_arrow.metadata or {}).get(b"huggingface", b"{}")
    feature = parse_json(text, _HuggingFace, f"the metadata of {path}", "ignore").info.features.get(column)
    return feature.names if isinstance(feature, _Feature) else None


def _cache_folder(images: ParquetImages) -> Path:
    """Returns the folder of the unpacked images; its name depends on the shards' paths, sizes and times."""
    stats = [(path.resolve(), path.stat()) for path in images.paths]
    facts = [images.image_column, images.label_column, [(str(p), s.st_size, s.st_mtime_ns) for p, s in stats]]
    key = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]
    return cache_folder() / f"parquet-{key}"


def _unpack(images: ParquetImages, folder: Path) -> None:
    """Writes all image files into one file, and an index of their positions, unless the folder exists."""
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
        with write_folder(folder) as draft, (draft / "images").open("wb") as file:
            index = np.zeros(len(images), PLACE)
            for row in track(range(len(images)), "unpack train", "img"):
                content = images.read(row)
                index[row] = (0, images.labels[row], file.tell(), len(content))
                file.write(content)
            np.save(draft / "index.npy", index)
