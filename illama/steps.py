"""Measures the duration of each step of a command."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from illama.memory import release_memory
from illama.progress import Activity


class Steps:
    """Durations of the steps of a command.

    Attributes:
        seconds: step -> its duration in seconds so far, including the current step.
    """

    def __init__(self) -> None:
        self._finished: dict[str, float] = {}
        self._started: dict[str, float] = {}

    @property
    def seconds(self) -> dict[str, float]:
        now = time.perf_counter()
        running = {name: self._finished.get(name, 0.0) + now - start for name, start in self._started.items()}
        return self._finished | running

    @contextmanager
    def time(self, name: str) -> Iterator[None]:
        """Measures the block as the step ``name``, and frees its memory; blocks with the same name add up."""
        self._started[name] = time.perf_counter()
        try:
            yield
        finally:
            self._finished = self.seconds
            del self._started[name]
            release_memory()

    @contextmanager
    def show(self, name: str) -> Iterator[None]:
        """Prints the name, measures the block as :meth:`time` does, and shows how long it has taken so far."""
        print(f"{name} ...", flush=True)
        with self.time(name), Activity(name):
            yield
