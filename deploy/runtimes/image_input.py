"""Reads image files as the input of a bundle's network, for predictions and for the server."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np

from illama.data.images import decode_image
from illama.data.preprocessing import Preprocessing
from illama.errors import UserError
from illama.manifest import Manifest


@dataclass(frozen=True)
class ImageInput:
    """The input of a bundle's network.

    Attributes:
        preprocessing: preprocessing of the bundle; if ``frame`` is given, it is part of the graph.
        frame: (height, width, channels) of the uint8 frames that a graph of ``deploy/camera.py`` takes.
    """

    preprocessing: Preprocessing
    frame: tuple[int, int, int] | None = None

    @classmethod
    def of(cls, manifest: Manifest) -> ImageInput:
        """Returns the input of a bundle."""
        return cls(manifest.preprocessing, manifest.frame)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape of one input without the batch: (C, H, W), or (H, W, C) for frames."""
        return self.frame or (self.preprocessing.in_channels, *self.preprocessing.size)

    @property
    def dtype(self) -> np.dtype[Any]:
        """dtype of the network's input."""
        return np.dtype(np.uint8 if self.frame else np.float32)

    def read(self, file: str | BinaryIO, name: Callable[[], str], max_pixels: int | None = None) -> np.ndarray:
        """Reads an image file as an input of :attr:`shape` and :attr:`dtype`.

        Args:
            name: returns the name of the image for error messages.
            max_pixels: larger images are rejected before they are decoded.

        Raises:
            UserError: the file cannot be read, or its size is not the frame's.
        """
        image = decode_image(file, name, self.preprocessing.exif, max_pixels=max_pixels)
        if self.frame is None:
            return self.preprocessing.to_array(image)
        height, width, channels = self.frame
        if (image.height, image.width) != (height, width):
            raise UserError(
                f"the image {name()} is {image.height}x{image.width}, but the network takes frames of {height}x{width}"
            )
        return np.asarray(image.convert("RGB" if channels == 3 else "L")).reshape(self.frame)
