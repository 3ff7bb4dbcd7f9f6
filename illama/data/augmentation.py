"""Augmented training images in a new order each epoch, with reproducible randomness.

An augmentation depends only on seed, epoch and image; mixup, dropout and stochastic depth depend only on seed, step and
micro-batch. So a resumed run needs no generator state, and the result does not depend on the number of loader workers
or training processes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
from PIL import Image
from timm.data.auto_augment import rand_augment_transform
from timm.data.mixup import Mixup
from timm.data.random_erasing import RandomErasing
from torch import Tensor
from torch.utils.data import Dataset, Sampler
from torchvision.transforms import InterpolationMode, v2

from illama.data.datasets import Sample
from illama.data.preprocessing import Preprocessing, Transform
from illama.errors import UserError
from illama.randomness import isolated_randomness
from illama.training.recipe import ClassifierOptions, TrainingOptions


class Augmented(Dataset[tuple[Tensor, int]]):
    """Augmented images. The key (epoch, index) and the seed determine the augmentation."""

    def __init__(self, images: Dataset[Sample], transform: Transform, seed: int) -> None:
        self.images, self.transform, self.seed = images, transform, seed

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int]:
        with isolated_randomness(self.seed, *key):
            image, label = self.images[key[1]]
            return self.transform(image), label


class MicroBatches(Sampler[list[tuple[int, int]]]):
    """The micro-batches of one process, as lists of (epoch, index) keys, step by step.

    Args:
        images: number of images; in each epoch, images that do not fill a step are left out.
        recipe: options of the run: seed, batch size and micro-batch size.
        start: first step.
        stop: last step, exclusive.
        rank: rank of this process; it gets every ``processes``-th micro-batch of a step, from this one on.
        processes: number of processes.

    Raises:
        UserError: there are too few images for a step, or the processes cannot share a step's micro-batches equally.
    """

    def __init__(
        self, images: int, recipe: TrainingOptions, start: int, stop: int, rank: int = 0, processes: int = 1
    ) -> None:
        self.steps_per_epoch = images // recipe.batch_size
        if self.steps_per_epoch == 0:
            raise UserError(f"{images} training images are fewer than one batch of {recipe.batch_size}")
        if recipe.parts % processes:
            raise UserError(
                f"{recipe.parts} micro-batches cannot be divided among {processes} processes: change --batch-size or "
                "--micro-batch"
            )
        self.images, self.recipe, self.start, self.stop = images, recipe, start, stop
        self.parts = range(rank, recipe.parts, processes)

    def __len__(self) -> int:
        return (self.stop - self.start) * len(self.parts)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        size = self.recipe.images_per_part
        for step in range(self.start, self.stop):
            epoch, at = divmod(step, self.steps_per_epoch)
            if at == 0 or step == self.start:
                order = np.random.default_rng((self.recipe.seed, epoch)).permutation(self.images)
            for part in self.parts:
                first = at * self.recipe.batch_size + part * size
                yield [(epoch, int(i)) for i in order[first : first + size]]


def make_mixup(recipe: ClassifierOptions, classes: int) -> Mixup:
    """Returns timm's mixup, cutmix and label smoothing; if both alphas are 0, only label smoothing."""
    off = recipe.mixup == recipe.cutmix == 0
    return Mixup(
        mixup_alpha=1.0 if off else recipe.mixup,
        cutmix_alpha=recipe.cutmix,
        prob=0.0 if off else recipe.mixup_probability,
        label_smoothing=recipe.label_smoothing,
        num_classes=classes,
    )


def training_transform(recipe: ClassifierOptions, preprocessing: Preprocessing) -> Transform:
    """Returns the training transform: random crop, flip, RandAugment, the evaluation's normalization, and erasing."""
    size = list(preprocessing.size)
    if recipe.crop_padding:
        augment: list[Any] = [v2.Resize(size), v2.RandomCrop(size, padding=recipe.crop_padding)]
    else:
        augment = [v2.RandomResizedCrop(size, interpolation=InterpolationMode.BICUBIC)]
    augment.append(v2.RandomHorizontalFlip())
    if recipe.rand_augment:
        augment += [_as_rgb_picture, _rand_augment(recipe.rand_augment, preprocessing)]
    erasing = RandomErasing(recipe.erasing, mode="pixel", device="cpu")
    return v2.Compose([preprocessing.transform(augment), erasing])


def _rand_augment(setting: str, preprocessing: Preprocessing) -> Any:
    mean_color = tuple(round(255 * value) for value in (preprocessing.mean * 3)[:3])
    try:
        translation = int(min(preprocessing.size) * 0.45)  # as in timm
        options = {"translate_const": translation, "img_mean": mean_color, "interpolation": Image.Resampling.BICUBIC}
        augment = rand_augment_transform(setting, options)
    except (AssertionError, ValueError, KeyError) as error:
        raise UserError(
            f"--rand-augment {setting!r} is not a RandAugment setting of timm: give one such as rand-m9-mstd0.5-inc1"
        ) from error
    for operation in augment.ops:
        if operation.name.startswith("Posterize"):
            # At the strongest level, timm asks Pillow for images of 0 bits, which Pillow 13 refuses.
            operation.level_fn = partial(_one_bit_at_least, operation.level_fn)
    return augment


def _one_bit_at_least(bits: Callable[..., tuple[int]], *level: Any) -> tuple[int]:
    return (max(1, bits(*level)[0]),)


def _as_rgb_picture(image: Any) -> Any:
    """Converts an image to Pillow's RGB image, which timm's RandAugment needs."""
    return (v2.functional.to_pil_image(image) if isinstance(image, Tensor) else image).convert("RGB")
