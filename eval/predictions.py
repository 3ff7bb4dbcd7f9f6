"""What the measurements of predictions have in common: logits that fit their labels, as probabilities in float64."""

from __future__ import annotations

import numpy as np
import scipy.special


def check_predictions(logits: np.ndarray, labels: np.ndarray) -> None:
    """Logits (images, classes) with one label (images,) each, finite and at least one of them.

    Raises:
        ValueError: they are not.
    """
    if logits.ndim != 2 or labels.shape != logits.shape[:1] or not len(labels):
        raise ValueError(f"logits {logits.shape} and labels {labels.shape} are not those of one set of images")
    check_finite(logits)
    if labels.min() < 0 or labels.max() >= logits.shape[1]:
        raise ValueError(f"labels from {labels.min()} to {labels.max()} for {logits.shape[1]} classes")


def check_finite(logits: np.ndarray) -> None:
    """ValueError unless all logits (images, ...) are finite; those of a model that overflows are not."""
    broken = ~np.isfinite(logits).all(axis=tuple(range(1, logits.ndim)))
    if broken.any():
        raise ValueError(f"{int(broken.sum())} of {len(logits)} images have logits not finite")


def probabilities(logits: np.ndarray) -> np.ndarray:
    """Softmax of (images, classes), float64."""
    return scipy.special.softmax(logits.astype(np.float64), axis=1)


def log_probabilities(logits: np.ndarray) -> np.ndarray:
    """Log-softmax of (images, classes), float64: exact where a probability is too small to be a number."""
    return scipy.special.log_softmax(logits.astype(np.float64), axis=1)
