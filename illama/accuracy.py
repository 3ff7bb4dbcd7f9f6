"""Logits of a whole split, and what share of them is right."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from illama.data import Sample, Transform, Transformed

Infer = Callable[[np.ndarray], np.ndarray]


def load_images(split: Dataset[Sample], transform: Transform, batch: int = 500) -> tuple[np.ndarray, np.ndarray]:
    """A whole split as arrays: images (n, C, H, W) float32 and labels (n,) int64."""
    batches = list(DataLoader(Transformed(split, transform), batch_size=batch))
    return (np.concatenate([images.numpy() for images, _ in batches]),
            np.concatenate([labels.numpy() for _, labels in batches]))  # fmt: skip


def predict(
    infer: Infer, split: Dataset[Sample], transform: Transform, batch: int = 250, label: str = ""
) -> np.ndarray:
    """Logits (n, classes) of every image of a split, streamed through ``infer`` with a progress bar."""
    loader = DataLoader(Transformed(split, transform), batch_size=batch)
    logits = []
    with tqdm(total=len(split), desc=label, unit="img", disable=None, leave=False) as bar:  # type: ignore[arg-type]
        for images, _ in loader:
            logits.append(infer(images.numpy()))
            bar.update(len(images))
    return np.concatenate(logits)


def torch_infer(model: torch.nn.Module) -> Infer:
    """``model`` as a function from images to logits, on the device of its parameters."""
    device = next(model.parameters()).device

    @torch.inference_mode()
    def infer(images: np.ndarray) -> np.ndarray:
        return model(torch.from_numpy(images).to(device)).float().cpu().numpy()

    return infer


def labels_of(split: Dataset[Sample]) -> np.ndarray:
    """Labels (n,) of a split; image folders and arrays give them without reading an image."""
    known = getattr(split, "targets", None)
    known = getattr(split, "labels", None) if known is None else known
    if known is None:
        known = [split[i][1] for i in range(len(split))]  # type: ignore[arg-type]
    return np.asarray(known)


def top1(logits: np.ndarray, labels: np.ndarray) -> float:
    """Share of images whose largest logit is the label's, in percent."""
    return float((logits.argmax(1) == labels).mean() * 100)
