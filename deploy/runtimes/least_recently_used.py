"""A bounded store of values that are costly to make, and to keep."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Generic, TypeVar

Key = TypeVar("Key")
Value = TypeVar("Value")


class LeastRecentlyUsed(Generic[Key, Value]):
    """Makes a value for each key, and keeps those that were used last.

    Args:
        capacity: number of values that are kept.
        make: returns the value of a key.
        close: frees a value. It is called before the next value is made, so that at most ``capacity`` exist.

    Raises:
        ValueError: ``capacity`` is below 1.
    """

    def __init__(self, capacity: int, make: Callable[[Key], Value], close: Callable[[Value], None]) -> None:
        if capacity < 1:
            raise ValueError(f"the capacity must be at least 1, not {capacity}")
        self._capacity, self._make, self._close = capacity, make, close
        self._values: OrderedDict[Key, Value] = OrderedDict()  # the least recently used first

    def __getitem__(self, key: Key) -> Value:
        """Returns the value of a key, and makes it if it is not kept."""
        if key not in self._values:
            while len(self._values) >= self._capacity:
                self._close(self._values.popitem(last=False)[1])
            self._values[key] = self._make(key)
        self._values.move_to_end(key)
        return self._values[key]
