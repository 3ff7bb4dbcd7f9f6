"""Image files to upright pictures of 8 bits, and the resize with a centre crop that an evaluation starts with."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import ExifTags, Image, ImageOps
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2

from illama.errors import UserError
from illama.options import Exif

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "PPM", "GIF")  # a phone's MPO is opened as a JPEG
MAX_SIDE = 1_000_000  # pixels; Pillow's table of a resize takes 32 bytes for each
MAX_RESIZED = 64_000_000  # pixels of a resized image that may be made for a crop of it
_BITS_PER_SAMPLE, _PHOTOMETRIC, _SAMPLE_FORMAT = 258, 262, 339  # tags of TIFF
_SIGNED, _WHITE_IS_ZERO = 2, 0  # values of the last two
_AT_ONCE = 1 << 20  # pixels that are scaled in float64 at a time


def decode_image(
    file: str | BinaryIO,
    name: Callable[[], str],
    exif: Exif = "apply",
    mode: str | None = "RGB",
    max_pixels: int | None = None,
) -> Image.Image:
    """An image file of one of :data:`FORMATS`, whatever its name, as a picture of 8 bits; the first of several.

    Grey of another depth is scaled to 8 bits by the depth that the file declares, and rounded: unsigned integers of n
    bits by 255 / (2^n - 1), signed ones by 255 / (2^(n - 1) - 1) with 0 for the negative, floats by 255 with those
    outside of 0..1 clipped. Of colours of 16 bits Pillow takes the upper 8.

    Args:
        name: of the image, for messages.
        exif: whether the orientation that the file declares is applied. Pillow always applies that of a TIFF.
        mode: Pillow's; None for the values as they are in the file, neither scaled nor turned: a file whose values
            Pillow itself would scale (grey of 2 or 4 bits) counts as broken.
        max_pixels: width times height; Pillow's MAX_IMAGE_PIXELS if not given. It and MAX_SIDE are checked before
            anything is decoded.

    Raises:
        UserError: with ``name()``, if the file is broken or of another format, or the image is too large.
    """
    limit = (Image.MAX_IMAGE_PIXELS or math.inf) if max_pixels is None else max_pixels
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the limit is checked here, and damaged metadata is no reason to stop
            picture, orientation = _read(file, mode, limit)
            return _turn(picture, orientation) if exif == "apply" and mode else picture
    except Image.DecompressionBombError as error:
        size = f"{limit / 1e6:.3g} million pixels, or more than {MAX_SIDE} along a side"
        raise UserError(f"the image {name()} has more than {size}: shrink it or take it out") from error
    except MemoryError as error:
        problem = f"the image {name()} is too large for this machine's memory: shrink it or take it out"
        raise UserError(problem) from error
    except Exception as error:  # a damaged file can raise anything in Pillow
        problem = f"cannot read the image {name()}: replace it or take it out ({type(error).__name__})"
        raise UserError(problem) from error


def _read(file: str | BinaryIO, mode: str | None, limit: float) -> tuple[Image.Image, int]:
    """A file's picture, not yet turned, and its orientation."""
    if isinstance(file, str) and Path(file).is_fifo():
        raise ValueError("a pipe, which could be waited for without end")
    with Image.open(file, formats=_formats()) as image:
        if image.width * image.height > limit or max(image.size) > MAX_SIDE:
            raise Image.DecompressionBombError
        if _misread(image, mode):
            raise ValueError("Pillow would give other values than the file's")
        image.load()
        picture = _to_8_bits(image).convert(mode) if mode else image.copy()
        return picture, _orientation(image)


def _misread(image: Image.Image, mode: str | None) -> bool:
    """Whether Pillow would decode other values than those of the file, or scale those that are to stay as they are."""
    tiles = str(getattr(image, "tile", ""))
    swapped = "libtiff" in tiles and any(kind in tiles for kind in (";16BS", ";32BS", ";32BF"))  # libtiff has done it
    return swapped or (mode is None and "L;" in tiles)


def _turn(picture: Image.Image, orientation: int) -> Image.Image:
    if orientation == 1:
        return picture
    picture.info.clear()  # Pillow would write the rest of the metadata anew, and fail where that is damaged
    picture.getexif()[ExifTags.Base.Orientation] = orientation
    return ImageOps.exif_transpose(picture)


