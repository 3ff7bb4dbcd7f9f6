"""How an image becomes the network's input."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from illama.data.images import Interpolation, Resize, crop_of_resized, resize, resize_and_crop
from illama.errors import UserError
from illama.options import ClassOrder, Exif

MAX_SIDE = 16_384  # pixels of the network's input

if TYPE_CHECKING:
    from torch import Tensor
    from torchvision.transforms import InterpolationMode

Transform = Callable[[Any], "Tensor"]


@dataclass(frozen=True)
class Preprocessing:
    """How an image file is converted to the network's input, and in which order class folders are read.

    Attributes:
        size: (height, width) of the network's input in pixels.
        in_channels: 1 (gray) or 3 (RGB).
        mean: mean per channel of pixels scaled to 0..1.
        std: standard deviation per channel of pixels scaled to 0..1.
        resize: length to which the shorter side is resized before a center crop; or height and width of a box that the
            image is resized to cover, for a crop that is not square. If None, the image is warped to ``size`` without a
            crop, as in the paper from 384 pixels on.
        interpolation: interpolation of the resize.
        exif: whether to apply the orientation that an image file declares.
        class_order: order of class folders, as words (1, 10, 2) or natural (1, 2, 10) as in timm. It does not affect
            images, so it is ignored in comparisons.
        crop_floor: whether half a pixel in front of the crop is rounded down, as in transformers, and not to even.

    Raises:
        UserError: a value is not supported, or resize is smaller than the image size.
    """

    size: tuple[int, int]
    in_channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    resize: Resize | None = None
    interpolation: Interpolation = "bicubic"
    exif: Exif = "apply"
    class_order: ClassOrder = field(default="words", compare=False)
    crop_floor: bool = False

    def __post_init__(self) -> None:
        if self.in_channels not in (1, 3):
            raise UserError(f"in_channels must be 1 (gray) or 3 (RGB), not {self.in_channels}")
        if not 1 <= min(self.size) <= max(self.size) <= MAX_SIDE:
            raise UserError(f"an input of {self.size[0]}x{self.size[1]} pixels is not supported")
        finite = all(map(math.isfinite, self.mean)) and all(0 < value < math.inf for value in self.std)
        if not len(self.mean) == len(self.std) == self.in_channels or not finite:
            raise UserError(f"mean and std need a number for each of {self.in_channels} channels, and std above 0")
        box = (self.resize, self.resize) if isinstance(self.resize, int) else self.resize or self.size
        if not all(side <= length <= MAX_SIDE for side, length in zip(self.size, box, strict=True)):
            raise UserError(f"resize {self.resize} does not fit an input of {self.size[0]}x{self.size[1]}: change it")

    def __str__(self) -> str:
        """The steps in words."""
        size = f"{self.size[0]}x{self.size[1]}"
        height, width = self.resize if isinstance(self.resize, tuple) else (self.resize, None)
        to = f"to cover {height}x{width}" if width else f"the shorter side to {height} pixels"
        crop = f"{to} ({self.interpolation}), then a center crop of {size}"
        resize = crop if self.resize else f"to {size} ({self.interpolation})"
        mean, std = (", ".join(f"{value:g}" for value in values) for values in (self.mean, self.std))
        color = "gray" if self.in_channels == 1 else "RGB"
        return f"resize {resize}; {color} from 0 to 1, minus {mean}, divided by {std}"

    @classmethod
    def imagenet(cls, side: int, in_channels: int = 3) -> Preprocessing:
        """Returns the released code's, for an input of side x side pixels: resize to 256/224 and crop; without a crop
        up to 32 and from 384 pixels.
        """
        mean: tuple[float, ...] = (0.449,) if in_channels == 1 else (0.485, 0.456, 0.406)
        std: tuple[float, ...] = (0.226,) if in_channels == 1 else (0.229, 0.224, 0.225)
        resize = None if side >= 384 or side <= 32 else side * 256 // 224
        return cls((side, side), in_channels, mean, std, resize)

    def to_array(self, image: Image.Image) -> np.ndarray:
        """Converts an image to the network's input (in_channels, H, W) float32, without PyTorch."""
        return self.normalize(self.frame(image))

    def frame(self, image: Image.Image) -> Image.Image:
        """Resizes and crops an image to the network's size."""
        if self.resize:
            image = resize_and_crop(image, self.resize, self.size, self.interpolation, self.crop_floor)
        return resize(image, self.size, self.interpolation)

    def crop_in(self, size: tuple[int, int]) -> tuple[tuple[int, int], tuple[int, int]]:
        """Returns :func:`illama.data.images.crop_of_resized` for an image of ``size``; there must be a resize."""
        return crop_of_resized(size, self.resize or 0, self.size, self.crop_floor)

    def normalize(self, image: Image.Image) -> np.ndarray:
        """Converts an image of the network's size to its input (in_channels, H, W) float32.

        Every value is rounded as torchvision rounds it, so that both give the same input to the bit.
        """
        pixels = np.asarray(image.convert("L" if self.in_channels == 1 else "RGB"), np.float32)
        mean, std = (np.array(values, np.float32) for values in (self.mean, self.std))
        scaled = pixels.reshape(*self.size, self.in_channels) * np.float32(1 / 255)
        return np.ascontiguousarray(((scaled - mean) / std).transpose(2, 0, 1))

    def tensor_steps(self) -> list[Callable[[Any], Any]]:
        """Returns torchvision's steps of :meth:`normalize`, which also take uint8 tensors (C, H, W) and label maps."""
        import torch
        from torchvision.transforms import v2

        return [
            v2.Grayscale(1) if self.in_channels == 1 else v2.RGB(),
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(list(self.mean), list(self.std)),
        ]

    def transform(self, augment: Sequence[Callable[[Any], Any]] = ()) -> Transform:
        """Returns a function from a PIL image or uint8 tensor (C, H, W) to a float tensor (in_channels, H, W).

        Args:
            augment: steps to use instead of the crop; they come first and must return an image of the input's shape.
        """
        from torchvision.transforms import InterpolationMode, v2

        kind = InterpolationMode(self.interpolation)
        crop = [partial(self._cropped, kind=kind)] if self.resize else []
        steps = v2.Compose([*(augment or crop), v2.Resize(list(self.size), kind), *self.tensor_steps()])
        return steps if augment else partial(_to_tensor, self, steps)

    def _cropped(self, image: Tensor, kind: InterpolationMode) -> Tensor:
        """Resizes an image (C, H, W) and crops its center."""
        from torchvision.transforms.v2.functional import resize

        (height, top), (width, left) = self.crop_in((image.shape[-2], image.shape[-1]))
        return resize(image, [height, width], kind)[..., top : top + self.size[0], left : left + self.size[1]]


def box_of(size: tuple[int, int], crop_pct: float) -> Resize:
    """Returns the resize before a center crop of ``size`` that keeps ``crop_pct`` of each side, as in timm."""
    height, width = (math.floor(each / crop_pct) for each in size)
    return height if height == width else (height, width)


def _to_tensor(preprocessing: Preprocessing, tensor_transform: Transform, image: Any) -> Tensor:
    if not isinstance(image, Image.Image):
        return tensor_transform(image)
    import torch

    return torch.from_numpy(preprocessing.to_array(image))
