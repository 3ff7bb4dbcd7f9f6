"""How long an evaluation takes, before it starts, and what is left out because it would take too long."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset

from eval.measure.targets import BenchmarkTarget
from illama.inference import Infer, images_per_call

EMULATED_AT_MOST = 10_000  # test images, unless emulation was asked for


def estimate_seconds(models: Mapping[str, Infer], images: Dataset[tuple[Tensor, int]]) -> dict[str, float]:
    """Returns model -> estimated seconds for all images; ``reading`` is what reading and preprocessing them takes.

    Each model runs one batch twice, and the second call is timed.
    """
    total: int = len(images)  # type: ignore[arg-type]
    count = min(images_per_call(images[0][0].shape[-2:]), total)
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


def without_long_emulation(
    targets: Sequence[BenchmarkTarget], reference: BenchmarkTarget, images: int, emulate: bool
) -> tuple[list[BenchmarkTarget], list[str]]:
    """Leaves out targets that would be emulated on many images.

    Args:
        reference: the target that the others are compared with, which is kept.
        images: number of test images.
        emulate: whether emulation was asked for, so that nothing is left out.

    Returns:
        The other targets, and messages about what was left out.
    """
    kept = [each for each in targets if each is reference or not each.is_emulated]
    if emulate or images <= EMULATED_AT_MOST or len(kept) == len(targets):
        return list(targets), []
    names = "; ".join(each.name for each in targets if each is not reference and each.is_emulated)
    advice = f"Emulating them on {images} images is slow: give --images 5000, or --emulate."
    return kept, [f"Not evaluated: {names}. {advice}"]
