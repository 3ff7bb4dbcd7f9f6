"""From an image file to what a bundle's network takes: one function for predictions and for the server."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, BinaryIO

import numpy as np

from illama.bundle import FRAME, Manifest
from illama.data.datasets import Preprocessing
from illama.data.images import decode_image
from illama.errors import UserError


@dataclass(frozen=True)
class ImageInput:
    """How image files become the input of a network.

    Attributes:
        preprocessing: of the bundle; part of the graph itself where there is a ``frame``.
        frame: (height, width, channels) of the uint8 frames that a graph of ``deploy/camera.py`` takes.
    """

    preprocessing: Preprocessing
    frame: tuple[int, int, int] | None = None

    @classmethod
    def of(cls, manifest: Manifest) -> ImageInput:
        """The input of a bundle; UserError if its preprocessing is damaged."""
        return cls.from_dict({"preprocessing": manifest.preprocessing, FRAME: manifest.metrics.get(FRAME)})

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ImageInput:
        """What :meth:`to_dict` gave, as JSON holds it."""
        frame = values[FRAME]
        return cls(Preprocessing.from_dict(values["preprocessing"]), tuple(frame) if frame else None)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of one image as the network takes it: (C, H, W), or (H, W, C) for frames."""
        size = self.preprocessing.image_size
        return self.frame or (self.preprocessing.in_channels, size, size)

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of the network's input."""
        return np.dtype(np.uint8 if self.frame else np.float32)

    def read(self, file: str | BinaryIO, name: Callable[[], str], max_pixels: int | None = None) -> np.ndarray:
        """An image file as the network takes it, of :attr:`shape` and :attr:`dtype`.

        Raises:
            UserError: with ``name()``, for a file that cannot be read, or a picture that is not of the frame's size.
        """
        image = decode_image(file, name, self.preprocessing.exif, max_pixels=max_pixels)
        if self.frame is None:
            return np.ascontiguousarray(self.preprocessing.transform()(image).numpy())
        height, width, channels = self.frame
        if (image.height, image.width) != (height, width):
            raise UserError(
                f"the image {name()} is {image.height}x{image.width}, and the network takes frames of {height}x{width}"
            )
        return np.asarray(image.convert("RGB" if channels == 3 else "L")).reshape(self.frame)
