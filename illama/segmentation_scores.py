"""What a segmentation network says of whole images, by sliding windows, and the mIoU of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence, Sized
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import InterpolationMode, v2
from tqdm import tqdm

from illama.data.ade20k import IGNORED
from illama.data.datasets import Preprocessing
from illama.errors import UserError
from illama.inference import Infer

_WINDOWS = 8  # of one call


@dataclass(frozen=True)
class Views:
    """From what an image is judged.

    Attributes:
        scales: the shorter side becomes the preprocessing's times each; several are averaged, as probabilities.
        flip: each mirrored too.
        overlap: of two neighbouring windows, as a share of a window's side; logits are averaged where they overlap.

    Raises:
        UserError: no scales, one that is not positive, or an overlap outside of 0..1.
    """

    scales: tuple[float, ...] = (1.0,)
    flip: bool = False
    overlap: float = 1 / 3

    def __post_init__(self) -> None:
        if not self.scales or not all(0 < scale < math.inf for scale in self.scales) or not 0 <= self.overlap < 1:
            raise UserError("scales must be positive numbers, one at least, and the overlap must lie in 0..1")


@dataclass(frozen=True)
class Scores:
    """In percent, over all pixels that belong to a class.

    Attributes:
        miou: mean over the classes of intersection over union; one that is neither there nor predicted is left out.
        pixel_accuracy: share of pixels that are right (aAcc).
        mean_accuracy: mean over the classes that are there of the share of their pixels that are right (mAcc).
        iou: of each class; None for one that is left out.
    """

    miou: float
    pixel_accuracy: float
    mean_accuracy: float
    iou: tuple[float | None, ...]

    @classmethod
    def of(cls, counts: np.ndarray) -> Scores:
        """Those of :func:`count`'s counts (3, classes), summed over the images; UserError if there is no pixel."""
        right, true = counts[:2].astype(np.float64)
        if not true.any():
            raise UserError(
                "no pixel of these images belongs to a class: an annotation of 0 names none, 1 the first class"
            )
        iou = class_ious(counts)
        return cls(
            float(np.nanmean(iou)),
            float(100 * right.sum() / true.sum()),
            float(100 * (right[true > 0] / true[true > 0]).mean()),
            tuple(None if math.isnan(value) else value for value in iou.tolist()),
        )


def class_ious(counts: np.ndarray) -> np.ndarray:
    """IoU in percent of every class, (..., classes), of counts (..., 3, classes); NaN where there is no union."""
    right, true, predicted = np.moveaxis(counts.astype(np.float64), -2, 0)
    union = true + predicted - right
    return 100 * np.divide(right, union, out=np.full_like(union, np.nan), where=union > 0)


def count(predicted: np.ndarray, true: np.ndarray, classes: int) -> np.ndarray:
    """Diagonal and margins of one image's confusion matrix, (3, classes): pixels right, there, and predicted.

    Args:
        predicted, true: class indices of any one shape; pixels that are IGNORED in ``true`` count nowhere.
    """
    counted = true != IGNORED
    predicted, true = predicted[counted], true[counted]
    groups = (true[predicted == true], true, predicted)
    return np.stack([np.bincount(group, minlength=classes) for group in groups])


def score_images(
    models: Mapping[str, Infer],
    images: Dataset[Any],
    classes: int,
    preprocessing: Preprocessing,
    views: Views | None = None,
    workers: int = 0,
    progress: bool = True,
) -> dict[str, np.ndarray]:
    """:func:`count` of each model for every image of a :class:`illama.data.ade20k.LabelMaps`: (n, 3, classes).

    Images are read once, one at a time, by ``workers`` processes, with a progress bar.
    """
    counts: dict[str, list[np.ndarray]] = {name: [] for name in models}
    loader = DataLoader(images, batch_size=None, num_workers=workers)
    total, disable = len(cast(Sized, images)), None if progress else True
    for image, true in tqdm(loader, "evaluate", total, unit="img", disable=disable, leave=False):
        for name, infer in models.items():
            predicted = predict_map(infer, image, preprocessing, views or Views())
            counts[name].append(count(predicted.numpy(), np.asarray(true), classes))
    return {name: np.stack(parts) for name, parts in counts.items()}


def predict_map(infer: Infer, image: Tensor, preprocessing: Preprocessing, views: Views) -> Tensor:
    """The class of every pixel (H, W) of an image (3, H, W), uint8."""
    shorter = preprocessing.resize or preprocessing.image_size
    to_input: Callable[[Any], Tensor] = v2.Compose(preprocessing.to_input())
    total: Tensor | None = None
    for scale in views.scales:
        size = [max(1, round(shorter * scale))]
        pixels = to_input(v2.functional.resize(image, size, InterpolationMode.BILINEAR)).as_subclass(Tensor)
        for mirrored in (False, True)[: 1 + views.flip]:
            logits = _slide(infer, pixels.flip(-1) if mirrored else pixels, preprocessing.image_size, views.overlap)
            logits = logits.flip(-1) if mirrored else logits
            whole = F.interpolate(logits[None], image.shape[-2:], mode="bilinear", align_corners=False)[0]
            shares = whole.softmax(0)
            total = shares if total is None else total + shares
    assert total is not None
    return total.argmax(0)


def _slide(infer: Infer, pixels: Tensor, size: int, overlap: float) -> Tensor:
    """Logits (classes, H, W) of pixels (C, H, W) by windows of one size, the mean where they overlap.

    What is smaller than a window is padded by zeros, the mean colour, at its right and lower end.
    """
    height, width = pixels.shape[-2:]
    pixels = F.pad(pixels, (0, max(0, size - width), 0, max(0, size - height)))
    corners = [(y, x) for y in starts(height, size, overlap) for x in starts(width, size, overlap)]
    total, visits = torch.zeros(1, *pixels.shape[-2:]), torch.zeros(pixels.shape[-2:])
    for first in range(0, len(corners), _WINDOWS):  # all windows' logits at once would be many times the image's
        part = corners[first : first + _WINDOWS]
        windows = torch.stack([pixels[:, y : y + size, x : x + size] for y, x in part])
        logits = torch.from_numpy(infer(windows.numpy()))
        if not first:
            total = total.repeat(logits.shape[1], 1, 1)
        for (y, x), window in zip(part, logits, strict=True):
            total[:, y : y + size, x : x + size] += window
            visits[y : y + size, x : x + size] += 1
    return (total / visits)[:, :height, :width]


def starts(length: int, size: int, overlap: float) -> Sequence[int]:
    """Where windows begin along a side, evenly but for the last, which ends with the side."""
    step = max(1, round(size * (1 - overlap)))
    rest = max(0, length - size)
    return [min(position, rest) for position in range(0, rest + step, step)]