@cache
def _formats() -> tuple[str, ...]:
    """Those of FORMATS that this Pillow was built with; it raises KeyError for another."""
    Image.init()
    return tuple(each for each in FORMATS if each in Image.OPEN)


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation that is still to be applied to a decoded image; 1 for none."""
    if image.format == "TIFF":
        return 1  # Pillow has applied it
    try:
        value = image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # damaged metadata can raise anything in Pillow, and the pixels are intact
        return 1
    return value if isinstance(value, int) and 2 <= value <= 8 else 1


def _to_8_bits(image: Image.Image) -> Image.Image:
    """Grey of more than 8 bits, signed or floating, in 8 unsigned bits, as :func:`decode_image` says; else itself."""
    tags: Any = getattr(image, "tag_v2", {}) if image.format == "TIFF" else {}
    signed = tags.get(_SAMPLE_FORMAT, (1,))[0] == _SIGNED
    if image.mode != "F" and not image.mode.startswith("I") and not (image.mode == "L" and signed):
        return image
    values, top = np.asarray(image), 1.0
    if image.mode != "F":
        bits = tags.get(_BITS_PER_SAMPLE, (16,))[0]  # Pillow brings PGM to 16 bits by its maxval
        top = 2.0 ** (bits - signed) - 1
        values = values.astype(f"i{bits // 8}" if signed else np.uint32)  # Pillow's own type may be of another sign
    pixels, result = values.reshape(-1), np.empty(values.shape, np.uint8)
    for start in range(0, pixels.size, _AT_ONCE):
        share = (pixels[start : start + _AT_ONCE].astype(np.float64) / top).clip(0, 1)
        if np.isnan(share).any():
            raise ValueError("a pixel is not a number")
        share = 1 - share if tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO else share
        result.reshape(-1)[start : start + _AT_ONCE] = np.rint(share * 255)
    return Image.fromarray(result)


def crop_of_resized(old: tuple[int, int], short: int, size: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Where a centre crop lies in an image whose shorter side is resized to ``short``, as torchvision rounds both.

    Args:
        old: height and width in pixels.
        size: side of the crop in pixels.

    Returns:
        For the rows and for the columns: the resized length, and the first pixel of the crop.
    """
    longer = int(short * max(old) / min(old))
    height, width = (short, longer) if old[0] <= old[1] else (longer, short)
    return (height, round((height - size) / 2)), (width, round((width - size) / 2))


def bicubic(old: int, new: int, first: int, count: int) -> tuple[int, np.ndarray]:
    """The weights of an antialiased bicubic resize of one axis, as Pillow and PyTorch have them (Keys, a = -0.5).

    Args:
        old, new: length of the axis in pixels before and after.
        first, count: the pixels of the result that are wanted.

    Returns:
        The first pixel that they depend on, and the weights (count, n) of the n pixels from it on, float64.
    """
    scale = old / new
    reach = max(scale, 1.0)
    centres = (first + np.arange(count) + 0.5) * scale
    low, high = max(0, math.floor(centres[0] - 2 * reach)), min(old, math.ceil(centres[-1] + 2 * reach))
    distance = np.abs(np.arange(low, high) + 0.5 - centres[:, None]) / reach
    near = (1.5 * distance - 2.5) * distance**2 + 1
    far = ((2.5 - 0.5 * distance) * distance - 4) * distance + 2
    weights = np.where(distance < 1, near, np.where(distance < 2, far, 0.0))
    return low, weights / weights.sum(1, keepdims=True)


@dataclass(frozen=True)
class ResizeAndCrop:
    """The shorter side to ``short`` pixels, bicubic, then a centre crop of ``size`` pixels.

    Takes a grey or RGB picture, or a uint8 tensor (C, H, W), and gives what torchvision's Resize and CenterCrop give.
    Of a resized image of more than :data:`MAX_RESIZED` pixels only the crop is computed, as a picture, equal to one
    grey level: memory does not depend on how long an image is for its width.
    """

    short: int
    size: int

    def __call__(self, image: Any) -> Any:
        height, width = v2.functional.get_size(image)
        (new_height, top), (new_width, left) = crop_of_resized((height, width), self.short, self.size)
        if new_height * new_width <= MAX_RESIZED:
            resized = v2.functional.resize(image, [self.short], InterpolationMode.BICUBIC)
            return v2.functional.center_crop(resized, [self.size, self.size])
        picture = v2.functional.to_pil_image(image) if isinstance(image, Tensor) else image
        upper, rows = bicubic(height, new_height, top, self.size)
        start, columns = bicubic(width, new_width, left, self.size)
        pixels = np.asarray(picture.crop((start, upper, start + columns.shape[1], upper + rows.shape[1])))
        # The order of Pillow 13, which decides where values are rounded: tall pictures shrink in height first.
        rows_first = height > 2 * width and new_height < height
        for axis in (0, 1) if rows_first else (1, 0):
            pixels = _resample(pixels, (rows, columns)[axis], axis)
        return Image.fromarray(pixels)


def _resample(pixels: np.ndarray, weights: np.ndarray, axis: int) -> np.ndarray:
    """One pass of a resize, in Pillow's fixed point: weights of 22 bits. Float64 holds these integers exactly."""
    sums = np.tensordot(np.rint(weights * 2**22), pixels.astype(np.float64), (1, axis))
    levels = np.floor(sums / 2**22 + 0.5).clip(0, 255).astype(np.uint8)
    return np.ascontiguousarray(np.moveaxis(levels, 0, axis))
