"""Progress of long work: bars on a terminal, and a line every few seconds in a log.

One thread shows all work that is open. So work without a loop is shown too, such as the build of an engine, and so are
loops with long iterations. The thread runs only while something is open.
"""

from __future__ import annotations

import operator
import os
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import Any, TypeVar

from tqdm import tqdm

INTERVAL = 10.0  # seconds between two lines of a log
DELAY = 1.0  # seconds of work before a terminal shows it
REFRESH = 0.5  # seconds after which a terminal's bars are drawn again

Item = TypeVar("Item")


class Activity:
    """Work that is shown while a ``with`` block runs.

    Args:
        doing: what the work is.
        unit: what is counted; empty for work that counts nothing, of which the elapsed time is shown.
        total: the count at the end; None if it is not known.
        done: the count at the beginning, such as that of an interrupted run.
        shown: whether to show the work. Of the processes of torchrun, only the first shows any.

    Attributes:
        note: more to show, such as the loss.
    """

    def __init__(self, doing: str, unit: str = "", total: int | None = None, done: int = 0, shown: bool = True) -> None:
        self.doing, self.unit, self.total, self.done, self.note = doing, unit, total, done, ""
        self._shown = shown and os.environ.get("RANK", "0") == "0" and sys.stderr is not None
        self._first = done
        self._start = self._counted = time.monotonic()
        self._bar: tqdm[Any] | None = None

    def __enter__(self) -> Activity:
        self._start = time.monotonic()
        if self._shown:
            _SCREEN.begin(self)
        return self

    def __exit__(self, *_: object) -> None:
        _SCREEN.end(self)

    def update(self, count: int = 1) -> None:
        """Adds to the count."""
        self.done += count
        self._counted = time.monotonic()

    def __str__(self) -> str:
        """The line of a log; the rate is the mean until the last count, or slower if the next one takes long."""
        new, facts, now = self.done - self._first, [], time.monotonic()
        seconds_each = max((self._counted - self._start) / new, (now - self._start) / (new + 1)) if new else 0.0
        if self.unit:
            facts.append(f"{self.done}{'' if self.total is None else f'/{self.total}'} {self.unit}")
        if seconds_each:
            facts.append(_rate(seconds_each, self.unit))
        if seconds_each and self.total is not None:
            facts.append(f"{_clock(max(0, self.total - self.done) * seconds_each)} left")
        else:
            facts.append(f"{_clock(now - self._start)} elapsed")
        return f"{self.doing}: {', '.join(filter(None, [*facts, self.note]))}"

    def draw(self) -> None:
        """Draws the bar on a terminal, if the work has taken a moment."""
        elapsed = time.monotonic() - self._start
        if self._bar is None:
            if elapsed < DELAY:
                return
            self._bar = tqdm(
                desc=self.doing,
                total=self.total,
                initial=self._first,
                unit=f" {self.unit}",
                miniters=1,
                smoothing=0.05,
                bar_format=None if self.unit else "{desc}: {elapsed} elapsed",
                leave=False,
                dynamic_ncols=True,
                delay=1,  # it is not drawn before it has its start and its count
            )
            self._bar.delay = 0
            self._bar.start_t -= elapsed
            self._bar.last_print_t -= elapsed
        self._bar.set_postfix_str(self.note, refresh=False)
        if not self._bar.update(self.done - self._bar.n):  # it draws if the count is new
            self._bar.refresh()

    def clear(self) -> None:
        """Removes the bar from the terminal."""
        if self._bar is not None:
            self._bar.close()


def track(items: Iterable[Item], doing: str, unit: str, shown: bool = True) -> Iterator[Item]:
    """Yields the items, and shows how many are finished; for the arguments, see :class:`Activity`."""
    with Activity(doing, unit, operator.length_hint(items) or None, shown=shown) as activity:
        for item in items:
            yield item
            activity.update()


def say(text: str) -> None:
    """Prints a line to the standard output, between the bars of a terminal."""
    tqdm.write(text)
    sys.stdout.flush()


def _clock(seconds: float) -> str:
    return tqdm.format_interval(round(seconds))


def _rate(seconds_each: float, unit: str) -> str:
    value, per = (seconds_each, f"s/{unit}") if seconds_each > 1 else (1 / seconds_each, f"{unit}/s")
    return f"{value:.0f} {per}" if value >= 10 else f"{value:.1f} {per}"


def _has_terminal() -> bool:
    """Whether the standard error stream is a terminal that has a size, which a serial port lacks: tqdm draws by it."""
    with suppress(OSError, ValueError):
        return sys.stderr.isatty() and min(os.get_terminal_size(sys.stderr.fileno())) > 0
    return False


class _Screen:
    """The standard error stream, and the activities that are open, the innermost last."""

    def __init__(self) -> None:
        self._open: list[Activity] = []
        self._over = threading.Event()
        self._lock = threading.RLock()  # a garbage collection may end an abandoned loop in the middle of a method

    def begin(self, activity: Activity) -> None:
        with self._lock:
            self._open.append(activity)
            if len(self._open) == 1:
                self._over = threading.Event()
                threading.Thread(target=self._run, args=(self._over,), name="progress", daemon=True).start()

    def end(self, activity: Activity) -> None:
        """Ends an activity, and those inside it, such as a loop that an exception left."""
        with self._lock:
            while activity in self._open:
                with suppress(OSError, ValueError):
                    self._open.pop().clear()
            if not self._open:
                self._over.set()

    def _run(self, over: threading.Event) -> None:
        """Shows the open activities until ``over`` is set. An error in writing, as on a full disk, stops no work."""
        terminal = _has_terminal()
        while not over.wait(REFRESH if terminal else INTERVAL):
            with self._lock, suppress(OSError, ValueError):
                if over.is_set():
                    break
                *outer, inner = self._open
                if terminal:
                    for each in (*outer, inner):
                        each.draw()
                else:
                    # The elapsed time of work around other work says little; its count says when all is finished.
                    lines = map(str, [*(each for each in outer if each.unit), inner])
                    sys.stderr.write(f"{'; '.join(lines)}\n")
                    sys.stderr.flush()


_SCREEN = _Screen()
