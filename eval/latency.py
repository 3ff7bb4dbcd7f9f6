"""Latency of several engines under the same conditions."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

Infer = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Latency:
    """Milliseconds for one call with ``batch`` images."""

    p50: float
    p99: float
    batch: int


def measure_latency(
    engines: Mapping[str, Infer], images: np.ndarray, rounds: int = 300, warmup: int = 30
) -> dict[str, Latency]:
    """Time each engine on ``images`` (B, C, H, W), all in turn in every round, so that drift hits all alike."""
    times: dict[str, list[float]] = {name: [] for name in engines}
    for index in range(warmup + rounds):
        for name, infer in engines.items():
            start = time.perf_counter()
            infer(images)
            if index >= warmup:
                times[name].append((time.perf_counter() - start) * 1e3)
    return {
        name: Latency(float(np.percentile(t, 50)), float(np.percentile(t, 99)), len(images))
        for name, t in times.items()
    }
