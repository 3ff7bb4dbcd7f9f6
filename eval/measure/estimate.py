"""Estimates how long an evaluation takes, before it starts."""

from __future__ import annotations

import time
from collections.abc import Mapping

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset

from illama.inference import Infer

_BATCH = 50  # images, as in the evaluation


def estimate_seconds(models: Mapping[str, Infer], images: Dataset[tuple[Tensor, int]]) -> dict[str, float]:
    """Returns model -> estimated seconds for all images; ``reading`` is what reading and preprocessing them takes.

    Each model runs one batch twice, and the second call is timed.
    """
    total: int = len(images)  # type: ignore[arg-type]
    count = min(_BATCH, total)
    start = time.perf_counter()
    batch = np.stack([images[index * total // count][0].numpy() for index in range(count)])
    seconds = {"reading": (time.perf_counter() - start) * total / count}
    for name, infer in models.items():
        infer(batch)
        start = time.perf_counter()
        infer(batch)
        seconds[name] = (time.perf_counter() - start) * total / count
    return seconds


def describe_estimate(seconds: Mapping[str, float], images: int) -> str:
    """Returns a sentence that names the total and what takes longest."""
    slowest = max(seconds, key=lambda name: seconds[name])
    return (
        f"evaluating {images} images takes about {in_words(sum(seconds.values()))}, of which {slowest} takes "
        f"{in_words(seconds[slowest])}"
    )


def in_words(seconds: float) -> str:
    """Returns a duration in seconds, minutes or hours."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{round(seconds / 60)} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
