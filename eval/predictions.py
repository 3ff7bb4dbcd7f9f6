"""What the measurements of predictions have in common: logits that fit their labels, as probabilities in float64."""

from __future__ import annotations

import numpy as np
import scipy.special


def check_predictions(logits: np.ndarray, labels: np.ndarray) -> None:
    """Logits (images, classes) with one label (images,) each, finite and at least one of them.

    Raises:
        ValueError: they are not; a model that overflows gives logits that are not finite.
    """
    if logits.ndim != 2 or labels.shape != logits.shape[:1] or not len(labels):
        raise ValueError(f"logits {logits.shape} and labels {labels.shape} are not those of one set of images")
    if not np.isfinite(logits).all():
        raise ValueError(f"{int((~np.isfinite(logits)).any(1).sum())} of {len(logits)} images have logits not finite")
    if labels.min() < 0 or labels.max() >= logits.shape[1]:
        raise ValueError(f"labels from {labels.min()} to {labels.max()} for {logits.shape[1]} classes")


def probabilities(logits: np.ndarray) -> np.ndarray:
    """Softmax of (images, classes), float64."""
    return scipy.special.softmax(logits.astype(np.float64), axis=1)


def log_probabilities(logits: np.ndarray) -> np.ndarray:
    """Log-softmax of (images, classes), float64: exact where a probability is too small to be a number."""
    return scipy.special.log_softmax(logits.astype(np.float64), axis=1)
