"""Engines that are opened when they are used, so that large ones are not in memory together."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from deploy.runtimes.engine import Engine
from deploy.runtimes.least_recently_used import LeastRecentlyUsed
from eval.measure.latency import TimingOptions, Timings, measure_latency
from eval.measure.sensors import Meter
from illama.bundle import size_of
from illama.memory import release_memory

KEPT = 2**28  # bytes of files whose engines stay open together: small ones run faster than they are opened
TIMED_TOGETHER = 2**30  # bytes of files, at most: each runtime may hold its weights twice


class ReopenedEngine(Engine):
    """An engine that may be closed while others of the same store are used, and is then opened again.

    Args:
        load: opens the engine; called at once, to learn its attributes.
        file: the file that it opens.
        store: the engines that are open, from :func:`engine_store`.

    Raises:
        UserError: the engine cannot be opened.
    """

    def __init__(self, load: Callable[[], Engine], file: Path, store: EngineStore) -> None:
        self.load, self.size, self._store = load, size_of(file), store
        engine = store[self]
        self.runtime, self.arithmetic, self.batches = engine.runtime, engine.arithmetic, engine.batches
        self.floats: str | None = getattr(engine, "floats", None)  # of OpenVINO

    def infer(self, images: np.ndarray) -> np.ndarray:
        """Images (B, C, H, W) float32 -> logits (B, classes) float32."""
        return self._store[self].infer(images)

    def close(self) -> None:
        """Frees the engine; the next call opens it again."""
        self._store.discard(self)

    def stay_open(self) -> Engine:
        """Returns the engine itself, and closes none of the store from now on unless asked to."""
        self._store.capacity = float("inf")
        return self._store[self]


EngineStore = LeastRecentlyUsed[ReopenedEngine, Engine]


def engine_store() -> EngineStore:
    """Returns an empty store, for files of 256 MiB in all or for one larger file."""
    return EngineStore(KEPT, _load, lambda engine: engine.close(), lambda key: key.size)


def _load(key: ReopenedEngine) -> Engine:
    release_memory()
    return key.load()


def free(engines: Iterable[Engine]) -> None:
    """Frees those that will be opened again when they are used."""
    for engine in engines:
        if isinstance(engine, ReopenedEngine):
            engine.close()


def time_engines(
    engines: Mapping[str, Engine],
    images: np.ndarray,
    batches: Sequence[int],
    options: TimingOptions,
    meters: Mapping[str, Meter],
) -> Timings:
    """Times engines as :func:`eval.measure.latency.measure_latency` does; large ones one after another, each alone."""
    if sum(each.size for each in engines.values() if isinstance(each, ReopenedEngine)) <= TIMED_TOGETHER:
        together = {  # the engines that others stand for, so that calls are timed alone
            name: (each.stay_open() if isinstance(each, ReopenedEngine) else each).infer
            for name, each in engines.items()
        }
        return measure_latency(together, images, batches, options, meters)
    alone = options if options.seconds is None else replace(options, seconds=options.seconds / len(engines))
    parts = [
        measure_latency({name: each.infer}, images, batches, alone, {name: meters[name]} if name in meters else {})
        for name, each in engines.items()
    ]
    return Timings(
        {name: found for part in parts for name, found in part.latency.items()},
        {name: found for part in parts for name, found in part.refused.items()},
        parts[-1].conditions | {"order": "one engine after another, since they are too large to be open together"},
        {sensor for part in parts for sensor in part.sensors},
    )
