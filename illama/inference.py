"""Logits of a whole split, and what share of them is right."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Subset
from tqdm import tqdm

from illama.data.datasets import Sample, Transform, Transformed

Infer = Callable[[np.ndarray], np.ndarray]
_CALLS = 10  # of one model before the next


def usable_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def load_images(
    split: Dataset[Sample], transform: Transform, limit: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """A split, or its first ``limit`` images, as arrays: images (n, C, H, W) float32 and labels (n,) int64."""
    images = Transformed(split, transform)
    chosen = images if limit is None else Subset(images, range(limit))
    batches = list(DataLoader(chosen, batch_size=500))
    return (
        np.concatenate([images.numpy() for images, _ in batches]),
        np.concatenate([labels.numpy() for _, labels in batches]),
    )


def predict(
    models: Mapping[str, Infer],
    split: Dataset[Sample],
    transform: Transform,
    batch: int = 50,
    workers: int = 0,
    progress: bool = True,
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Logits (n, classes) of each model over a whole split, and the labels (n,).

    The split is streamed once, whatever the number of models, with a progress bar. A model sees ``batch`` images
    a call. ``workers`` processes read images.
    """
    total, disable = len(split), None if progress else True  # type: ignore[arg-type]
    with tqdm(total=total, desc="evaluate", unit="img", disable=disable, leave=False) as bar:
        return next(predict_chunks(models, split, transform, [range(total)], batch, workers, bar.update))


def predict_chunks(
    models: Mapping[str, Infer],
    split: Dataset[Sample],
    transform: Transform,
    chunks: Sequence[range],
    batch: int = 50,
    workers: int = 0,
    advance: Callable[[int], object] = lambda images: None,
) -> Iterator[tuple[dict[str, np.ndarray], np.ndarray]]:
    """Logits (n, classes) of each model, and labels (n,), of one chunk of a split after the other.

    Each image of the chunks is read once, whatever the number of models, and no other image is. A model sees ``batch``
    images of one chunk a call, and ten calls at a time, since changing from one to another costs time.

    Args:
        chunks: indices of images; none is empty.
        workers: processes that read images, ahead of the models.
        advance: told how many more images are done.
    """
    calls = [[list(chunk[start : start + batch]) for start in range(0, len(chunk), batch)] for chunk in chunks]
    in_order = [call for each in calls for call in each]
    loader = iter(DataLoader(Transformed(split, transform), batch_sampler=in_order, num_workers=workers))
    for chunk in calls:
        logits: dict[str, list[np.ndarray]] = {name: [] for name in models}
        labels: list[np.ndarray] = []
        for start in range(0, len(chunk), _CALLS):
            read = [next(loader) for _ in chunk[start : start + _CALLS]]
            for name, infer in models.items():
                logits[name] += [infer(images.numpy()) for images, _ in read]
            labels += [each.numpy() for _, each in read]
            advance(sum(len(each) for _, each in read))
        yield {name: np.concatenate(parts) for name, parts in logits.items()}, np.concatenate(labels)


def torch_infer(model: torch.nn.Module) -> Infer:
    """``model`` as a function from images to logits, on the device of its parameters."""
    device = next(model.parameters()).device

    @torch.inference_mode()
    def infer(images: np.ndarray) -> np.ndarray:
        return model(torch.from_numpy(images).to(device)).float().cpu().numpy()

    return infer


def top1(logits: np.ndarray, labels: np.ndarray) -> float:
    """Share of images whose largest logit is the label's, in percent."""
    return float((logits.argmax(1) == labels).mean() * 100)


def chance_note(name: str, percent: float, classes: int) -> str:
    """What to ask where a float network's top-1 is at chance level; empty where it is not.

    Args:
        percent: its top-1; chance level ends a tenth of the way from chance itself to 100%.
    """
    chance = 100 / classes
    if percent >= chance + (100 - chance) / 10:
        return ""
    return (
        f"{name} has a top-1 of {percent:.2f}% where chance gives {chance:.2f}%: is the class order, the "
        "preprocessing or the checkpoint another than the one for this data?"
    )
