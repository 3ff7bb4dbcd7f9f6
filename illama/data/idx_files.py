"""Reads idx files, the format of MNIST and Fashion-MNIST."""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path

import numpy as np

from illama.errors import UserError


def read_idx(path: Path) -> np.ndarray:
    """Reads a gzipped idx file of unsigned bytes (MNIST's format); raises UserError for any other file."""
    try:
        raw = gzip.decompress(path.read_bytes())
        if raw[:3] != b"\0\0\x08":
            raise UserError(f"{path} is not an idx file of unsigned bytes")
        shape = np.frombuffer(raw, dtype=">u4", count=raw[3], offset=4)
        return np.frombuffer(raw, dtype=np.uint8, offset=4 + 4 * raw[3]).reshape(shape).copy()
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing") from error
    except (EOFError, ValueError, IndexError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path} is truncated or damaged: download it again") from error


def read_idx_pair(folder: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Reads the images (N, H, W) and labels (N,) of a split; raises UserError if they are missing or damaged."""
    images = read_idx(folder / f"{split}-images-idx3-ubyte.gz")
    labels = read_idx(folder / f"{split}-labels-idx1-ubyte.gz")
    if len(images) != len(labels):
        raise UserError(f"{folder} has {len(images)} {split} images but {len(labels)} labels: download them again")
    return images, labels
