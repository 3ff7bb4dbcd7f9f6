"""Image files to pictures."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import BinaryIO

from PIL import Image, UnidentifiedImageError

from illama.errors import UserError


def decode_image(file: str | BinaryIO, name: Callable[[], str], mode: str | None = "RGB") -> Image.Image:
    """A file as an image of a mode of Pillow's, or with None as it is.

    Raises:
        UserError: with its ``name()``, if it is broken or so large that Pillow warns of a decompression bomb.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(file)
        with image:
            return image.convert(mode)
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        limit = (Image.MAX_IMAGE_PIXELS or 0) // 1_000_000
        raise UserError(f"the image {name()} has more than {limit} million pixels: shrink it or take it out") from error
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
        raise UserError(
            f"cannot read the image {name()}: replace it or take it out ({type(error).__name__})"
        ) from error
