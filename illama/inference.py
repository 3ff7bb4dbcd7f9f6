"""Computes the logits of whole splits, and their top-1 accuracy."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from illama.data.datasets import Sample, Transformed
from illama.data.preprocessing import Transform
from illama.progress import Activity, track

Infer = Callable[[np.ndarray], np.ndarray]  # images (B, C, H, W) float32 -> logits or features (B, ...)
_PIXELS = 400_000  # of the images in a call, which bound its memory
_HELD = 2**28  # bytes of images that all models run on before others are read


def images_per_call(size: Sequence[int], at_most: int = 50) -> int:
    """Returns how many images of a size (height, width) a model should be called with: fewer if they are large."""
    return max(1, min(at_most, _PIXELS // math.prod(size)))


def load_images(
    split: Dataset[Sample], transform: Transform, limit: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Returns a split, or its first ``limit`` images, as arrays: images (n, C, H, W) float32, labels (n,) int64."""
    images = Transformed(split, transform)
    chosen = images if limit is None else Subset(images, range(limit))
    read = list(track(DataLoader(chosen, batch_size=None), "read images", "img"))
    return np.stack([image.numpy() for image, _ in read]), np.array([label for _, label in read], np.int64)


def predict(
    models: Mapping[str, Infer],
    split: Dataset[Sample],
    transform: Transform,
    batch: int | None = None,
    workers: int = 0,
    progress: bool = True,
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Returns each model's output (n, ...) over a split, and the labels (n,); shows the progress.

    Each image is read once for all models.

    Args:
        batch: images per call of a model; by their size if None.
        workers: number of processes that read images.
    """
    total = len(split)  # type: ignore[arg-type]
    with Activity("evaluate", "img", total, shown=progress) as bar:
        return next(predict_chunks(models, Transformed(split, transform), [range(total)], batch, workers, bar.update))


def predict_chunks(
    models: Mapping[str, Infer],
    images: Dataset[tuple[Tensor, int]],
    chunks: Sequence[range],
    batch: int | None = None,
    workers: int = 0,
    advance: Callable[[int], object] = lambda images: None,
) -> Iterator[tuple[dict[str, np.ndarray], np.ndarray]]:
    """Yields each model's output (n, ...), and the labels (n,), for each chunk of a split.

    Each image of the chunks is read once for all models. A model makes many calls before the next model, since
    switching costs time.

    Args:
        images: preprocessed images and labels.
        chunks: image indices; no chunk is empty.
        batch: images per call of a model, all from the same chunk; if None, by the size of the first, which is then
            read once more.
        workers: number of processes that read images in advance.
        advance: called after every call of a model, with the number of images finished since; part of the models have
            finished part of an image.
    """
    if not chunks:
        return
    batch = batch or images_per_call(images[chunks[0][0]][0].shape[-2:])
    calls = [[list(chunk[start : start + batch]) for start in range(0, len(chunk), batch)] for chunk in chunks]
    in_order = [call for each in calls for call in each]
    loader = iter(DataLoader(images, batch_sampler=in_order, num_workers=workers))
    finished = 0  # images of all models
    for chunk in calls:
        logits: dict[str, list[np.ndarray]] = {name: [] for name in models}
        labels: list[np.ndarray] = []
        left = len(chunk)  # calls
        while left:
            read = [next(loader)]
            together = min(left, max(1, _HELD // read[0][0].nbytes))
            read += [next(loader) for _ in range(together - 1)]
            left -= together
            for name, infer in models.items():
                for pixels, _ in read:
                    logits[name].append(infer(pixels.numpy()))
                    advance((finished + len(pixels)) // len(models) - finished // len(models))
                    finished += len(pixels)
            labels += [each.numpy() for _, each in read]
        yield {name: np.concatenate(parts) for name, parts in logits.items()}, np.concatenate(labels)


def torch_infer(model: torch.nn.Module) -> Infer:
    """Returns ``model`` as a function from images to logits, on the device of its parameters."""
    device = next(model.parameters()).device

    @torch.inference_mode()
    def infer(images: np.ndarray) -> np.ndarray:
        return model(torch.from_numpy(images).to(device)).float().cpu().numpy()

    return infer


def top1(logits: np.ndarray, labels: np.ndarray) -> float:
    """Returns the top-1 accuracy in percent."""
    return float((logits.argmax(1) == labels).mean() * 100)


def chance_note(name: str, percent: float, classes: int) -> str:
    """Returns a warning if a float network's top-1 is near chance, and an empty string otherwise.

    Args:
        percent: the network's top-1; near chance means below chance + (100 - chance) / 10.
    """
    chance = 100 / classes
    if percent >= chance + (100 - chance) / 10:
        return ""
    return (
        f"{name} has a top-1 of {percent:.2f}%, and chance gives {chance:.2f}%: check that the class order, the "
        "preprocessing and the checkpoint are those for this data"
    )
