"""Decodes image files to upright 8-bit images, and resizes and crops them in bounded memory."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import ExifTags, Image, ImageOps

from illama.errors import UserError
from illama.options import Exif, Interpolation

Resize = int | tuple[int, int]  # see crop_of_resized
_RESAMPLING = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "PPM", "GIF")  # a phone's MPO is opened as a JPEG
MAX_SIDE = 1_000_000  # pixels; Pillow's table for a resize takes 32 bytes per pixel of a side
MAX_RESIZED = 64_000_000  # pixels; if a resized image would be larger, only its crop is computed
_BITS_PER_SAMPLE, _PHOTOMETRIC, _SAMPLE_FORMAT = 258, 262, 339  # TIFF tags
_SIGNED, _WHITE_IS_ZERO = 2, 0  # values of _SAMPLE_FORMAT and _PHOTOMETRIC
PICTURES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff"}
_AT_ONCE = 1 << 20  # pixels that are scaled in float64 at a time


def list_pictures(folder: Path) -> list[Path]:
    """Returns the image files in a folder, at any depth, in the order of their paths; UserError if there is none."""
    if found := sorted(path for path in folder.rglob("*") if path.suffix.lower() in PICTURES):
        return found
    raise UserError(f"{folder} has no pictures: expected files ending in {', '.join(sorted(PICTURES))}")


def decode_image(
    file: str | BinaryIO,
    name: Callable[[], str] | None = None,
    exif: Exif = "apply",
    mode: str | None = "RGB",
    max_pixels: int | None = None,
) -> Image.Image:
    """Decodes an image file of one of :data:`FORMATS`, whatever its name, to 8 bits; only its first frame.

    Gray values of other depths are scaled to 8 bits by the depth that the file declares, and rounded: unsigned integers
    of n bits by 255 / (2^n - 1); signed ones by 255 / (2^(n - 1) - 1), negative values to 0; floats by 255, clipped to
    0..1 first. For 16-bit colors, Pillow keeps the upper 8 bits.

    Args:
        file: path or open file.
        name: returns the name of the image for messages. Defaults to the path.
        exif: whether to apply the orientation that the file declares. Pillow always applies a TIFF's.
        mode: Pillow's mode of the result. If None, the file's values are neither scaled nor rotated, and a file whose
            values Pillow would scale (gray of 2 or 4 bits) counts as broken.
        max_pixels: limit on width times height. Defaults to Pillow's MAX_IMAGE_PIXELS. This and MAX_SIDE are checked
            before decoding.

    Raises:
        UserError: the file is broken or of another format, or the image is too large; the message contains ``name()``.
    """
    name = name or (lambda: str(file))
    limit = (Image.MAX_IMAGE_PIXELS or math.inf) if max_pixels is None else max_pixels
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the size is checked here, and damaged metadata is no error
            picture, orientation = _read(file, mode, limit)
            return _turn(picture, orientation) if exif == "apply" and mode else picture
    except Image.DecompressionBombError as error:
        size = f"{limit / 1e6:.3g} million pixels, or more than {MAX_SIDE} along a side"
        raise UserError(f"the image {name()} has more than {size}: resize it or remove it") from error
    except MemoryError as error:
        problem = f"the image {name()} is too large for this machine's memory: resize it or remove it"
        raise UserError(problem) from error
    except Exception as error:  # a damaged file can raise anything in Pillow
        problem = f"cannot read the image {name()}: replace it or remove it ({type(error).__name__})"
        raise UserError(problem) from error


def _read(file: str | BinaryIO, mode: str | None, limit: float) -> tuple[Image.Image, int]:
    """Returns a file's image, not yet rotated, and its orientation."""
    if isinstance(file, str) and Path(file).is_fifo():
        raise ValueError("reading a pipe could block forever")
    with Image.open(file, formats=_formats()) as image:
        if image.width * image.height > limit or max(image.size) > MAX_SIDE:
            raise Image.DecompressionBombError
        if _misread(image, mode):
            raise ValueError("Pillow would not return the file's values")
        image.load()
        picture = _to_8_bits(image).convert(mode) if mode else image.copy()
        return picture, _orientation(image)


def _misread(image: Image.Image, mode: str | None) -> bool:
    """Returns whether Pillow would decode wrong values, or would scale values that must not be scaled."""
    tiles = str(getattr(image, "tile", ""))
    swapped = "libtiff" in tiles and any(kind in tiles for kind in (";16BS", ";32BS", ";32BF"))  # libtiff has done it
    return swapped or (mode is None and "L;" in tiles)


def _turn(picture: Image.Image, orientation: int) -> Image.Image:
    if orientation == 1:
        return picture
    picture.info.clear()  # Pillow would rewrite the other metadata, and fail if it is damaged
    picture.getexif()[ExifTags.Base.Orientation] = orientation
    return ImageOps.exif_transpose(picture)


@cache
def _formats() -> tuple[str, ...]:
    """Returns the FORMATS that this Pillow was built with; for others, Pillow raises KeyError."""
    Image.init()
    return tuple(each for each in FORMATS if each in Image.OPEN)


def _orientation(image: Image.Image) -> int:
    """Returns the EXIF orientation that must still be applied to a decoded image; 1 for none."""
    if image.format == "TIFF":
        return 1  # Pillow has applied it
    try:
        value = image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # damaged metadata can raise anything in Pillow; the pixels are intact
        return 1
    return value if isinstance(value, int) and 2 <= value <= 8 else 1


