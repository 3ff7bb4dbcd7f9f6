"""Thumbnails of a data set's images, for the HTML page."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable

from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms.functional import to_pil_image

from illama.data.datasets import Sample

SIDE = 96  # pixels


def draw_thumbnails(split: Dataset[Sample], indices: Iterable[int], side: int = SIDE) -> dict[int, str]:
    """Returns, by index, the image as a data URI: JPEG, or PNG if it is no larger than a thumbnail."""
    return {index: _data_uri(split[index][0], side) for index in sorted(set(indices))}


def _data_uri(image: Image.Image | Tensor, side: int) -> str:
    picture = to_pil_image(image) if isinstance(image, Tensor) else image.convert("RGB")
    small = max(picture.size) <= side
    picture.thumbnail((side, side))
    buffer = io.BytesIO()
    picture.save(buffer, "PNG" if small else "JPEG", quality=85)
    return f"data:image/{'png' if small else 'jpeg'};base64,{base64.b64encode(buffer.getvalue()).decode()}"
