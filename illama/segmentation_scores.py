"""Predictions for whole images by a segmentation network in a sliding window, and their scores."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import InterpolationMode, v2

from illama.data.ade20k import IGNORED
from illama.data.preprocessing import Preprocessing
from illama.errors import UserError
from illama.inference import Infer
from illama.progress import track

_WINDOWS = 8  # number of windows per call


@dataclass(frozen=True)
class Views:
    """How an image is presented to the network: scaled, mirrored, and in windows. Predictions are averaged.

    Attributes:
        scales: each scale multiplies the preprocessing's resize of the shorter side; probabilities are averaged.
        flip: whether to add the mirror image at each scale.
        overlap: overlap of neighboring windows as a fraction of a window's side; logits are averaged there.

    Raises:
        UserError: there is no scale, a scale is not positive, or the overlap is outside 0..1.
    """

    scales: tuple[float, ...] = (1.0,)
    flip: bool = False
    overlap: float = 1 / 3

    def __post_init__(self) -> None:
        if not self.scales or not all(0 < scale < math.inf for scale in self.scales) or not 0 <= self.overlap < 1:
            raise UserError("scales must be one positive number or more, and the overlap must lie in 0..1")


@dataclass(frozen=True)
class Scores:
    """Scores in percent over all pixels that belong to a class.

    Attributes:
        miou: mean intersection over union of the classes that are in the labels or predicted.
        pixel_accuracy: share of correct pixels (aAcc).
        mean_accuracy: share of correct pixels of each class in the labels, averaged over these classes (mAcc).
        iou: intersection over union of each class; None if it is neither in the labels nor predicted.
    """

    miou: float
    pixel_accuracy: float
    mean_accuracy: float
    iou: tuple[float | None, ...]

    @classmethod
    def of(cls, counts: np.ndarray) -> Scores:
        """Returns the scores from the sums of :func:`count_pixels` over images, (3, classes).

        Raises:
            UserError: no pixel belongs to a class.
        """
        right, true = counts[:2].astype(np.float64)
        if not true.any():
            raise UserError(
                "no pixel of these images belongs to a class: in annotations, 0 means no class and 1 the first class"
            )
        iou = class_ious(counts)
        return cls(
            float(np.nanmean(iou)),
            float(100 * right.sum() / true.sum()),
            float(100 * (right[true > 0] / true[true > 0]).mean()),
            tuple(None if math.isnan(value) else value for value in iou.tolist()),
        )


def class_ious(counts: np.ndarray) -> np.ndarray:
    """Returns each IoU in percent, (..., classes), from counts (..., 3, classes); NaN if the union is empty."""
    right, true, predicted = np.moveaxis(counts.astype(np.float64), -2, 0)
    union = true + predicted - right
    return 100 * np.divide(right, union, out=np.full_like(union, np.nan), where=union > 0)


def count_pixels(predicted: np.ndarray, true: np.ndarray, classes: int) -> np.ndarray:
    """Returns the numbers of correct, labeled and predicted pixels of each class in one image, (3, classes).

    Args:
        predicted: class indices.
        true: class indices of the labels, of the same shape; pixels with the index IGNORED are not counted.
    """
    counted = true != IGNORED
    predicted, true = predicted[counted], true[counted]
    groups = (true[predicted == true], true, predicted)
    return np.stack([np.bincount(group, minlength=classes) for group in groups])


def score_images(
    models: Mapping[str, Infer],
    images: Dataset[Any],
    classes: int,
    predict: Callable[[Infer, Tensor], Tensor],
    workers: int = 0,
    progress: bool = True,
) -> dict[str, np.ndarray]:
    """Returns the :func:`count_pixels` of every image for each model, (n, 3, classes). Each image is read once.

    Args:
        images: a :class:`illama.data.ade20k.LabelMaps`.
        classes: number of classes.
        predict: returns the predicted class of every pixel, such as :func:`predict_map` with its other arguments.
        workers: number of processes that read images.
        progress: whether to show the progress.
    """
    counts: dict[str, list[np.ndarray]] = {name: [] for name in models}
    loader = DataLoader(images, batch_size=None, num_workers=workers)
    for image, true in track(loader, "evaluate", "img", progress):
        for name, infer in models.items():
            predicted = predict(infer, image)
            counts[name].append(count_pixels(predicted.numpy(), np.asarray(true), classes))
    return {name: np.stack(parts) for name, parts in counts.items()}


def predict_map(infer: Infer, image: Tensor, preprocessing: Preprocessing, views: Views | None = None) -> Tensor:
    """Returns the predicted class of every pixel (H, W) of an image (3, H, W), uint8."""
    resize, views = preprocessing.resize, views or Views()
    shorter = resize if isinstance(resize, int) else min(preprocessing.size)
    to_input: Callable[[Any], Tensor] = v2.Compose(preprocessing.tensor_steps())
    total: Tensor | None = None
    for scale in views.scales:
        size = [max(1, round(shorter * scale))]
        pixels = to_input(v2.functional.resize(image, size, InterpolationMode.BILINEAR)).as_subclass(Tensor)
        for mirrored in (False, True)[: 1 + views.flip]:
            logits = _slide(infer, pixels.flip(-1) if mirrored else pixels, min(preprocessing.size), views.overlap)
            logits = logits.flip(-1) if mirrored else logits
            whole = F.interpolate(logits[None], image.shape[-2:], mode="bilinear", align_corners=False)[0]
            shares = whole.softmax(0)
            total = shares if total is None else total + shares
    assert total is not None
    return total.argmax(0)


def _slide(infer: Infer, pixels: Tensor, size: int, overlap: float) -> Tensor:
    """Returns the logits (classes, H, W) of pixels (C, H, W) from square windows, averaged where they overlap.

    An image smaller than a window is padded with zeros, the mean color, on the right and at the bottom.
    """
    height, width = pixels.shape[-2:]
    pixels = F.pad(pixels, (0, max(0, size - width), 0, max(0, size - height)))
    corners = [(y, x) for y in window_starts(height, size, overlap) for x in window_starts(width, size, overlap)]
    total, visits = torch.zeros(1, *pixels.shape[-2:]), torch.zeros(pixels.shape[-2:])
    for first in range(0, len(corners), _WINDOWS):  # all windows at once would take many times the image's memory
        part = corners[first : first + _WINDOWS]
        windows = torch.stack([pixels[:, y : y + size, x : x + size] for y, x in part])
        logits = torch.from_numpy(infer(windows.numpy()))
        if not first:
            total = total.repeat(logits.shape[1], 1, 1)
        for (y, x), window in zip(part, logits, strict=True):
            total[:, y : y + size, x : x + size] += window
            visits[y : y + size, x : x + size] += 1
    return (total / visits)[:, :height, :width]


def window_starts(length: int, size: int, overlap: float) -> Sequence[int]:
    """Returns the first pixel of each window along a side, in even steps; the last window ends where the side ends."""
    step = max(1, round(size * (1 - overlap)))
    rest = max(0, length - size)
    return [min(position, rest) for position in range(0, rest + step, step)]
