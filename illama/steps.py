"""The steps of a command, with how long each took."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Steps:
    """Measures the steps of a command.

    Attributes:
        seconds: step -> its duration so far, the current step included.
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
        """Measure the block as the step ``name``; several blocks of one name add up."""
        self._started[name] = time.perf_counter()
        try:
            yield
        finally:
            self._finished = self.seconds
            del self._started[name]

    @contextmanager
    def show(self, name: str) -> Iterator[None]:
        """As :meth:`time`, and print the name."""
        print(f"{name} ...", flush=True)
        with self.time(name):
            yield