def _to_8_bits(image: Image.Image) -> Image.Image:
    """Scales gray values that are not 8-bit unsigned as :func:`decode_image` says; returns other images unchanged."""
    tags: Any = getattr(image, "tag_v2", {}) if image.format == "TIFF" else {}
    signed = tags.get(_SAMPLE_FORMAT, (1,))[0] == _SIGNED
    if image.mode != "F" and not image.mode.startswith("I") and not (image.mode == "L" and signed):
        return image
    values, top = np.asarray(image), 1.0
    if image.mode != "F":
        bits = tags.get(_BITS_PER_SAMPLE, (16,))[0]  # Pillow scales PGM to 16 bits by its maxval
        top = 2.0 ** (bits - signed) - 1
        values = values.astype(f"i{bits // 8}" if signed else np.uint32)  # Pillow's dtype may have the wrong sign
    pixels, result = values.reshape(-1), np.empty(values.shape, np.uint8)
    for start in range(0, pixels.size, _AT_ONCE):
        share = (pixels[start : start + _AT_ONCE].astype(np.float64) / top).clip(0, 1)
        if np.isnan(share).any():
            raise ValueError("a pixel is not a number")
        share = 1 - share if tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO else share
        result.reshape(-1)[start : start + _AT_ONCE] = np.rint(share * 255)
    return Image.fromarray(result)


def crop_of_resized(
    old: tuple[int, int], to: Resize, size: tuple[int, int], floor: bool = False
) -> tuple[tuple[int, int], tuple[int, int]]:
    """Returns the position of a center crop in a resized image.

    Args:
        old: height and width in pixels.
        to: resized length of the shorter side in pixels, rounded as in torchvision; or height and width of a box that
            the resized image covers, rounded as in timm.
        size: height and width of the crop in pixels.
        floor: whether half a pixel in front of the crop is rounded down, as in transformers, and not to even.

    Returns:
        For the rows and for the columns: the resized length, and the first pixel of the crop.
    """
    if isinstance(to, int):
        longer = int(to * max(old) / min(old))
        height, width = (to, longer) if old[0] <= old[1] else (longer, to)
    else:
        ratio = min(length / each for length, each in zip(old, to, strict=True))
        height, width = (round(length / ratio) for length in old)
    rounded = math.floor if floor else round
    return (height, rounded((height - size[0]) / 2)), (width, rounded((width - size[1]) / 2))


def resize_weights(
    old: int, new: int, first: int, count: int, interpolation: Interpolation = "bicubic"
) -> tuple[int, np.ndarray]:
    """Returns the weights of an antialiased resize along one axis, as in Pillow and PyTorch.

    ``bicubic`` is the kernel of Keys with a = -0.5, ``bilinear`` a triangle.

    Args:
        old: length of the axis in pixels.
        new: length of the resized axis in pixels.
        first: first pixel of the result to compute.
        count: number of pixels of the result to compute.

    Returns:
        The first pixel of the input that is used, and the weights (count, n) of the n pixels from there on, float64.
    """
    scale = old / new
    reach = max(scale, 1.0)
    centers = (first + np.arange(count) + 0.5) * scale
    support = reach * (2 if interpolation == "bicubic" else 1)
    low, high = max(0, math.floor(centers[0] - support)), min(old, math.ceil(centers[-1] + support))
    distance = np.abs(np.arange(low, high) + 0.5 - centers[:, None]) / reach
    if interpolation == "bicubic":
        near = (1.5 * distance - 2.5) * distance**2 + 1
        far = ((2.5 - 0.5 * distance) * distance - 4) * distance + 2
        weights = np.where(distance < 1, near, np.where(distance < 2, far, 0.0))
    else:
        weights = np.maximum(1 - distance, 0.0)
    return low, weights / weights.sum(1, keepdims=True)


def resize(image: Image.Image, size: tuple[int, int], interpolation: Interpolation) -> Image.Image:
    """Resizes an image to (height, width); returns it unchanged if it has this size, as torchvision does."""
    height, width = size
    return image if image.size == (width, height) else image.resize((width, height), _RESAMPLING[interpolation])


def resize_and_crop(
    image: Image.Image, to: Resize, size: tuple[int, int], interpolation: Interpolation = "bicubic", floor: bool = False
) -> Image.Image:
    """Resizes a gray or RGB image, then crops the center, as torchvision and timm do.

    If the resized image would have more than :data:`MAX_RESIZED` pixels, only the crop is computed, so that
    memory does not depend on the ratio of an image's sides. The result then equals torchvision's up to one gray level.

    Args:
        to, floor: see :func:`crop_of_resized`.
        size: height and width of the crop in pixels.
    """
    (new_height, top), (new_width, left) = crop_of_resized((image.height, image.width), to, size, floor)
    if new_height * new_width <= MAX_RESIZED:
        whole = resize(image, (new_height, new_width), interpolation)
        return whole.crop((left, top, left + size[1], top + size[0]))
    upper, rows = resize_weights(image.height, new_height, top, size[0], interpolation)
    start, columns = resize_weights(image.width, new_width, left, size[1], interpolation)
    pixels = np.asarray(image.crop((start, upper, start + columns.shape[1], upper + rows.shape[1])))
    # Values are rounded between the axes. As in Pillow 13, tall images shrink in height first.
    rows_first = image.height > 2 * image.width and new_height < image.height
    for axis in (0, 1) if rows_first else (1, 0):
        pixels = _resample(pixels, (rows, columns)[axis], axis)
    return Image.fromarray(pixels)


def _resample(pixels: np.ndarray, weights: np.ndarray, axis: int) -> np.ndarray:
    """Resizes along one axis in Pillow's fixed point, with weights of 22 bits; float64 represents them exactly."""
    sums = np.tensordot(np.rint(weights * 2**22), pixels.astype(np.float64), (1, axis))
    levels = np.floor(sums / 2**22 + 0.5).clip(0, 255).astype(np.uint8)
    return np.ascontiguousarray(np.moveaxis(levels, 0, axis))
