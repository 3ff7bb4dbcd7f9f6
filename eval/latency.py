"""Latency of several engines under the same conditions."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from illama.accuracy import Infer


@dataclass(frozen=True)
class Latency:
    """Milliseconds for one call with ``batch`` images."""

    p50: float
    p99: float
    batch: int


def measure_latency(
    engines: Mapping[str, Infer], images: np.ndarray, rounds: int = 40, calls: int = 10, settle: int = 3
) -> dict[str, Latency]:
    """Time each engine on ``images`` (B, C, H, W), all in turn in every round, so that drift hits all alike.

    A turn is ``settle`` calls that are not counted, while the threads of the engine before go to sleep, and
    ``calls`` that are.
    """
    times: dict[str, list[float]] = {name: [] for name in engines}
    for _ in range(rounds):
        for name, infer in engines.items():
            for call in range(settle + calls):
                start = time.perf_counter()
                infer(images)
                if call >= settle:
                    times[name].append((time.perf_counter() - start) * 1e3)
    return {
        name: Latency(float(np.percentile(values, 50)), float(np.percentile(values, 99)), len(images))
        for name, values in times.items()
    }
