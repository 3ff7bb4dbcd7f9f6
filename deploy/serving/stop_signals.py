"""Stops a command that has nothing to clean up yet. Imports nothing slow."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def exit_on_signals() -> Iterator[None]:
    """Inside the block, SIGTERM and Ctrl-C print "stopped" and end the process with exit status 0.

    For imports that take seconds: packages may catch a KeyboardInterrupt that is raised while they are imported.
    """
    numbers = (signal.SIGTERM, signal.SIGINT)
    previous = [(number, signal.signal(number, _exit)) for number in numbers]
    try:
        yield
    finally:
        for number, handler in previous:
            signal.signal(number, handler)


def _exit(*_: Any) -> None:
    os.write(1, b"stopped\n")
    os._exit(0)
