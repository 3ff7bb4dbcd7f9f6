"""Images for measuring the effects of quantization: training images that calibration does not use."""

from __future__ import annotations

import math
from typing import Any, Literal, cast

from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from illama.data.datasets import ImageData, Sample, evenly_spaced, others
from illama.errors import UserError
from quant.inputs import Inputs
from quant.mixed_precision.budget import Budget
from quant.mixed_precision.layer_effects import Effect

Batches = DataLoader[tuple[Tensor, int]]
_CHECK_IMAGES, _IMAGES = 10_000, 1000


def image_count(inputs: Inputs, given: int | None, split: Literal["train", "test"] = "train") -> int:
    """Returns the number of images that measure layers: the given one, else 1,000, or fewer in a small data set.

    Of the training images that calibration does not use, it is at most half: the others check the result of a search.
    """
    if given is not None:
        return given
    pool: Any = inputs.data.test() if split == "test" else range(_left(inputs) // 2)
    return min(_IMAGES, len(pool))


def _left(inputs: Inputs) -> int:
    return len(uncalibrated_images(inputs.data, inputs.calibration_images))


def selection_images(data: ImageData, calibration_images: int, count: int) -> Dataset[Sample]:
    """Returns ``count`` evenly spaced images of the training split that calibration does not use.

    Raises:
        UserError: there are fewer.
    """
    rest = uncalibrated_images(data, calibration_images)
    if not 1 <= count <= len(rest):
        raise UserError(
            f"{count} images asked for, but of the training images {len(rest)} are left beside the "
            f"{calibration_images} for calibration: lower --images or --calibration-images, or add training images"
        )
    return Subset(rest.dataset, [rest.indices[index * len(rest) // count] for index in range(count)])


def uncalibrated_images(data: ImageData, calibration_images: int) -> Subset[Sample]:
    """Returns the images of the training split that calibration does not use."""
    return others(cast(Subset[Sample], data.calibration(calibration_images)))


def split_images(data: ImageData, split: Literal["train", "test"], calibration_images: int, count: int) -> Any:
    """Returns ``count`` evenly spaced images of the test split, or :func:`selection_images` of the training split.

    Raises:
        UserError: there are fewer.
    """
    if split == "train":
        return selection_images(data, calibration_images, count)
    return evenly_spaced(data.test(), count)


def search_batches(inputs: Inputs, budget: Budget, images: int, check_images: int | None) -> tuple[Batches, Batches]:
    """Returns the batches that measure layers, and other batches that check whole assignments.

    Args:
        images: number of images that measure layers.
        check_images: number of the others; if None, 10,000 or all that are left.

    Raises:
        UserError: there are fewer images, or too few for the limit on the drop to be verified.
    """
    left = _left(inputs) - images
    checked = max(1, min(left, _CHECK_IMAGES) if check_images is None else check_images)
    pool = selection_images(inputs.data, inputs.calibration_images, images + checked)
    nothing_lost = Effect(math.inf, 0.0, 0, 0, checked)
    if budget.kind == "drop" and nothing_lost.drop_at_most > budget.limit:
        raise UserError(
            f"{checked} images cannot verify {budget}: if none is lost, the drop may still be "
            f"{nothing_lost.drop_at_most:.2f} points; raise --check-images or --max-drop, or lower --images"
        )
    measured: Any = evenly_spaced(pool, images)
    return inputs.batches(measured), inputs.batches(others(measured))
