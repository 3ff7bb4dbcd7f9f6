"""Latency of several engines under the same conditions."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from illama.accuracy import Infer


@dataclass(frozen=True)
class Latency:
    """Milliseconds for one call with ``batch`` images.

    Attributes:
        calls: how many were timed.
        joules: of one call, where the device says what it takes; None elsewhere.
    """

    batch: int
    mean: float
    p50: float
    p90: float
    p99: float
    calls: int
    joules: float | None = None

    @property
    def images_per_second(self) -> float:
        return 1e3 * self.batch / self.mean


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
    return {name: _summarise(values, len(images)) for name, values in times.items()}


def _summarise(times: list[float], batch: int) -> Latency:
    p50, p90, p99 = (float(value) for value in np.percentile(times, [50, 90, 99]))
    return Latency(batch, float(np.mean(times)), p50, p90, p99, len(times))
