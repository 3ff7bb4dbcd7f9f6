"""Reads idx files, the format of MNIST and Fashion-MNIST."""

from __future__ import annotations

import gzip
import lzma
import math
import struct
import zlib
from pathlib import Path

import numpy as np

from illama.errors import UserError
from illama.structured_files import check_regular

_LARGEST_RATIO = 1100  # of gzip: 1032 bytes from one; xz compresses images by less than 10
_DIMENSIONS = 3


def read_idx(path: Path) -> np.ndarray:
    """Reads a .gz or .xz idx file of unsigned bytes (MNIST's format); raises UserError for any other file."""
    check_regular(path)
    try:
        with (lzma.open if path.suffix == ".xz" else gzip.open)(path) as file:
            head = file.read(4)
            if head[:3] != b"\0\0\x08" or not 1 <= head[3] <= _DIMENSIONS:
                raise UserError(f"{path} is not an idx file of unsigned bytes")
            shape = struct.unpack(f">{head[3]}I", file.read(4 * head[3]))
            size = math.prod(shape)
            if size > _LARGEST_RATIO * path.stat().st_size or len(content := file.read(size + 1)) != size:
                raise ValueError
        return np.frombuffer(content, np.uint8).reshape(shape).copy()
    except (EOFError, ValueError, IndexError, OSError, struct.error, zlib.error, lzma.LZMAError) as error:
        raise UserError(f"{path} is truncated or damaged: download it again") from error


def read_idx_pair(folder: Path, split: str, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Reads the images (N, H, W) and labels (N,) of a split; raises UserError if they are missing or damaged.

    Args:
        classes: number of classes, which no label may reach.
    """
    images = read_idx(_find(folder, f"{split}-images-idx3-ubyte"))
    labels = read_idx(_find(folder, f"{split}-labels-idx1-ubyte"))
    if images.ndim != 3 or not images.size or labels.shape != (len(images),):
        raise UserError(f"{folder} has {len(images)} {split} images but {labels.size} labels: download them again")
    if labels.max() >= classes:
        raise UserError(f"{folder} has an image of label {labels.max()}, outside 0..{classes - 1}")
    return images, labels


def _find(folder: Path, name: str) -> Path:
    """Returns the .gz file, or the .xz file that an installed wheel has instead."""
    smaller = folder / f"{name}.xz"
    return smaller if smaller.exists() else folder / f"{name}.gz"
