"""Logits of a whole split, and what share of them is right."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Subset
from tqdm import tqdm

from illama.data import Sample, Transform, Transformed

Infer = Callable[[np.ndarray], np.ndarray]


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
    return (np.concatenate([images.numpy() for images, _ in batches]),
            np.concatenate([labels.numpy() for _, labels in batches]))  # fmt: skip


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
    a call, and ten calls at a time, since changing from one to another costs time. ``workers`` processes read images.
    """
    logits: dict[str, list[np.ndarray]] = {name: [] for name in models}
    labels: list[np.ndarray] = []
    total, disable = len(split), None if progress else True  # type: ignore[arg-type]
    loader = DataLoader(Transformed(split, transform), batch_size=10 * batch, num_workers=workers)
    with tqdm(total=total, desc="evaluate", unit="img", disable=disable, leave=False) as bar:
        for images, batch_labels in loader:
            for name, infer in models.items():
                logits[name] += [infer(part.numpy()) for part in images.split(batch)]
            labels.append(batch_labels.numpy())
            bar.update(len(images))
    return {name: np.concatenate(parts) for name, parts in logits.items()}, np.concatenate(labels)


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
